"""On a GPU every strategy gives the weights of one process on the CPU. Skipped where there is none.

One GPU divides nothing; what is shown is that each path through a strategy runs there (NCCL, fused
AdamW, autocast, pinned batches, worker processes) and computes the same.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import strategy_cases
import torch
from loss_batches import retrieval_batch
from sentence_transformers import SentenceTransformer
from test_strategies import assert_same_weights, movement

from embedtune import export_checkpoint
from embedtune.checkpoints import read_facts, read_weights
from embedtune.cli import main
from embedtune.losses import InfoNCE, Matryoshka
from embedtune.losses import rank_hinge as hinge

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]
STRATEGIES = ["auto", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]
MRL = {"use_mrl": True, "mrl_dims": [8, 24]}
CASES = {
    "triplet": {"rows": "triplet", "count": 17, "data": {"neg_nums": 2}, "module": MRL},
    "distill": {"rows": "distill", "count": 19, "module": MRL},
    "scored": {"rows": "scored", "count": 17},
    "cosent": {"rows": "scored", "count": 17, "loss": "cosent"},
}
LONG = {"count": 24, "epochs": 2, "adamw": True, "lr": 0.005, "module": {"dropout": 0.1}}
CHECKPOINTED = {**LONG, "checkpoint_every": 4, "export": True}


@pytest.fixture(scope="module")
def runs(tiny_bert, tmp_path_factory):
    """Return a function that runs a case, on the GPU unless told otherwise."""
    folder = tmp_path_factory.mktemp("gpu")
    strategy_cases.write_data(folder, [*CASES.values(), {"rows": "triplet", "count": 24}])
    found: dict[str, dict] = {}

    def run(task: str, strategy: str = "auto", accelerator: str = "gpu", **changes) -> dict:
        case = {"batch": 8, "lr": 0.1, "model": str(tiny_bert), **CASES[task], **changes}
        module = {"dropout": 0.0, **CASES[task].get("module", {}), **changes.get("module", {})}
        case |= {"module": module, "strategy": strategy, "accelerator": accelerator}
        key = json.dumps(case, sort_keys=True) + task
        if key not in found:
            name = f"{task}-{len(found)}"
            found[key] = strategy_cases.run({**case, "name": name}, folder, ranks=1)
            found[key]["folder"] = folder / name
        return found[key]

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", CASES)
def test_three_steps_of_sgd_give_the_weights_of_the_cpu(runs, strategy, task):
    assert_same_weights(runs(task, strategy), runs(task, accelerator="cpu"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_so_do_adamw_and_clipping(runs, strategy):
    settings = {"adamw": True, "clip": 0.05, "lr": 0.005}
    expected = runs("triplet", accelerator="cpu", **settings)
    assert_same_weights(runs("triplet", strategy, **settings), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_so_does_a_gradient_cache(runs, strategy):
    result = runs("triplet", strategy, module={"grad_cache": True})
    assert_same_weights(result, runs("triplet", accelerator="cpu"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_cache_replays_dropout(runs, strategy):
    expected = runs("triplet", strategy, module={"dropout": 0.2})
    result = runs("triplet", strategy, module={"dropout": 0.2, "grad_cache": True})
    assert_same_weights(result, expected)
    without = runs("triplet", strategy)
    assert movement(expected["weights"], without["weights"]) > 1e-3


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_rounds_no_teacher_or_loss(runs, strategy, precision):
    # The first scales of float16 are too large by design: steps are left out until one fits.
    epochs = 1 if precision == "bf16-mixed" else 6
    result = runs("distill", strategy, precision=precision, epochs=epochs)
    expected = runs("distill", accelerator="cpu", epochs=epochs)
    assert result["precisions"] == {"torch.float32"}
    assert torch.equal(result["seen"][0][2].cpu(), expected["seen"][0][2])
    assert all(tensor.dtype == torch.float32 for tensor in result["weights"].values())
    moved = movement(expected["weights"], expected["start"])
    if precision == "bf16-mixed":
        assert movement(result["weights"], expected["weights"]) < 0.2 * moved
    assert movement(result["weights"], result["start"]) > 0.2 * moved


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_uninterrupted_one(runs, strategy):
    whole = runs("triplet", strategy, **CHECKPOINTED)
    checkpoint = whole["folder"] / "checkpoints" / "step=4.ckpt"
    resumed = runs("triplet", strategy, **LONG, **{"from": str(checkpoint)})
    assert len(resumed["seen"]) == 2
    assert movement(resumed["weights"], whole["weights"]) == 0
    assert movement(whole["weights"], whole["start"]) > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exports_prove_themselves_on_a_gpu(runs, strategy, tmp_path):
    whole = runs("triplet", strategy, **CHECKPOINTED)
    assert not (whole["folder"] / "model" / "UNVERIFIED").exists()
    model = SentenceTransformer(str(whole["folder"] / "model"))
    assert model.device.type == "cuda"
    assert model.encode("one text").shape == (24,)
    checkpoint = whole["folder"] / "checkpoints" / "step=4.ckpt"
    assert export_checkpoint(checkpoint, tmp_path / "model") <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_test_sets_measure_alike(runs, strategy):
    found = runs("triplet", strategy, evaluate=True)
    expected = runs("triplet", accelerator="cpu", evaluate=True)
    for moment in ("base", "metrics"):
        assert found[moment].keys() == expected[moment].keys()
        assert found[moment] == pytest.approx(expected[moment], rel=1e-3), moment


# --- Losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_positive", [False, True])
@pytest.mark.parametrize("dims", [None, [4, 16]])
def test_info_nce_and_its_gradient_are_those_of_the_cpu(dims, multi_positive):
    loss = InfoNCE(0.1, in_batch_positives=True, multi_positive=multi_positive)
    loss = Matryoshka(loss, dims) if dims else loss
    results = []
    for device in ("cpu", "cuda"):
        embeddings, target = retrieval_batch(m=7, k=2)
        embeddings = type(embeddings)(*(t.detach().to(device).requires_grad_() for t in embeddings))
        target = type(target)(*(None if t is None else t.to(device) for t in target))
        value = loss(embeddings, target)["loss"]
        value.backward()
        results.append([value.cpu(), *(t.grad.cpu() for t in embeddings)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_rank_hinge_counts_on_a_gpu_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 200, 200, generator=generator, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        similarity = student.detach().to(device).requires_grad_()
        value = hinge.rank_hinge(similarity, hinge.pair_order(teacher.to(device)), 0.015)
        value.backward()
        results.append((value.cpu(), similarity.grad.cpu()))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


# --- Endings ---------------------------------------------------------------------------------

BREAKING = """
from embedtune.losses import InfoNCE


