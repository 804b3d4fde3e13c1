"""The command line as a user meets it: what it writes, and how it answers a mistake."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from embedtune import EmbeddingModule, whole_files
from embedtune.checkpoints.write import WholeFiles
from embedtune.cli import main
from embedtune.distributed import FSDP, ZeRO
from embedtune.distributed.strategies import NAMED
from embedtune.models import EncoderSpec

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OVERLAYS = sorted((CONFIGS[0].parent / "strategy").glob("*.yaml"))
DESCRIPTIONS = {
    "ddp": "DDP",
    "fsdp": "FSDP",
    "zero1": "ZeRO stage 1",
    "zero2": "ZeRO stage 2",
    "zero3": "ZeRO stage 3",
    "zero3_offload": "ZeRO stage 3",
}

PAIRS = [{"query": f"query {i}", "pos": [f"document {i}"], "source": "web"} for i in range(8)]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def fit(model, *flags: str, data: str | None = None, root: str = "run") -> None:
    data = data or write("train.jsonl", PAIRS)
    main(
        [
            *("fit", "--model.model_name_or_path", str(model), "--data.train_path", data),
            *("--trainer.default_root_dir", root, "--trainer.accelerator", "cpu"),
            *("--data.batch_size", "4", *flags),
        ]
    )


def failure(capsys, *argv: str) -> str:
    """Run a command that must fail as a user's mistake; return its one message."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code in (1, 2)
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (message,) = re.findall(r"^embedtune: error: .*$", stderr, re.MULTILINE)
    return message


# --- What a fit leaves ----------------------------------------------------------------------


def test_a_fit_without_yaml_fills_its_run_folder(tiny_bert, caplog):
    with caplog.at_level("INFO", logger="embedtune"):
        fit(tiny_bert)
    run = Path("run")
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "model"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {"epoch-1", "epoch-2", "last.ckpt"} <= {p.name for p in (run / "checkpoints").iterdir()}
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert {"train/loss", "train/lr", "train/examples_per_s"} <= set(rows[0])
    model = SentenceTransformer("run/model", device="cpu")
    assert np.allclose(np.linalg.norm(model.encode(["a", "b c"]), axis=1), 1, atol=1e-6)
    base = SentenceTransformer(str(tiny_bert), device="cpu")
    assert np.abs(model.encode(["a"]) - base.encode(["a"])).max() > 1e-6
    assert not (run / "model" / "UNVERIFIED").exists()
    for fact in (
        "pair, 8 rows, 8 examples",
        "ignored fields  source",
        "4 = 4 x 1 rank",
        "truncated",
    ):
        assert fact in caplog.text
    assert "neg_nums 15 has no effect on pair data" in caplog.text


def test_the_saved_configuration_runs_again(tiny_bert):
    fit(tiny_bert, "--model.lr", "3e-4")
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["model"]["lr"] == 3e-4
    assert saved["seed_everything"] == 666
    before = Path("run/model/model.safetensors").read_bytes()
    metrics = Path("run/metrics.csv").read_text()
    main(["fit", "--config", "run/config.yaml"])
    assert Path("run/metrics-1.csv").read_text() == metrics
    assert Path("run/model/model.safetensors").read_bytes() == before


def test_a_default_of_an_enumeration_is_saved_by_its_value(tiny_bert):
    """Lightning's Timer has one for a str."""
    fit(tiny_bert, "--trainer.callbacks+=Timer", "--trainer.max_epochs", "1")
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    main(["fit", "--config", "run/config.yaml"])


def test_the_share_of_truncated_texts_is_told(tiny_bert, caplog):
    """Also where the encoder's 64 positions, not passage_max_len, are the limit."""
    rows = [{"query": "q", "pos": ["w " * (100 if i < 2 else 5)]} for i in range(8)]
    with caplog.at_level("INFO", logger="embedtune"):
        fit(tiny_bert, data=write("long.jsonl", rows))
    told = "0.0% of the queries at 64 tokens, 25.0% of the documents at 64 tokens (of 8 examples)"
    assert told in caplog.text


def test_a_validation_set_is_named_and_its_loss_logged(tiny_bert, caplog):
    with caplog.at_level("INFO", logger="embedtune"):
        fit(tiny_bert, "--data.val_path", write("val.jsonl", PAIRS[:6]))
    assert "val/val         6 examples (loss)" in caplog.text
    rows = list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))
    assert sum(bool(row["val/val/loss"]) for row in rows) == 3  # the base model is the first


