"""The strategy of a fit that names none."""

import json
from pathlib import Path

import pytest
import torch
from forks import Ranks, embedtune
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from embedtune.cli import main
from embedtune.distributed import pick
from embedtune.distributed.pick import Devices, find_devices, pick_strategy, zero_bytes
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec

GB = 10**9
DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"
ROWS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(10)]


def two(memory: float, kind: str = "cuda") -> Devices:
    return Devices(ranks=2, kind=kind, memory=int(memory))


@pytest.fixture(scope="module")
def bert(tiny_bert):
    return Encoder(EncoderSpec(str(tiny_bert)))


@pytest.fixture(scope="module")
def qwen(tiny_qwen):
    return Encoder(EncoderSpec(str(tiny_qwen), pooling="lasttoken"))


def test_devices_are_those_of_a_trainer(monkeypatch):
    given = {"accelerator": "cpu", "num_nodes": 1, "plugins": None}
    one, both = (find_devices({**given, "devices": devices}) for devices in ("auto", 2))
    assert (one.ranks, both.ranks, both.kind) == (1, 2, "cpu")
    assert one.memory // 2 == pytest.approx(both.memory, abs=1)
    monkeypatch.delattr("os.sysconf")  # as on Windows
    assert find_devices({**given, "devices": "auto"}) == Devices(1, "cpu", 0)


def test_encoders_like_bert_are_picked_fsdp_and_decoders_zero(bert, qwen):
    assert pick_strategy(bert, two(80 * GB), "bf16-mixed").name == "fsdp"
    picked = pick_strategy(qwen, two(80 * GB), "bf16-mixed")
    assert picked.name == "zero1"
    assert "a decoder on 2 devices" in picked.reason
    assert "80.0 GB" in picked.reason


def test_one_device_divides_nothing(bert, qwen):
    for encoder in (bert, qwen):
        assert pick_strategy(encoder, Devices(1, "cpu", GB), "32-true").name == "auto"


def test_a_model_without_layers_is_picked_ddp(bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    static = StaticEmbedding(bert.model.tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[static]).save_pretrained(str(tmp_path))
    assert pick_strategy(Encoder(EncoderSpec(str(tmp_path))), two(GB), "32-true").name == "ddp"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_stage_is_the_lowest_that_fits_into_half_of_the_memory(qwen, precision, monkeypatch):
    monkeypatch.setattr(pick, "REDUCE_BUCKET", 1000)  # else it outweighs a tiny model
    parameters, size = sum(p.numel() for p in qwen.parameters()), 4 if precision[0] == "3" else 2
    needed = [zero_bytes(stage, parameters, 2, size) for stage in (1, 2, 3)]
    for stage, bytes_needed in enumerate(needed, start=1):
        for memory in (2 * bytes_needed + 2, 2 * bytes_needed - 2):
            fitting = [s for s, other in enumerate(needed, start=1) if 2 * other <= memory]
            picked = pick_strategy(qwen, two(memory), precision)
            assert picked.name == f"zero{fitting[0] if fitting else 3}", stage
            assert ("zero3_offload needs less" in picked.reason) == (not fitting)


def test_a_decoder_is_picked_fsdp_where_zero_cannot(qwen, monkeypatch):
    assert pick_strategy(qwen, two(GB, "cpu"), "16-mixed").name == "fsdp"
    assert pick_strategy(qwen, two(GB), "32-true", clips_values=True).name == "fsdp"
    monkeypatch.setattr(pick, "find_spec", lambda name: None)
    picked = pick_strategy(qwen, two(GB), "32-true")
    assert picked.name == "fsdp"
    assert "deepspeed is not installed" in picked.reason


def test_the_bytes_are_those_of_the_documentation():
    """Of the table in GB, in bf16-mixed with several chunks: a model each of 0.1, 0.6 and 7 B."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| | 0.1B, w 8"))
    parameters = {"0.1B": 0.1 * GB, "0.6B": 0.6 * GB, "7B": 7 * GB}
    heads = [cell.strip() for cell in lines[start].strip("| ").split("|")]
    cases, model = [], ""
    for head in heads:
        model = head.split(",")[0] if "B" in head else model
        cases.append((model, int(head.split()[-1])))
    rows = [line.strip("| ").split("|") for line in lines[start:] if line.startswith("| `zero")]
    assert len(rows[:3]) == 3
    for stage, (_, *cells) in enumerate(rows[:3], start=1):
        for (name, ranks), cell in zip(cases, cells, strict=True):
            told = float(cell.split("/")[-1])
            found = zero_bytes(stage, int(parameters[name]), ranks, 2) / GB
            assert found == pytest.approx(told, rel=0.01, abs=0.06), (stage, name, ranks)


@pytest.mark.parametrize(
    ("model", "said", "kind"),
    [
        ("tiny_bert", "FSDP, picked for an encoder like BERT on 2 devices", "meta.pt"),
        ("tiny_qwen", "ZeRO stage 1, picked for a decoder on 2 devices", "latest"),
    ],
)
def test_two_processes_pick_and_train_as_one(request, tmp_path, monkeypatch, model, said, kind):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base = request.getfixturevalue(model)
    common = [
        *("fit", "--model.model_name_or_path", str(base), "--model.pooling", "mean"),
        *("--data.train_path", "train.jsonl", "--model.lr", "1e-3", "--model.dropout", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
        *("--model.lr_schedule", "constant", "--model.warmup_proportion", "0"),
        *("--save_on_epoch_end", "false", "--trainer.max_steps"),
    ]

    def on(devices: int, root: str, steps: int) -> list[str]:
        size = ("--data.batch_size", str(4 // devices), "--trainer.devices", str(devices))
        return [*common, str(steps), "--trainer.default_root_dir", root, *size]

    main(on(1, "one", 4))
    ranks = Ranks(embedtune, on(2, "two", 4), folder=tmp_path, ranks=2)
    assert ranks.wait() == [0, 0], ranks.output()
    assert said in ranks.output()
    assert Path("two/checkpoints/last.ckpt", kind).exists()
    one, both = (load_file(f"{root}/model/model.safetensors") for root in ("one", "two"))
    base_weights = load_file(base / "model.safetensors")
    moved = max(float((one[k] - w).abs().max()) for k, w in base_weights.items() if k in one)
    assert moved > 1e-3
    for name, weight in one.items():
        assert torch.allclose(both[name], weight, atol=1e-5), name
    if kind == "meta.pt":  # one process goes on from what two have saved
        alone = Ranks(embedtune, [*on(1, "two", 6), "--ckpt_path", "last"], folder=tmp_path)
        assert alone.wait() == [0], alone.output()
        assert "FSDP, picked to go on from" in alone.output()
        main([*on(1, "one", 6), "--ckpt_path", "last"])
        one, both = (load_file(f"{root}/model/model.safetensors") for root in ("one", "two"))
        for name, weight in one.items():
            assert torch.allclose(both[name], weight, atol=1e-5), name


def test_a_run_on_one_process_says_so(tiny_bert, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--model.model_name_or_path", str(tiny_bert), "--data.train_path", "train.jsonl"]
    with caplog.at_level("INFO", logger="embedtune"):
        main(["fit", *flags, "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"])
    assert "SingleDevice, picked for one device: nothing is divided" in caplog.text
