"""The exported folder is the trained model, or it is marked and the command fails."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from embedtune import EmbeddingDataModule, EmbeddingModule, ExportModel, InputError
from embedtune.checkpoints import read_spec
from embedtune.cli import main
from embedtune.errors import ExportError
from embedtune.export import probes
from embedtune.export.folder import TOLERANCE, UNVERIFIED, export_encoder
from embedtune.export.rebuild import export_checkpoint, rebuild
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec


@pytest.fixture
def encoder(tiny_bert) -> Encoder:
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.append_projection(48)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return encoder


def modules(folder: Path) -> list[str]:
    return [m["type"].rpartition(".")[2] for m in json.loads((folder / "modules.json").read_text())]


def test_an_export_loads_and_equals_the_training_graph(encoder, tmp_path):
    encoder.set_prompt("query", "find: ")
    folder = tmp_path / "model"
    assert export_encoder(encoder, folder) <= TOLERANCE
    assert modules(folder) == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert not (folder / UNVERIFIED).exists()
    assert not list(folder.rglob("*.bin"))
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.prompts["query"] == "find: "
    assert model.similarity_fn_name == "cosine"
    with torch.no_grad():
        features = encoder.eval().tokenize(["find: a text"], "query", None, 64)
        expected = torch.nn.functional.normalize(encoder(features), dim=-1)
    torch.testing.assert_close(torch.as_tensor(model.encode_query(["a text"])), expected)


def test_a_model_without_normalize_gets_none(tiny_transformer, tmp_path):
    export_encoder(Encoder(EncoderSpec(str(tiny_transformer))), tmp_path / "model")
    assert modules(tmp_path / "model") == ["Transformer", "Pooling"]


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": "q: ", "passage": "p: "}, None),
        ({"query": "q: ", "document": "d: ", "passage": "p: "}, None),
        ({"task": "t: "}, "task"),
    ],
)
def test_prompts_are_those_of_encode_query_and_encode_document(
    tiny_bert, tmp_path, prompts, default
):
    model = SentenceTransformer(
        str(tiny_bert), device="cpu", prompts=prompts, default_prompt_name=default
    )
    model.save_pretrained(str(tmp_path / "prompted"))
    encoder = Encoder(EncoderSpec(str(tmp_path / "prompted")))
    assert export_encoder(encoder, tmp_path / "model") <= TOLERANCE
    exported = SentenceTransformer(str(tmp_path / "model"), device="cpu").prompts
    document = prompts.get("document", prompts.get("passage", ""))
    assert (exported["query"], exported["document"]) == (prompts.get("query", ""), document)


@pytest.mark.parametrize("longest", [None, 48])
def test_a_tokenizer_is_exported_as_it_was_loaded(tiny_bert, tmp_path, longest):
    """Other runtimes obey the truncation and padding that ``tokenizer.json`` holds."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    if longest is not None:
        tokenizer.enable_truncation(longest)
        tokenizer.enable_padding(length=longest)
    tokenizer.save(str(base / "tokenizer.json"))
    encoder = Encoder(EncoderSpec(str(base)))
    encoder.tokenize(["some texts", "of another length"], "query", None, 8)
    export_encoder(encoder, tmp_path / "model")
    exported = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert exported.truncation == tokenizer.truncation
    assert exported.padding == tokenizer.padding


def test_training_goes_on_after_an_export(encoder, tmp_path):
    before = [id(parameter) for parameter in encoder.parameters()]
    export_encoder(encoder, tmp_path / "model")
    assert [id(parameter) for parameter in encoder.parameters()] == before
    assert len(encoder.model) == 3


def damage(folder: Path) -> None:
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    weights["linear.weight"][0, 0] += 0.01
    save_file(weights, folder / "2_Dense" / "model.safetensors")