class Breaking(InfoNCE):
    def __init__(self, what: str):
        super().__init__()
        self.what, self.calls = what, 0

    def forward(self, embeddings, target):
        parts = super().forward(embeddings, target)
        self.calls += 1
        if self.calls != 3:
            return parts
        if self.what == "loss":
            return {"loss": parts["loss"] * float("nan")}
        query = embeddings.query  # a loss of 0 whose gradient is infinite
        return {"loss": parts["loss"] + (query - query.detach()).abs().sqrt().sum()}
"""


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_touches_no_weight(what, tiny_bert, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("breaking.py").write_text(BREAKING)
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(20)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model.model_name_or_path": str(tiny_bert),
        "model.loss": "breaking.Breaking",
        "model.loss.what": what,
        "data.train_path": "train.jsonl",
        "data.batch_size": 4,
        "data.shuffle": False,
        "trainer.default_root_dir": "run",
        "trainer.enable_progress_bar": False,
        "checkpoint.every_n_train_steps": 1,
    }
    with pytest.raises(SystemExit) as ended:
        main(["fit", *(f"--{name}={value}" for name, value in flags.items())])
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert f"step 3: the {what} is " in told
    assert "its batch is of train.jsonl:9, train.jsonl:10" in told
    weights = read_weights(Path("run/checkpoints/last.ckpt"))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert read_facts(Path("run/checkpoints/last.ckpt"))["global_step"] == 2


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_scale_that_float16_cannot_hold_ends_no_fit(strategy, tiny_bert, tmp_path):
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model.model_name_or_path": str(tiny_bert),
        "data.train_path": "train.jsonl",
        "data.batch_size": 4,
        "model.lr": 1e-2,
        "trainer.default_root_dir": "run",
        "trainer.precision": "16-mixed",
        "trainer.strategy": strategy,
    }
    # In a process of its own, for DeepSpeed leaves its group behind.
    command = ["fit", *(f"--{name}={value}" for name, value in flags.items())]
    ended = subprocess.run(
        [sys.executable, "-m", "embedtune", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    before, after = (
        SentenceTransformer(str(path), device="cpu").encode(["query 1", "document 2"])
        for path in (tiny_bert, tmp_path / "run" / "model")
    )
    assert abs(after - before).max() > 1e-3


# --- The command line -----------------------------------------------------------------------


def test_a_gpu_is_taken_without_being_asked_for(tiny_bert, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(24)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model.model_name_or_path", str(tiny_bert)]
    with caplog.at_level("INFO"):
        data = ["--data.train_path", "train.jsonl", "--data.batch_size", "4"]
        main(["fit", *model, *data, "--trainer.default_root_dir", "run", "--model.lr", "1e-2"])
    told = " ".join(caplog.text.split())
    assert "device cuda, 1 rank(s)" in told
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it plans anew for the shape of each chunk
    assert "precision bf16-mixed" in told
    assert not Path("run/model/UNVERIFIED").exists()
    trained = ["--model.model_name_or_path", "run/model", "--data.predict_path", "train.jsonl"]
    precise = ["--trainer.precision", "32-true", "--trainer.default_root_dir", "predicted"]
    main(["predict", *trained, *precise])
    found = np.load("predicted/embeddings.npy")
    expected = SentenceTransformer("run/model", device="cpu").encode([r["query"] for r in rows])
    assert abs(found - expected).max() < 1e-5
    main(["teach", "--model", "run/model", "--data", "train.jsonl", "--out", "taught"])
    assert (np.fromfile("taught/embeddings.f32", dtype=np.float32) != 0).all()
