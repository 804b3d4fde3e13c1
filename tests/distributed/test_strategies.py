"""Every strategy gives one process's weights, checkpoints and model, on two real processes.

All runs of two ranks are made by one launch of strategy_cases.py, and those that go on from
their checkpoints on one rank by another; each test compares what they left with the same run in
this process. Stochastic gradient descent shows a wrong gradient
scale; dropout is off, for masks depend on how a batch is divided.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import strategy_cases
import torch
from forks import Ranks, embedtune
from sentence_transformers import SentenceTransformer

from embedtune import InputError, export_checkpoint
from embedtune.checkpoints.find import last_checkpoint
from embedtune.checkpoints.read import read_checkpoint
from embedtune.checkpoints.shards import kind_of
from embedtune.distributed.strategies import named_strategy, refuse_checkpoint
from embedtune.export.rebuild import rebuild

pytestmark = pytest.mark.timeout(600)  # the first test of a fixture waits for all its runs
SHARDED = ["fsdp", "zero3"]
STRATEGIES = ["ddp", *SHARDED]
REPEATED = ["zero1", "zero2"]
"""Which divide less than ZeRO-3 does: with the slow tests alone."""
AGAIN = ["bert-scored", "bert-batch", "bert-cosent", "qwen-pair", "qwen-distill"]
"""So is what ZeRO-3, which takes twice as long as FSDP, does with losses of the others."""
DECODERS = ["zero2", "zero3"]  # what a decoder is trained with, besides a BERT
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
DUPLICATED = {"rows": "duplicated", "count": 8, "data": {"shuffle": False}}
SHARED = {"rows": "shared", "count": 16, "loss": "multi_positive", "data": {"shuffle": False}}
OFFLOADED = "zero3_offload"
ACCUMULATED = {"rows": "scored", "count": 16, "loss": "lists", "batch": 4, "accumulate": 2}
LEFT_OVER = {**ACCUMULATED, "count": 21}  # the epoch ends with a batch of 4 and one of 1
CHECKPOINT = "checkpoints/step=4.ckpt"
RESUMED = {
    "rows": "triplet",
    "count": 24,
    "data": {"neg_nums": 2},
    "epochs": 2,
    "adamw": True,
    "lr": 0.005,
    "checkpoint_every": 4,
}
ROTATED = {**RESUMED, "checkpoint_every": 1, "rotate": True}


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


def single_cases(models: dict[str, dict]) -> dict[str, dict]:
    """Return the runs of one process by name; each strategy makes them too."""
    single: dict[str, dict] = {}
    for model in models:
        for task, settings in TASKS.items():
            case = {"batch": 8, **settings, **models[model]}
            single[f"{model}-{task}"] = case
            adamw = {"adamw": True, "clip": 0.05, "lr": 0.005}
            single[f"{model}-{task}-adamw"] = {**case, **adamw}
    bert = {"batch": 8, **models["bert"]}
    for task, settings in SCORED.items():
        single[f"bert-{task}"] = {**bert, **settings}
    single["accumulated"] = {**models["bert"], **ACCUMULATED}
    single["left_over"] = {**models["bert"], **LEFT_OVER}
    single["half"] = {**bert, **TASKS["distill"], "precision": "bf16-mixed"}
    single["half_scored"] = {**bert, **SCORED["scored"], "precision": "bf16-mixed"}
    single["started"] = {
        **bert,
        **TASKS["distill"],
        "module": {"projection_init": "teacher"},
    }
    single["whole"] = {**bert, **RESUMED}
    # A number of rows that neither ranks nor batches divide.
    single["validated"] = {**bert, **RESUMED, "count": 19, "validate": True}
    single["evaluated"] = {**bert, **TASKS["triplet"], "evaluate": True}
    single["validated_scored"] = {**bert, **SCORED["scored"], "count": 19, "validate": True}
    return {name: {**case, "name": name, "strategy": "auto"} for name, case in single.items()}


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def is_slow(case: str) -> bool:
    """Tell whether the slow tests alone make a run of two ranks."""
    strategy, _, of = case.partition("-")
    base = of.removeprefix("cached-").removesuffix("-adamw")
    return strategy in REPEATED or (strategy == "zero3" and base in AGAIN)


def of_ranks(strategy: str, task: str) -> Any:
    """Return a strategy and a task as parameters of a test."""
    return (slow if is_slow(f"{strategy}-{task}") else pytest.param)(strategy, task)


def two_rank_cases(single: dict[str, dict], strategies: list[str]) -> list[dict]:
    """Return the runs of two ranks."""
    cases = []
    for strategy in strategies:

        def add(base: str, strategy=strategy, name: str | None = None, **changes) -> None:
            name = f"{strategy}-{name or base}"
            cases.append({**single[base], **changes, "name": name, "strategy": strategy})

        for base in single:
            if base == "validated" or (base.startswith("qwen") and strategy not in DECODERS):
                continue
            add(base, **({"export": True} if base in ("bert-pair", "half") else {}))
        add("whole", name="resumed", **{"from": f"{strategy}-whole/{CHECKPOINT}"})
        add("validated", **{"from": f"{strategy}-whole/{CHECKPOINT}"})
        add("whole", name="rotated", **ROTATED)
        for loss in ("pair", "multi_positive", "unmasked"):
            add("bert-pair", name=f"duplicated-{loss}", **DUPLICATED, loss=loss)
        # Padded, unlike the run of one process.
        cached = {"grad_cache": True, "attn_implementation": "sdpa"}
        for base in ("bert-triplet", "bert-distill", "bert-cosent"):
            add(base, name=f"cached-{base}", module={**single[base].get("module", {}), **cached})
        add("half", name="cached-half", module={**single["half"]["module"], "grad_cache": True})
        dropped = {**single["bert-triplet"]["module"], "dropout": 0.2}
        add("bert-triplet", name="dropped", module=dropped)
        add("bert-triplet", name="dropped-cached", module={**dropped, "grad_cache": True})
        if strategy == "ddp":
            add("whole", name="onto_two", **{"from": f"whole/{CHECKPOINT}"})
        if strategy in ("ddp", "fsdp"):
            add("half", name="half16", precision="16-mixed", epochs=4)
    pair = single["bert-pair"]
    cases.append({**pair, "name": f"{OFFLOADED}-bert-pair", "strategy": OFFLOADED, "export": True})
    over_rank = {"data": {"shuffle": False}, "count": 16, "loss": "over_rank"}
    cases.append({**pair, **over_rank, "name": "ddp-over_rank", "strategy": "ddp"})
    distill = {**single["bert-distill"], **over_rank, "loss": "distill_over_rank"}
    cases.append({**distill, "name": "ddp-distill_over_rank", "strategy": "ddp"})
    cases.append({**pair, **SHARED, "name": "ddp-shared", "strategy": "ddp"})
    cases.append({**pair, "name": "ddp-wrong", "strategy": "ddp", "wrong": True})
    return cases


def one_rank_cases(single: dict[str, dict], strategies: list[str]) -> list[dict]:
    """Return the runs of one rank that go on from checkpoints of two."""
    cases = []
    for strategy in strategies[1:]:  # all but ddp
        checkpoint = {"from": f"{strategy}-whole/{CHECKPOINT}", "strategy": strategy}
        cases.append({**single["whole"], **checkpoint, "name": f"{strategy}-onto_one"})
        cases.append({**single["validated"], **checkpoint, "name": f"{strategy}-validated_by_one"})
    return cases


class Runs:
    """The runs of two ranks and of one, and on demand those of this process."""

    def __init__(self, folder: Path, single: dict[str, dict], strategies: list[str]) -> None:
        self.folder, self.single, self.strategies = folder, single, strategies
        self._alone: dict[str, dict] = {}

    def launch(self, ranks: int, cases: list[dict]) -> None:
        """Run cases on a number of ranks, all in one launch."""
        file = self.folder / f"cases-{ranks}.json"
        file.write_text(json.dumps(cases))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EMBEDTUNE_CACHE", str(self.folder / "cache"))
            launched = Ranks(
                strategy_cases.main, self.folder, file, folder=self.folder, ranks=ranks
            )
        assert set(launched.wait(580)) == {0}, launched.output()[-15000:]

    def on_ranks(self, name: str) -> dict:
        """Return the result of rank 0, and the steps and losses of all ranks."""
        found = sorted(self.folder.glob(f"{name}-rank?.pt"))
        ranks = [torch.load(path) for path in found]
        by_rank = {
            f"{key}_by_rank": [rank.get(key) for rank in ranks] for key in ("seen", "losses")
        }
        return {**ranks[0], **by_rank}

    def alone(self, of: str, **changes) -> dict:
        """Return the result of one process."""
        key = f"{of} {changes}"
        if key not in self._alone:
            case = {**self.single[of], **changes}
            self._alone[key] = strategy_cases.run(case, self.folder, ranks=1)
        return self._alone[key]


@pytest.fixture(scope="session")
def runs(models, tmp_path_factory, request) -> Runs:
    single = single_cases(models)
    own = [item for item in request.session.items if item.path == Path(__file__)]
    asked = [item.name for item in own if "runs" in item.fixturenames]
    repeated = [strategy for strategy in REPEATED if any(strategy in name for name in asked)]
    strategies = [*STRATEGIES, *repeated]
    runs = Runs(tmp_path_factory.mktemp("strategies"), single, strategies)
    cases = two_rank_cases(single, strategies)
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        cases = [case for case in cases if not is_slow(case["name"])]
    strategy_cases.write_data(runs.folder, cases)
    runs.alone("whole")  # two ranks go on from it
    for strategy in strategies[1:]:
        for leftover in ("step=2.ckpt.part", "step=3.ckpt.former"):  # of a run that was killed
            (runs.folder / f"{strategy}-rotated/checkpoints" / leftover / "a").mkdir(parents=True)
    runs.launch(2, cases)
    return runs


@pytest.fixture(scope="session")
def onto_one(runs) -> Runs:
    runs.launch(1, one_rank_cases(runs.single, runs.strategies))
    return runs


def movement(result: dict, other: dict) -> float:
    assert result.keys() == other.keys()
    return max((result[name] - other[name]).abs().max().item() for name in result)


def assert_same_weights(result: dict, expected: dict) -> None:
    moved = movement(expected["weights"], expected["start"])
    assert moved > 1e-3
    assert movement(result["start"], expected["start"]) == 0
    assert movement(result["weights"], expected["weights"]) < 1e-4 * moved


def cases_of(tasks: list[str]) -> list:
    bert = [of_ranks(s, f"bert-{task}") for s in (*STRATEGIES, *REPEATED) for task in tasks]
    return bert + [of_ranks(s, f"qwen-{task}") for s in DECODERS for task in tasks if task in TASKS]


# --- One process's weights ------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "task"), cases_of([*TASKS, *SCORED]))
def test_three_steps_of_sgd_give_the_weights_of_one_process(runs, strategy, task):
    assert_same_weights(runs.on_ranks(f"{strategy}-{task}"), runs.alone(task))


@pytest.mark.parametrize(("strategy", "task"), cases_of([*TASKS, *SCORED]))
def test_the_loss_that_is_logged_is_that_of_the_global_batch(runs, strategy, task):
    """Of the last one, of which each rank holds another share."""
    logged = runs.on_ranks(f"{strategy}-{task}")["logged"]
    assert logged == pytest.approx(runs.alone(task)["logged"], rel=1e-3)


@pytest.mark.parametrize(("strategy", "task"), cases_of(list(TASKS)))
def test_so_do_adamw_and_clipping(runs, strategy, task):
    result, expected = runs.on_ranks(f"{strategy}-{task}-adamw"), runs.alone(f"{task}-adamw")
    assert_same_weights(result, expected)
    unclipped = runs.alone(f"{task}-adamw", clip=None)
    assert movement(expected["weights"], unclipped["weights"]) > 1e-4


@pytest.mark.parametrize(
    ("strategy", "task"),
    [
        of_ranks(strategy, f"bert-{task}")
        for strategy in (*STRATEGIES, *REPEATED)
        for task in ("triplet", "distill", "cosent")
    ],
)
def test_so_does_a_gradient_cache(runs, strategy, task):
    assert_same_weights(runs.on_ranks(f"{strategy}-cached-{task}"), runs.alone(task))


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_a_gradient_cache_computes_the_same_in_half_precision(runs, strategy):
    result, expected = runs.on_ranks(f"{strategy}-cached-half"), runs.on_ranks(f"{strategy}-half")
    assert_same_weights(result, expected)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_a_gradient_cache_replays_dropout(runs, strategy):
    expected = runs.on_ranks(f"{strategy}-dropped")
    assert_same_weights(runs.on_ranks(f"{strategy}-dropped-cached"), expected)
    without = runs.on_ranks(f"{strategy}-bert-triplet")
    assert movement(expected["weights"], without["weights"]) > 1e-3


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_so_does_a_start_from_the_teacher(runs, strategy):
    """Which rank 0 alone computes: the directions that few texts leave open are rounding's."""
    assert_same_weights(runs.on_ranks(f"{strategy}-started"), runs.alone("started"))