def test_checkpoints_are_whole_beside_plugins_of_other_kinds(tiny_bert, monkeypatch):
    saved = []

    def save(self, checkpoint, path, storage_options=None):
        saved.append(path)

    monkeypatch.setattr(WholeFiles, "save_checkpoint", save)
    plugin = "lightning.pytorch.plugins.environments.LightningEnvironment"
    fit(
        *(tiny_bert, f"--trainer.plugins+={plugin}", "--trainer.max_epochs", "1"),
        *("--checkpoint.save_last", "false"),
    )
    assert [Path(path).name for path in saved] == ["epoch=0-step=2.ckpt"]


def test_a_run_may_go_without_checkpoints(tiny_bert):
    fit(tiny_bert, "--trainer.enable_checkpointing", "false")
    assert not list(Path("run").rglob("*.ckpt"))
    assert Path("run/model/modules.json").exists()


def test_a_drawn_seed_is_also_that_of_the_data(tiny_bert):
    fit(tiny_bert, "--seed_everything", "true")
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert isinstance(saved["seed_everything"], int)
    assert not isinstance(saved["seed_everything"], bool)


def test_only_the_last_epochs_are_kept(tiny_bert):
    fit(tiny_bert, "--trainer.max_epochs", "4", "--num_max_checkpoints", "2")
    kept = sorted(path.name for path in Path("run/checkpoints").glob("epoch-*"))
    assert kept == ["epoch-3", "epoch-4"]
    fit(tiny_bert, "--save_on_epoch_end", "false", root="other")
    assert not list(Path("other/checkpoints").glob("epoch-*"))


@pytest.mark.parametrize(
    ("log_with", "csv_file", "events"),
    [
        ("csv", True, False),
        ("tensorboard", False, True),
        ("[csv, tensorboard]", True, True),
        ("[csv, csv]", True, False),
        ("[]", False, False),
    ],
)
def test_log_with_chooses_the_loggers(tiny_bert, log_with, csv_file, events):
    fit(tiny_bert, "--log_with", log_with)
    assert Path("run/metrics.csv").exists() == csv_file
    assert bool(list(Path("run").glob("events.out.tfevents*"))) == events
    if csv_file:
        rows = list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))
        assert [row["step"] for row in rows] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("step", [3, 4], ids=["in mid-epoch", "between epochs"])