def test_a_folder_that_differs_is_marked_and_the_command_fails(
    encoder, tmp_path, monkeypatch, capsys
):
    load = probes.load_sentence_transformer

    def load_damaged(path, **kwargs):
        damage(Path(path))
        return load(path, **kwargs)

    monkeypatch.setattr(probes, "load_sentence_transformer", load_damaged)
    with pytest.raises(ExportError, match="differ"):
        export_encoder(encoder, tmp_path / "model")
    assert "differ" in (tmp_path / "model" / UNVERIFIED).read_text()
    assert (tmp_path / "model" / "model.safetensors").exists()

    checkpoint = {
        "encoder_spec": encoder.spec._asdict(),
        "state_dict": {f"encoder.{k}": v for k, v in encoder.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path / "last.ckpt"), str(tmp_path / "again")])
    assert caught.value.code == 1
    assert "Traceback" not in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_an_export_that_cannot_be_written_leaves_the_former(encoder, tmp_path, monkeypatch, error):
    folder = tmp_path / "model"
    export_encoder(encoder, folder)
    before, save = contents(folder), type(encoder.model).save_pretrained

    def fill_the_disk(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise error

    monkeypatch.setattr(type(encoder.model), "save_pretrained", fill_the_disk)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ExportError
    with pytest.raises(expected):
        export_encoder(encoder, folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(encoder.model) == 3


def break_off(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")


@pytest.mark.parametrize("spoil", [damage, break_off])
def test_a_verified_export_is_not_replaced_by_one_that_is_not(
    encoder, tmp_path, monkeypatch, spoil
):
    folder, beside = tmp_path / "model", tmp_path / "model.unverified"
    export_encoder(encoder, folder)
    before, load = contents(folder), probes.load_sentence_transformer

    def load_spoilt(path, **kwargs):
        spoil(Path(path))
        return load(path, **kwargs)

    monkeypatch.setattr(probes, "load_sentence_transformer", load_spoilt)
    for _ in range(2):
        with pytest.raises(ExportError, match=r"it is kept as .*model\.unverified, marked"):
            export_encoder(encoder, folder)
        assert contents(folder) == before
        assert (beside / UNVERIFIED).exists()
    first = tmp_path / "first"
    with pytest.raises(ExportError, match=r"first: .*; it is marked UNVERIFIED"):
        export_encoder(encoder, first)
    assert (first / UNVERIFIED).exists()


def test_a_former_export_that_a_kill_left_without_its_name_is_not_lost(
    encoder, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    export_encoder(encoder, folder)
    before = contents(folder)
    folder.rename(tmp_path / "model.former")  # as just before the new one takes its place

    def fill_the_disk(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(encoder.model), "save_pretrained", fill_the_disk)
    with pytest.raises(ExportError):
        export_encoder(encoder, folder)
    assert contents(folder) == before


def test_weights_that_are_not_numbers_are_not_verified(encoder, tmp_path):
    with torch.no_grad():
        encoder.dense.linear.weight[0, 0] = float("nan")
    with pytest.raises(ExportError):
        export_encoder(encoder, tmp_path / "model")


def test_missing_weights_are_an_error(encoder, tmp_path):
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    del state["encoder.model.2.linear.bias"]
    checkpoint = {"encoder_spec": encoder.spec._asdict(), "state_dict": state}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"model\.2\.linear\.bias"):
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_zero_holds_of_frozen_weights_is_the_base_model_s(tiny_bert):
    """In half precision; what was trained there is not."""
    base = Encoder(EncoderSpec(str(tiny_bert))).state_dict()
    halves = {name: tensor.bfloat16() for name, tensor in base.items()}
    trained = next(name for name in halves if "word_embeddings" in name)
    halves[trained] = halves[trained] * 2
    found = rebuild(EncoderSpec(str(tiny_bert)), halves, "halves").state_dict()
    differ = {name for name in base if not torch.equal(found[name], base[name])}
    assert differ == {trained}
    torch.testing.assert_close(found[trained], halves[trained].float(), rtol=0, atol=0)


def test_an_export_replaces_an_export_and_nothing_else(encoder, tiny_bert, tmp_path):
    export_encoder(encoder, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("edited")
    (tmp_path / "model" / UNVERIFIED).touch()
    shutil.rmtree(tmp_path / "model" / "1_Pooling")
    export_encoder(encoder, tmp_path / "model")
    assert not (tmp_path / "model" / UNVERIFIED).exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    export_encoder(encoder, precious)  # nothing is lost of an empty one
    shutil.rmtree(precious)
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    shutil.copytree(tiny_bert, tmp_path / "bert")
    (tmp_path / "file").write_text("years of work")
    for name in ("precious", "bert"):
        before = contents(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: .* found something else: it has no digests"):
            export_encoder(encoder, tmp_path / name)
        assert contents(tmp_path / name) == before
    with pytest.raises(InputError, match=r"file: .* found the file"):
        export_encoder(encoder, tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match=r"loop: .* found the link .*loop, which leads nowhere"):
        export_encoder(encoder, tmp_path / "loop")


@pytest.mark.parametrize("name", ["onnx/model.onnx", "notes.txt", "link"])
def test_what_was_added_to_an_export_is_not_lost(encoder, tmp_path, name):
    folder = tmp_path / "model"
    export_encoder(encoder, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (folder / name).symlink_to(tmp_path)
    else:
        (folder / name).write_text("somebody's")
    before = contents(folder)
    with pytest.raises(InputError, match=f"found {name}, which embedtune has not written; move"):
        export_encoder(encoder, folder)
    assert contents(folder) == before


def test_an_export_does_not_replace_its_base(tiny_bert, tmp_path, monkeypatch):
    """Nor a folder that holds it, however either is written."""
    base = tmp_path / "models" / "base"
    export_encoder(Encoder(EncoderSpec(str(tiny_bert))), base)  # its own, hence replaceable
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(base.parent)
    before = contents(base)
    for given in ("base", str(base), "../link"):
        encoder = Encoder(EncoderSpec(given))
        for place in ("base", "../models/base", "../link", ".."):
            with pytest.raises(InputError, match=r"the base model's|name of a folder"):
                export_encoder(encoder, Path(place))
    assert contents(base) == before


def test_what_is_mounted_cannot_be_replaced(encoder, tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(InputError, match=r"volume: expected .* one to replace, found a mounted"):
        export_encoder(encoder, tmp_path / "volume")
    export_encoder(encoder, tmp_path / "volume" / "model")


@pytest.mark.parametrize("name", [".", "/", "", "..", "model/.."])
def test_a_place_without_a_name_is_refused(encoder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "run" / "last.ckpt", encoder.spec, encoder)
    with pytest.raises(SystemExit) as caught:
        main(["export", "run/last.ckpt", name])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "expected the name of a folder to export to, found '" in said
    assert "Traceback" not in said


def test_longer_training_texts_lengthen_the_exported_input(tiny_bert, tmp_path):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model.max_seq_length = 16
    model.save_pretrained(str(tmp_path / "short"))
    for trained, expected in ((32, 32), (8, 16)):
        encoder = Encoder(EncoderSpec(str(tmp_path / "short"), max_seq_length=trained))
        export_encoder(encoder, tmp_path / "model")
        exported = SentenceTransformer(str(tmp_path / "model"), device="cpu")
        assert exported.max_seq_length == expected


# --- Model card -----------------------------------------------------------------------------


def fit(folder: Path, model: Path, ckpt_path: Path | None = None, **settings) -> None:
    """Fit two epochs of three steps, each of them validated, checkpointed and exported."""
    folder.mkdir()
    train = [{"query": f"query {i}", "pos": [f"text {i}"], "neg": [f"{i}"]} for i in range(12)]
    dev = [{"query": f"query {i}", "pos": [f"text {i}"], "scores": [i % 5]} for i in range(12)]
    for name, rows in (("train", train), ("dev", dev)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = EmbeddingDataModule(str(folder / "train.jsonl"), str(folder / "dev.jsonl"), batch_size=4)
    module = EmbeddingModule(str(model), use_mrl=True, mrl_dims="32,8")
    module.base_metrics = {"val/dev/spearman": 0.25, "val/dev/spearman/8": 0.125}
    keep = ModelCheckpoint(folder / "kept", "{epoch}-{step}", save_top_k=-1, **settings)
    pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
        callbacks=[keep, ExportModel()],
    ).fit(module, datamodule=data, ckpt_path=ckpt_path)


def read_card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_an_exported_checkpoint_has_the_card_of_the_running_export(tiny_bert, tmp_path):
    fit(tmp_path / "run", tiny_bert)
    first, last = sorted((tmp_path / "run" / "kept").glob("*.ckpt"))
    exports = tmp_path / "run" / "checkpoints"
    for number, checkpoint in ((1, first), (2, last)):
        export_checkpoint(checkpoint, tmp_path / "model")
        assert read_card(tmp_path / "model") == read_card(exports / f"epoch-{number}")
        assert f"after step {3 * number}, in epoch {number}" in read_card(tmp_path / "model")
    assert read_card(tmp_path / "model") == read_card(tmp_path / "run" / "model")
    facts = torch.load(last, weights_only=True)["training_facts"]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["data"] | {"rows": 12, "examples": 12} == facts["data"]
    assert facts["configuration"] | {"steps": 6, "batch size": 4} == facts["configuration"]
    assert (facts["mrl_dims"], facts["data"]["files"]) == ([32, 8], ["train.jsonl"])
    rows = [row for row in read_card(tmp_path / "model").splitlines() if "| Spearman" in row]
    assert [row.split(" | ")[2:4] for row in rows] == [["full", "0.2500"], ["8", "0.1250"]]
    assert str(tmp_path) not in read_card(tmp_path / "model")
    assert "matryoshka" in ModelCard.load(tmp_path / "model" / "README.md").data.tags


def test_a_run_that_goes_on_counts_on(tiny_bert, tmp_path):
    fit(tmp_path / "run", tiny_bert, every_n_train_steps=2)
    (middle,) = (tmp_path / "run" / "kept").glob("*step=4.ckpt")
    export_checkpoint(middle, tmp_path / "model")
    assert "after step 4, in epoch 2" in read_card(tmp_path / "model")
    fit(tmp_path / "again", tiny_bert, middle)
    assert read_card(tmp_path / "again" / "model") == read_card(tmp_path / "run" / "model")


def test_a_checkpoint_without_facts_has_a_card_without_them(encoder, tmp_path):
    checkpoint = {
        "encoder_spec": encoder.spec._asdict(),
        "state_dict": {f"encoder.{k}": v for k, v in encoder.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "old.ckpt")
    export_checkpoint(tmp_path / "old.ckpt", tmp_path / "model")
    assert "## Training" not in read_card(tmp_path / "model")
    assert "matryoshka" not in ModelCard.load(tmp_path / "model" / "README.md").data.tags


# --- The base model of a checkpoint ---------------------------------------------------------


def save_checkpoint(path: Path, spec: EncoderSpec, encoder: Encoder) -> Path:
    path.parent.mkdir(parents=True)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    torch.save({"encoder_spec": spec._asdict(), "state_dict": state}, path)
    return path


@pytest.mark.parametrize("base", ["models/base", "./models/base", "models/../models/base"])
def test_a_base_model_is_found_from_another_folder_and_after_a_move(
    tiny_bert, tmp_path, monkeypatch, base
):
    work = tmp_path / "work"
    shutil.copytree(tiny_bert, work / "models" / "base")
    monkeypatch.chdir(work)
    spec = EncoderSpec(base)
    encoder = Encoder(spec)
    path = Path("run") / "checkpoints" / "last.ckpt"
    save_checkpoint(path, spec.kept_in(Path("run")), encoder)
    monkeypatch.chdir(tmp_path)
    assert export_checkpoint(work / path, Path("model")) <= TOLERANCE
    work.rename("moved")
    assert export_checkpoint(Path("moved") / path, Path("model")) <= TOLERANCE
    assert str(tmp_path) not in read_card(Path("model"))
    (Path("moved") / "models" / "base").rename("base")
    with pytest.raises(InputError, match=r"work/models/.*base: say with --model_name_or_path"):
        export_checkpoint(Path("moved") / path, Path("again"))
    argv = ["export", str(Path("moved") / path), "again", "--model_name_or_path", "base"]
    main(argv)
    assert (Path("again") / "modules.json").exists()


def test_a_hub_name_is_kept_as_it_is(tmp_path):
    spec = EncoderSpec("org/model")
    assert spec.kept_in(tmp_path) == spec


def test_a_fit_keeps_where_its_base_model_is(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_bert.parent)
    fit(tmp_path / "run", Path(tiny_bert.name))
    monkeypatch.chdir(tmp_path)
    checkpoint = next((tmp_path / "run" / "kept").glob("*.ckpt"))
    spec = read_spec(checkpoint)
    assert spec.model_name_or_path == str(tiny_bert)
    assert (tmp_path / "run" / spec.from_run_folder).resolve() == tiny_bert.resolve()
    assert str(tiny_bert.parent) not in read_card(tmp_path / "run" / "model")


def test_a_checkpoint_cannot_allow_itself_to_run_code(tiny_bert, tmp_path):
    spec = EncoderSpec(str(tiny_bert), trust_remote_code=True)
    path = save_checkpoint(tmp_path / "run" / "a.ckpt", spec, Encoder(EncoderSpec(str(tiny_bert))))
    with pytest.raises(InputError, match="give --trust_remote_code true"):
        export_checkpoint(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    main(["export", str(path), str(tmp_path / "model"), "--trust_remote_code", "true"])
    assert "trust_remote_code=True" in read_card(tmp_path / "model")


# --- Embedding ------------------------------------------------------------------------------