def test_so_does_offloading_to_the_processor(runs):
    assert_same_weights(runs.on_ranks(f"{OFFLOADED}-bert-pair"), runs.alone("bert-pair"))


def test_a_wrong_factor_in_the_gather_is_seen(runs):
    result, expected = runs.on_ranks("ddp-wrong"), runs.alone("bert-pair")
    moved = movement(expected["weights"], expected["start"])
    assert movement(result["start"], expected["start"]) == 0
    assert movement(result["weights"], expected["weights"]) > 100 * 1e-4 * moved


def test_positives_of_other_batches_are_known_on_each_rank(runs):
    result, expected = runs.on_ranks("ddp-shared"), runs.alone("bert-pair", **SHARED)
    assert_same_weights(result, expected)
    unaware = runs.alone("bert-pair", **{**SHARED, "loss": "unmasked"})
    assert movement(unaware["weights"], expected["weights"]) > 1e-3


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_accumulated_batches_equal_one(runs, strategy):
    result = runs.on_ranks(f"{strategy}-accumulated")
    assert_same_weights(result, runs.alone("accumulated"))
    assert_same_weights(result, runs.alone("accumulated", batch=8, accumulate=1))


@pytest.mark.parametrize(
    ("name", "task", "loss"),
    [
        ("ddp-over_rank", "bert-pair", "pair"),
        ("ddp-distill_over_rank", "bert-distill", "distill_over_rank"),
    ],
)
def test_a_loss_over_each_rank_is_that_of_accumulated_batches(runs, name, task, loss):
    settings = {"data": {"shuffle": False}, "count": 16, "loss": loss}
    expected = runs.alone(task, **settings, batch=4, accumulate=2)
    assert_same_weights(runs.on_ranks(name), expected)
    together = runs.alone(task, **settings)
    assert movement(expected["weights"], together["weights"]) > 1e-3


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_what_is_left_at_the_end_of_an_epoch_is_a_step_of_its_queries(runs, strategy):
    result = runs.on_ranks(f"{strategy}-left_over")
    assert_same_weights(result, runs.alone("left_over"))
    one = runs.alone("left_over", batch=8, accumulate=1)
    assert_same_weights(result, one)
    assert result["logged"] == pytest.approx(one["logged"], rel=1e-3)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_a_rank_holds_no_more_than_its_share(runs, strategy):
    task = "bert-pair-adamw"
    held, whole = runs.on_ranks(f"{strategy}-{task}")["held"], runs.alone(task)["held"]
    assert whole["states"] == 2 * whole["parameters"]
    shares = {
        "parameters": 1 if strategy in ("ddp", "zero1", "zero2") else 1 / 2,
        "states": 1 if strategy == "ddp" else 1 / 2,
    }
    for name, share in shares.items():
        assert held[name] == pytest.approx(share * whole[name], rel=0.02), name  # padding


