"""Every strategy gives one process's weights, checkpoints and model, on two real processes.

All runs of two ranks are trained once, by one `torchrun` of strategy_cases.py; each test compares
what it left with the same run in this process. Stochastic gradient descent shows a wrong gradient
scale; dropout is off, for masks depend on how a batch is divided.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import strategy_cases
import torch
from sentence_transformers import SentenceTransformer

from embedtune import export_checkpoint
from embedtune.checkpoint import kind_of, read_checkpoint
from embedtune.export import rebuild

STRATEGIES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
SHARDED = ["fsdp", "zero1", "zero2", "zero3"]
PROBES = ["a b c", "one longer text of several words", "1 2 3"]
# The last global batch of 19 examples is ragged; that of 17 leaves a rank without any.
TASKS = {
    "pair": {"rows": "pair", "count": 19},
    "triplet": {
        "rows": "triplet",
        "count": 17,
        "data": {"neg_nums": 2},
        "module": {"use_mrl": True, "mrl_dims": [8, 40]},
    },
    "distill": {
        "rows": "distill",
        "count": 19,
        "module": {"use_mrl": True, "mrl_dims": [8, 24]},
    },
}
SCORED = {
    "scored": {"rows": "scored", "count": 17},
    "batch": {"rows": "scored", "count": 17, "loss": "batch"},
    "cosent": {"rows": "scored", "count": 17, "loss": "cosent"},
}
ACCUMULATED = {"rows": "scored", "count": 16, "batch": 4, "accumulate": 2}
LEFT_OVER = {**ACCUMULATED, "count": 20}  # the epoch ends with a single batch
RESUMED = {
    "rows": "triplet",
    "count": 24,
    "data": {"neg_nums": 2},
    "epochs": 2,
    "adamw": True,
    "lr": 0.005,
    "checkpoint_every": 4,
}


@pytest.fixture(scope="session")
def models(tiny_bert, tiny_qwen, tmp_path_factory) -> dict[str, dict]:
    """Return what a case says of a model: a BERT without dropout and a decoder."""
    bert = tmp_path_factory.mktemp("models") / "bert"
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(model[0].auto_model.config, name, 0.0)
    model.save_pretrained(str(bert))
    return {
        "bert": {"model": str(bert), "lr": 0.1},
        "qwen": {"model": str(tiny_qwen), "pooling": "lasttoken", "lr": 0.1},
    }


def make_cases(models: dict[str, dict]) -> dict[str, dict]:
    """Return all runs by name; those of two ranks name their strategy."""
    single: dict[str, dict] = {}
    for model in models:
        for task, settings in TASKS.items():
            case = {"batch": 8, **settings, **models[model]}
            single[f"{model}-{task}"] = case
            adamw = {"adamw": True, "clip": 0.05, "lr": 0.005}
            single[f"{model}-{task}-adamw"] = {**case, **adamw}
    for task, settings in SCORED.items():
        single[f"bert-{task}"] = {"batch": 8, **settings, **models["bert"]}
    single["accumulated"] = {**ACCUMULATED, **models["bert"]}
    single["left_over"] = {**LEFT_OVER, **models["bert"]}
    single["half"] = {"batch": 8, **TASKS["distill"], **models["bert"], "precision": "bf16-mixed"}
    single["whole"] = {"batch": 8, **models["bert"], **RESUMED}
    cases = {name: {**case, "name": name, "strategy": "auto"} for name, case in single.items()}
    for strategy in STRATEGIES:
        for name, case in single.items():
            if not name.startswith("qwen") or strategy in ("zero2", "zero3"):
                shown = {"export": True} if name in ("bert-pair", "half") else {}
                case = {**case, **shown, "name": f"{strategy}-{name}", "strategy": strategy}
                cases[case["name"]] = case
        whole = cases[f"{strategy}-whole"]
        checkpoint = f"{strategy}-whole/checkpoints/step=4.ckpt"
        resumed = {**whole, "name": f"{strategy}-resumed", "resume": checkpoint}
        cases[resumed["name"]] = resumed
    wrong = {"name": "ddp-wrong", "strategy": "ddp", "wrong": True}
    cases["ddp-wrong"] = {**single["bert-pair"], "batch": 8, **wrong}
    return cases


class Runs:
    """The runs of two ranks, and on demand the same in this process."""

    def __init__(self, folder: Path, cases: dict[str, dict]) -> None:
        self.folder, self.cases = folder, cases
        self._single: dict[str, dict] = {}

    def on_ranks(self, name: str) -> dict:
        """Return the result of rank 0, and the steps of both ranks."""
        ranks = [torch.load(self.folder / f"{name}-rank{rank}.pt") for rank in (0, 1)]
        return {**ranks[0], "seen_by_rank": [rank["seen"] for rank in ranks]}

    def alone(self, of: str, **changes) -> dict:
        """Return the result of one process."""
        key = f"{of} {changes}"
        if key not in self._single:
            case = {**self.cases[of], **changes}
            self._single[key] = strategy_cases.train(case, self.folder, ranks=1)
        return self._single[key]


@pytest.fixture(scope="session")
def runs(models, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("strategies")
    cases = make_cases(models)
    strategy_cases.write_data(folder, list(cases.values()))
    of_ranks = [case for case in cases.values() if case["strategy"] != "auto"]
    (folder / "cases.json").write_text(json.dumps(of_ranks))
    script = Path(strategy_cases.__file__)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "EMBEDTUNE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return Runs(folder, cases)


def movement(result: dict, other: dict) -> float:
    assert result.keys() == other.keys()
    return max((result[name] - other[name]).abs().max().item() for name in result)


def assert_same_weights(result: dict, expected: dict) -> None:
    moved = movement(expected["weights"], expected["start"])
    assert moved > 1e-3
    assert movement(result["start"], expected["start"]) == 0
    assert movement(result["weights"], expected["weights"]) < 1e-4 * moved


def cases_of(tasks: list[str]) -> list[tuple[str, str]]:
    return [(strategy, f"bert-{task}") for strategy in STRATEGIES for task in tasks] + [
        (strategy, f"qwen-{task}")
        for strategy in ("zero2", "zero3")
        for task in tasks
        if task in TASKS
    ]


# --- One process's weights ------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "task"), cases_of([*TASKS, *SCORED]))
def test_three_steps_of_sgd_give_the_weights_of_one_process(runs, strategy, task):
    assert_same_weights(runs.on_ranks(f"{strategy}-{task}"), runs.alone(task))


@pytest.mark.parametrize(("strategy", "task"), cases_of(list(TASKS)))
def test_so_do_adamw_and_clipping(runs, strategy, task):
    result, expected = runs.on_ranks(f"{strategy}-{task}-adamw"), runs.alone(f"{task}-adamw")
    assert_same_weights(result, expected)
    unclipped = runs.alone(f"{task}-adamw", clip=None)
    assert movement(expected["weights"], unclipped["weights"]) > 1e-4


def test_a_wrong_factor_in_the_gather_is_seen(runs):
    with pytest.raises(AssertionError):
        assert_same_weights(runs.on_ranks("ddp-wrong"), runs.alone("bert-pair"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulated_batches_equal_one(runs, strategy):
    result = runs.on_ranks(f"{strategy}-accumulated")
    assert_same_weights(result, runs.alone("accumulated"))
    assert_same_weights(result, runs.alone("accumulated", batch=8, accumulate=1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_left_at_the_end_of_an_epoch_is_stepped_with(runs, strategy):
    assert_same_weights(runs.on_ranks(f"{strategy}-left_over"), runs.alone("left_over"))


# --- The same examples ----------------------------------------------------------------------


def joined(seen_by_rank: list) -> list:
    return [
        [pair for ids, negatives, _ in step for pair in zip(ids, negatives, strict=True)]
        for step in zip(*seen_by_rank, strict=True)
    ]


def test_two_ranks_see_the_examples_and_negatives_of_one(runs):
    together = joined(runs.on_ranks("ddp-bert-triplet")["seen_by_rank"])
    alone = joined([runs.alone("bert-triplet")["seen"]])
    assert together == alone
    ids = [example for step in alone for example, _ in step]
    assert sorted(ids) == list(range(17)) != ids


# --- Half precision -------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_rounds_no_teacher_and_trains(runs, strategy):
    result, expected = runs.on_ranks(f"{strategy}-half"), runs.alone("half", precision="32-true")
    teachers = [teacher for ids, _, teacher in result["seen"] if ids]
    given = expected["seen"][0][2][: len(teachers[0])]
    assert teachers[0].dtype == torch.float32
    assert torch.equal(teachers[0], given)
    moved = movement(expected["weights"], expected["start"])
    assert movement(result["weights"], expected["weights"]) < 0.2 * moved
    assert all(tensor.dtype == torch.float32 for tensor in result["weights"].values())


# --- Checkpoints and exports ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_uninterrupted_one(runs, strategy):
    whole, resumed = (runs.on_ranks(f"{strategy}-{name}") for name in ("whole", "resumed"))
    assert joined(resumed["seen_by_rank"]) == joined(whole["seen_by_rank"])[4:]
    assert len(joined(resumed["seen_by_rank"])) == 2
    assert movement(resumed["weights"], whole["weights"]) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_is_read_without_its_processes(runs, strategy, tmp_path):
    path = runs.folder / f"{strategy}-whole" / "checkpoints" / "step=4.ckpt"
    kind = {"ddp": "file", "fsdp": "fsdp"}.get(strategy, "zero")
    assert kind_of(path) == kind
    spec, weights = read_checkpoint(path)
    expected = runs.alone("whole", epochs=1, checkpoint_every=3)
    assert movement(weights, expected["weights"]) > 1e-3  # that was a step earlier
    assert export_checkpoint(path, tmp_path / "model") <= 1e-5
    assert rebuild(spec, weights, "checkpoint").width == 32


def test_exported_models_encode_alike(runs):
    folders = [runs.folder / f"{strategy}-bert-pair" / "model" for strategy in STRATEGIES]
    runs.alone("bert-pair", name="alone", export=True)
    folders.append(runs.folder / "alone" / "model")
    found = [SentenceTransformer(str(f), device="cpu").encode(PROBES) for f in folders]
    base = SentenceTransformer(runs.cases["bert-pair"]["model"], device="cpu").encode(PROBES)
    assert abs(found[0] - base).max() > 1e-3
    for folder, embeddings in zip(folders, found, strict=True):
        assert abs(embeddings - found[-1]).max() < 1e-5, folder
        assert not (folder / "UNVERIFIED").exists()