def test_a_stopped_run_goes_on_where_it_was(step, workers, tiny_bert, tmp_path):
    """It sees the batches that are left, and ends with the same weights."""
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model[0].auto_model.config.hidden_dropout_prob = 0.0
    model[0].auto_model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained("no_dropout")
    flags = [
        "--data.batch_size",
        "2",
        "--checkpoint.every_n_train_steps",
        "1",
        "--model.lr",
        "1e-2",
        "--data.num_workers",
        workers,
    ]
    fit("no_dropout", *flags, "--checkpoint.save_top_k", "-1", root="whole")
    (stopped,) = Path("whole/checkpoints").glob(f"*step={step}.ckpt")  # of 4 batches an epoch
    fit("no_dropout", *flags, "--ckpt_path", str(stopped), root="resumed")
    steps = len(Path("resumed/metrics.csv").read_text().splitlines()) - 1
    assert steps == 8 - step
    whole, resumed = (
        SentenceTransformer(f"{root}/model", device="cpu").state_dict()
        for root in ("whole", "resumed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], model.state_dict()[name]) for name in whole)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_that_ended_within_an_epoch_goes_on_within_it(workers, tiny_bert):
    """As after trainer.max_time or early stopping, which Lightning takes for an epoch's end."""
    flags = ("--data.batch_size", "2", "--data.num_workers", workers, "--model.lr", "1e-2")
    flags += ("--model.lr_schedule", "constant", "--model.warmup_proportion", "0")
    flags += ("--trainer.max_epochs", "3")  # of 4 batches
    fit(tiny_bert, *flags, root="whole")
    fit(tiny_bert, *flags, "--trainer.max_steps", "6", root="resumed")
    fit(tiny_bert, *flags, "--ckpt_path", "last", root="resumed")
    steps = len(Path("resumed/metrics.csv").read_text().splitlines()) - 1
    assert steps == 12
    whole, resumed = (Path(root, "model/model.safetensors") for root in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_another_global_batch_goes_on_between_epochs_alone(workers, tiny_bert, capsys):
    every = ("--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1")
    fit(tiny_bert, *every, "--trainer.max_epochs", "1", "--data.batch_size", "2")
    middle, end = (next(Path("run/checkpoints").glob(f"*step={step}.ckpt")) for step in (2, 4))
    larger = ("--data.batch_size", "4", "--data.num_workers", workers, "--trainer.max_epochs", "2")
    with pytest.raises(SystemExit):
        fit(tiny_bert, *larger, "--ckpt_path", str(middle), root="other")
    assert "expected its global batch of 2, found data.batch_size 4" in capsys.readouterr().err
    fit(tiny_bert, *larger, "--ckpt_path", str(end), root="other")
    assert torch.load("other/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_flags_win_over_what_a_checkpoint_remembers(tiny_bert):
    fit(tiny_bert, "--trainer.max_epochs", "1")
    fit(tiny_bert, "--ckpt_path", "last", "--trainer.max_epochs", "3")
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (2, 6)


def test_so_do_rates_and_decay(tiny_bert):
    constant = ("--model.lr_schedule", "constant", "--model.warmup_proportion", "0")
    fit(tiny_bert, *constant, "--trainer.max_epochs", "1", "--model.lr", "1e-3")
    lower = ("--model.lr", "1e-4", "--model.weight_decay", "0.5")
    fit(tiny_bert, *constant, *lower, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    earlier, later = (
        [float(r["train/lr"]) for r in csv.DictReader(Path("run", name).read_text().splitlines())]
        for name in ("metrics-1.csv", "metrics.csv")
    )
    assert earlier == pytest.approx([1e-3] * 2)
    assert later == pytest.approx([1e-3] * 2 + [1e-4] * 2)
    (optimizer,) = torch.load("run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.5, 0.0]
    assert {state["step"].item() for state in optimizer["state"].values()} == {4}


def test_a_prompt_shared_by_all_rows_is_exported(tiny_bert):
    rows = [{**row, "prompt_for_query": "find: "} for row in PAIRS]
    fit(tiny_bert, data=write("prompted.jsonl", rows))
    assert SentenceTransformer("run/model", device="cpu").prompts["query"] == "find: "


@pytest.mark.parametrize("model", ["tiny_transformer", "tiny_qwen"])
def test_a_bare_checkpoint_trains_and_loads_in_sentence_transformers(model, request):
    fit(request.getfixturevalue(model), "--model.pooling", "lasttoken")
    trained = SentenceTransformer("run/model", device="cpu")
    assert trained[1].pooling_mode == "lasttoken"
    assert np.isfinite(trained.encode(["a text"])).all()


# --- The other commands --------------------------------------------------------------------


def test_export_rebuilds_a_checkpoint_offline(tiny_bert):
    fit(tiny_bert, "--model.use_mrl", "true", "--model.mrl_dims", "8,48")
    main(["export", "run/checkpoints/last.ckpt", "exported"])
    for name in ("1_Pooling/config.json", "model.safetensors", "2_Dense/model.safetensors"):
        assert (Path("exported") / name).read_bytes() == (Path("run/model") / name).read_bytes()
    texts = ["a", "some text"]
    first, second = (SentenceTransformer(f, device="cpu") for f in ("exported", "run/model"))
    assert np.array_equal(first.encode(texts), second.encode(texts))
    assert first.encode(texts).shape == (2, 48)


@pytest.mark.parametrize("name", ["queries.jsonl", "lines.txt"])
def test_predict_writes_what_encode_gives_in_order(tiny_bert, name):
    texts = [f"text {'x ' * (i % 5)}{i}" for i in range(70)] + ["longer than 64 tokens " * 9]
    write(name, texts if name.endswith("txt") else [{"query": t, "pos": ["p"]} for t in texts])
    main(
        [
            *("predict", "--model.model_name_or_path", str(tiny_bert), "--data.predict_path", name),
            *("--trainer.default_root_dir", "out", "--trainer.accelerator", "cpu"),
        ]
    )
    found = np.load("out/embeddings.npy")
    expected = SentenceTransformer(str(tiny_bert), device="cpu").encode(texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_prediction_that_cuts_texts_shorter_than_the_model_says_so(tiny_bert, caplog):
    Path("texts.txt").write_text("a text\n")
    argv = ["predict", f"--model.model_name_or_path={tiny_bert}", "--data.predict_path=texts.txt"]
    main([*argv, "--trainer.accelerator=cpu"])
    assert "texts are cut" not in caplog.text
    main([*argv, "--trainer.accelerator=cpu", "--data.query_max_len=8"])
    assert "texts are cut at 8 tokens, by data.query_max_len; the model itself" in caplog.text


def test_a_prediction_of_one_batch_leaves_the_file_of_all(tiny_bert):
    name = write("lines.txt", [f"text {i}" for i in range(20)])
    argv = ["predict", "--model.model_name_or_path", str(tiny_bert), "--data.predict_path", name]
    argv += ["--trainer.accelerator=cpu", "--trainer.default_root_dir=out", "--data.batch_size=8"]
    main([*argv, "--trainer.fast_dev_run=true"])
    assert not Path("out").exists()
    main(argv)
    before = Path("out/embeddings.npy").read_bytes()
    main([*argv, "--trainer.fast_dev_run=true"])
    assert [path.name for path in Path("out").iterdir()] == ["embeddings.npy"]
    assert Path("out/embeddings.npy").read_bytes() == before


def test_a_prediction_of_some_rows_is_refused(tiny_bert, capsys):
    name = write("lines.txt", [f"text {i}" for i in range(20)])
    argv = ["predict", "--model.model_name_or_path", str(tiny_bert), "--data.predict_path", name]
    with pytest.raises(SystemExit):
        main([*argv, "--trainer.accelerator=cpu", "--trainer.limit_predict_batches=2"])
    assert "trainer.limit_predict_batches: expected 1.0" in capsys.readouterr().err


def test_a_prediction_that_breaks_off_leaves_the_former(tiny_bert, monkeypatch):
    name = write("lines.txt", [f"text {i}" for i in range(20)])
    argv = [
        *("predict", "--model.model_name_or_path", str(tiny_bert), "--data.predict_path", name),
        *("--trainer.default_root_dir", "out", "--trainer.accelerator", "cpu"),
        *("--data.batch_size", "8"),
    ]
    main(argv)
    before, step = Path("out/embeddings.npy").read_bytes(), EmbeddingModule.predict_step

    def fail_later(self, batch, batch_idx):
        if batch_idx == 1:
            raise OSError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingModule, "predict_step", fail_later)
        with pytest.raises(OSError, match="killed"):
            main(argv)
    assert Path("out/embeddings.npy").read_bytes() == before
    main(argv)
    assert Path("out/embeddings.npy").read_bytes() == before
    assert not list(Path("out").glob("*.part"))


def test_a_configuration_is_whole_or_the_former(tiny_bert, monkeypatch):
    fit(tiny_bert, "--trainer.max_epochs", "1")
    before = Path("run/config.yaml").read_text()

    put = whole_files.put

    def fail(part, path):
        if path.name == "config.yaml":
            raise OSError("killed")
        put(part, path)

    monkeypatch.setattr(whole_files, "put", fail)
    with pytest.raises(OSError, match="killed"):
        fit(tiny_bert, "--trainer.max_epochs", "2")
    assert Path("run/config.yaml").read_text() == before


def test_a_configuration_of_several_files_is_kept_whole(tiny_bert):
    data = write("train.jsonl", PAIRS)
    Path("data.yaml").write_text(yaml.safe_dump({"train_path": data, "batch_size": 4}))
    main(
        [
            *("fit", "--model.model_name_or_path", str(tiny_bert), "--data", "data.yaml"),
            *("--trainer.accelerator", "cpu", "--trainer.max_steps", "1"),
        ]
    )
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"]["batch_size"] == 4


def test_teach_writes_a_store_that_distills(tiny_bert, tiny_transformer):
    rows = [
        {"query": "q", "pos": ["p", "shared"], "neg": ["n"]},
        {"query": "r", "pos": ["shared"], "neg": ["n", "q"]},
    ]
    data = write("train.jsonl", rows)
    main(["teach", "--model", str(tiny_bert), "--data", data, "--out", "store"])
    lines = Path("store/texts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["query"] for line in lines]
    assert texts == ["q", "p", "shared", "n", "r"]
    stored = np.fromfile("store/embeddings.f32", dtype=np.float32).reshape(5, 32)
    teacher = SentenceTransformer(str(tiny_bert), device="cpu")
    np.testing.assert_allclose(stored, teacher.encode(texts), atol=1e-6)
    fit(
        tiny_transformer,
        *("--data.teacher_path", "[store/embeddings.f32, store/embeddings.f32]"),
        *("--data.teacher_embedding_dim", "64"),
        data="store/texts.jsonl",
    )
    assert SentenceTransformer("run/model", device="cpu").encode(["a"]).shape == (1, 64)


def test_test_reports_spearman_of_a_finished_model(tiny_bert, capsys, recwarn):
    rows = [{"query": f"q {i}", "pos": [f"p {i}"], "scores": [i / 8]} for i in range(8)]
    main(
        [
            *("test", "--model.model_name_or_path", str(tiny_bert), "--model.loss", "CoSENT"),
            *("--data.test_path", write("test.jsonl", rows), "--trainer.accelerator", "cpu"),
        ]
    )
    value = json.loads(Path("run/metrics.json").read_text())["metrics"]["test/test/spearman"]
    (row,) = re.findall(r"^test, Spearman +32\n.*?([-.0-9]+)$", capsys.readouterr().out, re.M)
    assert float(row) == pytest.approx(value, abs=1e-4)
    assert [path.name for path in Path("run").iterdir()] == ["metrics.json"]
    assert not [str(warning.message) for warning in recwarn if "logger" in str(warning.message)]


@pytest.mark.parametrize(("command", "part"), [("validate", "val"), ("test", "test")])
def test_to_measure_nothing_is_refused(tiny_bert, capsys, command, part):
    rows = [{"query": f"q {i}", "pos": [f"p {i}"], "scores": [i / 8]} for i in range(8)]
    with pytest.raises(SystemExit):
        main(
            [
                *(command, "--model.model_name_or_path", str(tiny_bert)),
                *(f"--data.{part}_path", write("sts.jsonl", rows), "--trainer.accelerator", "cpu"),
                *(f"--trainer.limit_{part}_batches", "0"),
            ]
        )
    said = f"trainer.limit_{part}_batches: expected batches to measure, found 0"
    assert said in capsys.readouterr().err


def test_validate_takes_a_checkpoint_with_its_projection(tiny_bert, capsys, recwarn):
    mrl = ("--model.use_mrl", "true", "--model.mrl_dims", "8,48")
    fit(tiny_bert, *mrl)
    recwarn.clear()
    main(
        [
            *("validate", "--model.model_name_or_path", str(tiny_bert), *mrl),
            *("--ckpt_path", "run/checkpoints/last.ckpt", "--data.val_path", "train.jsonl"),
            *("--trainer.accelerator", "cpu"),
        ]
    )
    out = capsys.readouterr().out
    (heads,) = [line.split() for line in out.splitlines() if line.startswith("train, loss")]
    (row,) = [line.split() for line in out.splitlines() if line.startswith("checkpoints/last")]
    assert heads[2:] == ["all", "48", "8"]
    measured = json.loads(Path("run/metrics.json").read_text())["metrics"]
    names = ["val/train/loss", "val/train/loss/48", "val/train/loss/8"]
    expected = [measured[name] for name in names]
    assert [float(value) for value in row[1:]] == pytest.approx(expected, abs=1e-4)
    assert not [str(w.message) for w in recwarn if "lightning" in w.filename]


def test_metrics_are_those_of_the_last_command_in_the_folder(tiny_bert, tiny_transformer, caplog):
    rows = [{"query": f"q {i}", "pos": [f"p {i}"], "scores": [i / 8]} for i in range(8)]
    name = write("sts.jsonl", rows)
    cpu = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    bert = ("--model.model_name_or_path", str(tiny_bert))
    found = {}
    caplog.set_level("INFO", logger="embedtune")
    for command, model, key in (
        ("validate", tiny_bert, "val"),
        ("test", tiny_transformer, "test"),
        ("validate", tiny_bert, "val"),
    ):
        data = ("--model.model_name_or_path", str(model), f"--data.{key}_path", name)
        main([command, *data, *cpu])
        found[command] = json.loads(Path("run/metrics.json").read_text())
        assert list(found[command]["metrics"]) == [f"{key}/sts/spearman"]
        names = [found[command][name] for name in ("command", "model", "checkpoint", "width")]
        assert names == [command, str(model), None, 32]
        value = found[command]["metrics"][f"{key}/sts/spearman"]
        assert caplog.messages[-1] == f"wrote run/metrics.json: {key}/sts/spearman {value:.4f}"
    fit(tiny_bert, "--trainer.max_steps", "1")  # whose checkpoints are others
    assert json.loads(Path("run/metrics-1.json").read_text()) == found["validate"]
    assert not Path("run/metrics.json").exists()
    write("constant.jsonl", [{**row, "scores": [0.5]} for row in rows])
    main(["validate", *bert, "--data.val_path", "constant.jsonl", *cpu])
    constant = json.loads(Path("run/metrics.json").read_text())["metrics"]
    assert constant == {"val/constant/spearman": 0}


def test_help_lists_every_command(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    for command in (
        "fit",
        "validate",
        "test",
        "predict",
        "export",
        "teach",
        "evaluate",
        "cache",
        "demo-data",
    ):
        assert f"\n  {command} " in listed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_instantiates(path, tiny_bert, capsys):
    """An unknown key or a wrong type fails here, as would a loss that cannot be built."""
    assert "expected a jsonl file" in failure(
        capsys,
        *("fit", "--config", str(path), "--model.model_name_or_path", str(tiny_bert)),
        *("--trainer.accelerator", "cpu"),
    )


@pytest.mark.parametrize("source", ["name", "overlay"])
@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_every_strategy_is_built(path, source, tiny_bert, capsys):
    """It is named by the refusal of a checkpoint that another strategy saved."""
    foreign, facts = Path("foreign.ckpt"), {"encoder_spec": EncoderSpec("base")._asdict()}
    if path.stem == "fsdp":
        torch.save(facts, foreign)
    else:
        foreign.mkdir()
        torch.save(facts, foreign / "meta.pt")
        (foreign / ".metadata").touch()
    data = write("train.jsonl", PAIRS)
    message = failure(
        capsys,
        *("fit", "--model.model_name_or_path", str(tiny_bert), "--data.train_path", data),
        *(("--config", str(path)) if source == "overlay" else ("--trainer.strategy", path.stem)),
        *("--ckpt_path", str(foreign), "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
    )
    saved = "one process or DDP" if path.stem == "fsdp" else "FSDP"
    found = DESCRIPTIONS[path.stem]
    assert f"ckpt_path: foreign.ckpt was saved by {saved}" in message
    assert f"expected the same trainer.strategy, found {found};" in message


def test_hybrid_sharding_and_a_configuration_of_deepspeeds_own_are_taken():
    assert FSDP(sharding_strategy="HYBRID_SHARD").sharding_strategy.name == "HYBRID_SHARD"
    assert ZeRO(config={"zero_optimization": {"stage": 3}}).stage == 3


def test_validate_wants_a_checkpoint_where_it_is_told_to_take_the_last(tiny_bert, capsys):
    data = write("val.jsonl", PAIRS)
    model = ("--model.model_name_or_path", str(tiny_bert), "--data.val_path", data)
    message = failure(capsys, "validate", *model, "--ckpt_path", "last")
    assert "ckpt_path: last: expected a checkpoint in run/checkpoints, found none" in message


def test_the_overlays_are_the_strategies_with_a_name():
    assert {path.stem for path in OVERLAYS} == {"ddp", *NAMED}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--trainer.strategy", "fdsp"], "trainer.strategy: expected one of auto, ddp, "),
        (["--trainer.strategy", "deepspeed_stage_3"], "trainer.strategy: expected one of auto"),
        (["--trainer.strategy", "ddp_notebook"], "trainer.strategy: expected one of auto"),
        (["--ckpt_path", "nothing.ckpt"], "ckpt_path: expected a checkpoint or one of last"),
        (["--ckpt_path", "."], "expected a checkpoint of embedtune fit, found an incomplete or"),
    ],
)
def test_a_strategy_or_checkpoint_that_is_none_is_told(flags, expected, tiny_bert, capsys):
    data = write("train.jsonl", PAIRS)
    model = ("--model.model_name_or_path", str(tiny_bert), "--data.train_path", data)
    assert expected in failure(capsys, "fit", *model, "--trainer.accelerator", "cpu", *flags)


def test_there_is_a_configuration_for_every_format():
    assert {"pair", "triplet", "scored", "distill", "demo"} <= {path.stem for path in CONFIGS}


# --- Mistakes -------------------------------------------------------------------------------

GOOD = {"query": "q", "pos": ["p"]}
TRIPLET = {**GOOD, "neg": ["n"]}
SCORED = {"query": "q", "pos": ["a", "b"], "scores": [1, 0]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([""], "bad.jsonl: expected a row a line, found an empty file"),
        ([GOOD] * 6 + ['{"query": '], "bad.jsonl:7: invalid JSON"),
        ([GOOD, {"query": "q", "pos": "p"}], "bad.jsonl:2: field 'pos'"),
        ([SCORED, {**SCORED, "scores": [1]}], "bad.jsonl:2: field 'scores': expected 2"),
        ([GOOD, SCORED], "bad.jsonl:2: found a scored row"),
        ([TRIPLET, {**TRIPLET, "neg": []}], "bad.jsonl:2: field 'neg'"),
    ],
)
def test_bad_rows_stop_the_run(capsys, tiny_bert, rows, expected):
    flags = ("--model.model_name_or_path", str(tiny_bert), "--trainer.accelerator", "cpu")
    data = write("bad.jsonl", rows)
    assert expected in failure(capsys, "fit", *flags, "--data.train_path", data)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data.train_path", "none.jsonl"], "data.train_path: .*none.jsonl"),
        (["--model.model_name_or_path", "./none"], "model_name_or_path: .*none"),
        (["--model.lrr", "1"], "model.lrr.*nearest valid key is model.lr$"),
        (["--config", "misspelt.yaml"], "warmup_proportoin'; .* is model.warmup_proportion$"),
        (["--config", "misplaced.yaml"], "data.lr'; .* model.lr$"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--model.lr", "fast"], "model.lr.*float.*fast"),
        (["--model.use_mrl", "true", "--model.mrl_dims", "8,x"], "mrl_dims.*8,x"),
        (
            ["--model.use_mrl=true", "--model.mrl_dims=64", "--model.projection_init=none"],
            "mrl_dims: expected widths up to the model's 32 .*, found 64",
        ),
        (["--data.teacher_path", "t.f32", "--data.format", "distill"], "t.f32: expected 8 rows"),
        (["--model.loss", "embedtune.losses.Nope"], "Nope"),
        (["--model.loss", "InfoNCE", "--model.loss.temperature", "-1"], "temperature.*-1"),
        (["--data.format", "triplet"], "train.jsonl:1: field 'neg' is missing"),
        (["--num_max_checkpoints", "0"], "num_max_checkpoints"),
        (["--ckpt_path", "none.ckpt"], "ckpt_path: .*none.ckpt"),
        (["--trainer.default_root_dir", "t.f32"], "default_root_dir: .*t.f32"),
        (["--trainer.default_root_dir", "t.f32/run"], "default_root_dir: .* file .*/t.f32$"),
        (["--trainer.default_root_dir", "used"], "default_root_dir: .* file used/checkpoints$"),
        (["--checkpoint.dirpath", "t.f32"], "checkpoint.dirpath: expected a folder, .* t.f32$"),
    ],
)
def test_a_mistake_in_the_settings_is_one_clear_message(capsys, tiny_bert, flags, expected):
    Path("misspelt.yaml").write_text("model: {warmup_proportoin: 0.1}")
    Path("misplaced.yaml").write_text("data: {lr: 0.1}")
    Path("t.f32").write_bytes(b"\0" * 33)
    Path("used").mkdir()
    Path("used/checkpoints").touch()
    data = write("train.jsonl", PAIRS)
    base = ["fit", "--model.model_name_or_path", str(tiny_bert), "--data.train_path", data]
    message = failure(capsys, *base, "--trainer.accelerator", "cpu", *flags)
    assert re.search(expected, message), message


def test_unknown_commands_and_missing_arguments_are_named(capsys):
    assert "found 'fti'" in failure(capsys, "fti")
    assert "model_name_or_path" in failure(capsys, "fit")
    assert "none.ckpt" in failure(capsys, "export", "none.ckpt", "out")
    Path("text.ckpt").write_text("not a checkpoint")
    assert "expected a checkpoint of embedtune" in failure(capsys, "export", "text.ckpt", "out")
    assert "out" in failure(capsys, "teach", "--model", "m", "--data", "d")
    assert "dims" in failure(capsys, "evaluate", "m", "--data", "d", "--dims", "64,x")


def test_the_installed_command_exits_with_code_2_and_no_traceback():
    run = subprocess.run(
        [sys.executable, "-m", "embedtune", "fit", "--model.lrr", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("embedtune: error: ")
    assert "Traceback" not in run.stderr