# --- The same examples ----------------------------------------------------------------------


def joined(seen_by_rank: list) -> list:
    return [
        [pair for ids, negatives, _ in step for pair in zip(ids, negatives, strict=True)]
        for step in zip(*seen_by_rank, strict=True)
    ]


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_two_ranks_see_the_examples_and_negatives_of_one(runs, strategy):
    together = joined(runs.on_ranks(f"{strategy}-bert-triplet")["seen_by_rank"])
    alone = joined([runs.alone("bert-triplet")["seen"]])
    assert together == alone
    ids = [example for step in alone for example, _ in step]
    assert sorted(ids) == list(range(17)) != ids


# --- A document of the other rank is the same ------------------------------------------------


@pytest.mark.parametrize("loss", ["pair", "multi_positive"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_a_duplicate_on_the_other_rank_is_no_negative(runs, strategy, loss):
    result = runs.on_ranks(f"{strategy}-duplicated-{loss}")
    given = [{example for step in rank for example in step[0]} for rank in result["seen_by_rank"]]
    assert given == [{0, 1, 2, 3}, {4, 5, 6, 7}]  # example i and i + 4 share a document
    expected = runs.alone("bert-pair", **DUPLICATED, loss=loss)
    (one_process,) = expected["losses"]
    assert mean_loss(result) == pytest.approx(one_process, rel=1e-5)
    assert_same_weights(result, expected)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_without_the_mask_it_would_be(runs, strategy):
    result = runs.on_ranks(f"{strategy}-duplicated-unmasked")
    masked = runs.alone("bert-pair", **DUPLICATED, loss="pair")
    assert mean_loss(result) > masked["losses"][0] + 0.1
    moved = movement(masked["weights"], masked["start"])
    assert movement(result["weights"], masked["weights"]) > 0.05 * moved
    assert_same_weights(result, runs.alone("bert-pair", **DUPLICATED, loss="unmasked"))


def mean_loss(result: dict) -> float:
    """Return the loss of the one step over all ranks."""
    return sum(losses[0] for losses in result["losses_by_rank"]) / len(result["losses_by_rank"])


# --- Half precision -------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["half", "half_scored"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_half_precision_rounds_no_teacher_score_or_loss(runs, strategy, task):
    result, expected = runs.on_ranks(f"{strategy}-{task}"), runs.alone(task, precision="32-true")
    assert result["precisions"] == {"torch.float32"}
    found = [numbers for rank in result["seen_by_rank"] for numbers in rank[0][2:]]
    assert torch.equal(torch.cat(found), expected["seen"][0][2])
    moved = movement(expected["weights"], expected["start"])
    assert movement(result["weights"], expected["weights"]) < 0.2 * moved
    trained = {k: v for k, v in result["weights"].items() if "pooler" not in k}  # it is frozen
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_float16_scales_its_gradients_and_trains(runs, strategy):
    result, expected = (runs.on_ranks(f"{strategy}-{name}") for name in ("half16", "half"))
    moved = movement(expected["weights"], expected["start"])
    # The first scales are too large by design: steps are left out until one fits.
    assert movement(result["weights"], result["start"]) > 0.2 * moved
    assert all(tensor.isfinite().all() for tensor in result["weights"].values())


# --- Checkpoints and exports ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_uninterrupted_one(runs, strategy):
    whole, resumed = (runs.on_ranks(f"{strategy}-{name}") for name in ("whole", "resumed"))
    assert joined(resumed["seen_by_rank"]) == joined(whole["seen_by_rank"])[4:]
    assert len(joined(resumed["seen_by_rank"])) == 2
    assert movement(resumed["weights"], whole["weights"]) == 0


@pytest.mark.parametrize("strategy", [*SHARDED, *map(slow, REPEATED)])
def test_a_run_of_two_ranks_goes_on_on_one(onto_one, strategy):
    result, whole = onto_one.on_ranks(f"{strategy}-onto_one"), onto_one.alone("whole")
    assert joined(result["seen_by_rank"]) == joined([whole["seen"]])[4:]
    assert_same_weights(result, whole)


def test_so_does_a_run_of_two_under_ddp(runs):
    result = runs.alone("whole", **{"from": f"ddp-whole/{CHECKPOINT}"})
    whole = runs.alone("whole")
    assert joined([result["seen"]]) == joined([whole["seen"]])[4:]
    assert_same_weights(result, whole)


def test_a_run_of_one_process_goes_on_on_two(runs):
    result, whole = runs.on_ranks("ddp-onto_two"), runs.alone("whole")
    assert joined(result["seen_by_rank"]) == joined([whole["seen"]])[4:]
    assert_same_weights(result, whole)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_a_checkpoint_is_validated_on_any_number_of_ranks(onto_one, strategy):
    loss = "val/triplet-19/loss"
    expected = onto_one.alone("validated", **{"from": f"ddp-whole/{CHECKPOINT}"})[loss]
    assert expected != pytest.approx(onto_one.alone("validated")[loss], rel=0.01)
    names = ["validated", "validated_by_one"] if strategy != "ddp" else ["validated"]
    for name in names:
        found = onto_one.on_ranks(f"{strategy}-{name}")[loss]
        assert found == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_ranks_validate_scored_rows_together(runs, strategy):
    found, expected = runs.on_ranks(f"{strategy}-validated_scored"), runs.alone("validated_scored")
    for name in ("val/scored-19/loss", "val/scored-19/spearman"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_ranks_evaluate_test_sets_together(runs, strategy):
    found, expected = runs.on_ranks(f"{strategy}-evaluated"), runs.alone("evaluated")
    assert {"val/docs/ndcg@10", "val/docs/map@100/8", "val/pairs/spearman/8"} < set(found["base"])
    for moment in ("base", "metrics"):
        assert found[moment].keys() == expected[moment].keys()
        # Trained weights differ by rounding, which decides between documents that are nearly tied.
        close = {"rel": 1e-6} if moment == "base" else {"abs": 1e-4}
        assert found[moment] == pytest.approx(expected[moment], **close), moment
    scores = {name for name in found["base"].keys() & found["metrics"] if "/loss" not in name}
    assert found["intervals"].keys() == scores
    for name, ends in found["intervals"].items():
        assert ends == pytest.approx(expected["intervals"][name], abs=1e-4), name
    assert found["metrics"]["val/docs/ndcg@10"] != pytest.approx(found["base"]["val/docs/ndcg@10"])


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_rotation_leaves_the_last_checkpoint(runs, strategy):
    folder = runs.folder / f"{strategy}-rotated" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step=6.ckpt", "last.ckpt"}
    assert (folder / "last.ckpt").resolve() == folder.resolve() / "step=6.ckpt"
    assert last_checkpoint(folder) == folder / "last.ckpt"
    (folder / "last.ckpt").unlink()  # as if killed before it was linked anew
    assert last_checkpoint(folder) == folder / "step=6.ckpt"


@pytest.mark.parametrize("strategy", [*STRATEGIES, *map(slow, REPEATED)])
def test_a_checkpoint_is_read_without_its_processes(runs, strategy, tmp_path):
    path = runs.folder / f"{strategy}-whole" / CHECKPOINT
    kind = {"ddp": "file", "fsdp": "fsdp"}.get(strategy, "zero")
    assert kind_of(path) == kind
    spec, weights = read_checkpoint(path)
    whole = runs.alone("whole")
    expected = read_checkpoint(runs.folder / "whole" / CHECKPOINT).weights
    moved = movement(expected, whole["start"])
    assert movement(weights, expected) < 1e-4 * moved
    assert movement(expected, whole["weights"]) > 0.01 * moved  # which were saved later
    assert export_checkpoint(path, tmp_path / "model") <= 1e-5
    assert rebuild(spec, weights, "checkpoint").width == 32


@pytest.mark.parametrize("strategy", [*SHARDED, *map(slow, REPEATED)])
def test_a_checkpoint_without_the_part_of_a_rank_is_an_error(runs, strategy, tmp_path):
    path = tmp_path / "part.ckpt"
    shutil.copytree(runs.folder / f"{strategy}-whole" / CHECKPOINT, path)
    (lost,) = path.glob("__1_*" if strategy == "fsdp" else "*/*_rank_1_*_optim_states.pt")
    lost.unlink()
    with pytest.raises(InputError, match=r"part\.ckpt: cannot read all of its weights: "):
        export_checkpoint(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("strategy", [*SHARDED, *map(slow, REPEATED)])
def test_placeholders_are_no_weights(runs, strategy):
    """What ZeRO-3 leaves in place of a divided parameter has no elements."""
    spec, weights = read_checkpoint(runs.folder / f"{strategy}-whole" / CHECKPOINT)
    name = next(iter(weights))
    with pytest.raises(InputError, match=rf"run: .*{name}: expected \(.*\), found \(0,\)"):
        rebuild(spec, {**weights, name: torch.empty(0)}, "run")
    del weights[name]
    with pytest.raises(InputError, match=rf"run: .*{name}: expected \(.*\), found none"):
        rebuild(spec, weights, "run")


def test_a_stage_that_divides_otherwise_is_told(runs):
    path = runs.folder / "zero3-whole" / CHECKPOINT
    for strategy in ("zero3", OFFLOADED):
        refuse_checkpoint(named_strategy(strategy), path)
    with pytest.raises(InputError, match="found ZeRO stage 1;"):
        refuse_checkpoint(named_strategy("zero1"), path)


@pytest.mark.slow
def test_stages_1_and_2_divide_weights_alike(runs):
    path = runs.folder / "zero2-whole" / CHECKPOINT
    for strategy in REPEATED:
        refuse_checkpoint(named_strategy(strategy), path)
    with pytest.raises(InputError, match="found ZeRO stage 3;"):
        refuse_checkpoint(named_strategy("zero3"), path)


def test_exported_models_encode_alike(runs):
    names = [*runs.strategies, OFFLOADED]
    folders = [runs.folder / f"{name}-bert-pair" / "model" for name in names]
    runs.alone("bert-pair", name="alone", export=True)
    folders.append(runs.folder / "alone" / "model")
    found = [SentenceTransformer(str(f), device="cpu").encode(PROBES) for f in folders]
    base = SentenceTransformer(runs.single["bert-pair"]["model"], device="cpu").encode(PROBES)
    assert abs(found[0] - base).max() > 1e-3
    for folder, embeddings in zip(folders, found, strict=True):
        assert abs(embeddings - found[-1]).max() < 1e-5, folder
        assert not (folder / "UNVERIFIED").exists()


MRL = ("--model.use_mrl=true", "--model.mrl_dims=8,16")


@pytest.mark.parametrize(
    ("strategy", "saved", "own", "message"),
    [
        ("fsdp", (), MRL, "of shape .*, found none"),
        ("fsdp", MRL, (), "none, found of shape"),
        ("zero2", (), MRL, "of shape .*, found none"),
        ("zero3", MRL, (), "none, found of shape"),
    ],
)
def test_a_fit_does_not_go_on_with_other_weights_in_shards(
    tmp_path, tiny_bert, strategy, saved, own, message
):
    """Of which torch names one after a traceback of 100 lines, or none."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"query": "q {i}", "pos": ["p {i}"]}}\n' for i in range(4)))
    given = ["fit", f"--model.model_name_or_path={tiny_bert}", f"--data.train_path={rows}"]
    given += ["--data.batch_size=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]

    def fit(*more: str) -> tuple[int | None, str]:
        flags = [*given, f"--trainer.strategy={strategy}", *more]
        rank = Ranks(embedtune, flags, folder=tmp_path)
        (code,) = rank.wait()
        return code, rank.output()

    code, output = fit("--trainer.max_steps=1", *saved)
    assert code == 0, output
    code, output = fit("--trainer.max_steps=2", "--ckpt_path=last", *own)
    assert code == 2, output
    named = rf"error: ckpt_path: .*linear\.\w+ {message}.*; give .*model.use_mrl"
    assert re.search(named, output), output


COUNTING = """
import torch
from embedtune.losses import InfoNCE


class Counting(InfoNCE):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, embeddings, target):
        self.count += 100 * self.training
        return {"loss": super().forward(embeddings, target)["loss"] + self.count}
"""


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_buffers_of_a_loss_are_measured_with(tmp_path, tiny_bert, strategy):
    (tmp_path / "counting.py").write_text(COUNTING)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"query": "q {i}", "pos": ["p {i}"]}}\n' for i in range(4)))
    given = [f"--model.model_name_or_path={tiny_bert}", f"--data.val_path={rows}"]
    given += ["--model.loss=counting.Counting", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    given += ["--data.batch_size=2", f"--trainer.strategy={strategy}", "--ckpt_path=last"]
    for command in (["fit", f"--data.train_path={rows}", "--trainer.max_steps=2"], ["validate"]):
        rank = Ranks(embedtune, [*command, *given], folder=tmp_path)
        assert rank.wait() == [0], rank.output()
    (loss,) = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"].values()
    assert 200 < loss < 210
