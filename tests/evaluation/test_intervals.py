"""Paired bootstrap intervals against scipy's own, and where there is nothing to tell."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, rankdata

from embedtune.data.beir import RetrievalSet
from embedtune.evaluation import intervals as module
from embedtune.evaluation.intervals import FEWEST, RESAMPLES, SEED, PerQuery, intervals, outcome
from embedtune.evaluation.measure import measure
from embedtune.evaluation.metrics import spearman


def rand(count: int, seed: int, levels: int | None = None) -> torch.Tensor:
    found = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return found if levels is None else (found * levels).round() / levels


def by_scipy(statistic, *samples: torch.Tensor) -> tuple[float, float]:
    """Draw as ``intervals`` does, and compute the statistic of what was drawn."""
    found = bootstrap(
        [sample.double().numpy() for sample in samples],
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def correlation(x, y, axis):
    ranks = [rankdata(side, axis=axis) for side in (x, y)]
    a, b = (side - side.mean(axis, keepdims=True) for side in ranks)
    return (a * b).sum(axis) / np.sqrt((a**2).sum(axis) * (b**2).sum(axis))


@pytest.mark.parametrize("drawn", [1, 2**18])
def test_an_interval_is_that_of_the_mean_difference_of_all_draws(drawn, monkeypatch):
    monkeypatch.setattr(module, "DRAWN", drawn)  # several blocks, or one
    base = {name: rand(40, seed) for seed, name in enumerate(["ndcg@10", "mrr@10/8"])}
    other = {name: values + 0.3 * rand(40, 9) for name, values in base.items()}
    found = intervals(PerQuery(base), PerQuery(other))
    assert list(found) == ["ndcg@10", "mrr@10/8"]
    for name in found:
        expected = by_scipy(lambda a, b, axis: (b - a).mean(axis), base[name], other[name])
        assert found[name] == pytest.approx(expected, abs=1e-12 if drawn > 1 else 0.01)
        low, high = found[name]
        assert 0 < low < (other[name] - base[name]).mean() < high


@pytest.mark.parametrize("levels", [None, 4])
def test_pairs_are_drawn_for_spearman(levels):
    scores = rand(24, 0, 5).double()
    base, other = rand(24, 1, levels), scores.float() + rand(24, 2, levels)
    found = intervals(PerQuery({"spearman": base}, scores), PerQuery({"spearman": other}, scores))
    expected = by_scipy(
        lambda a, b, c, axis: correlation(b, c, axis) - correlation(a, c, axis),
        *(base, other, scores),
    )
    assert found["spearman"] == pytest.approx(expected, abs=1e-12)
    low, high = found["spearman"]
    assert low < spearman(other, scores) - spearman(base, scores) < high


@pytest.mark.parametrize("count", [1, 2, FEWEST, 100])
@pytest.mark.parametrize("scores", [None, 0, 1])
def test_models_that_do_the_same_are_equal(count, scores):
    given = None if scores is None else rand(count, 5, scores or None).double()
    values = {"a": rand(count, 0), "b": torch.zeros(count)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = intervals(PerQuery(values, given), PerQuery(dict(values), given))
    assert found == {"a": (0.0, 0.0), "b": (0.0, 0.0)}
    assert {outcome(ends) for ends in found.values()} == {"equal"}


def test_similarities_of_the_same_order_are_equal():
    scores, base = rand(50, 0).double(), rand(50, 1)
    found = intervals(PerQuery({"a": base}, scores), PerQuery({"a": base.exp()}, scores))
    assert found == {"a": (0.0, 0.0)}


@pytest.mark.parametrize("scored", [False, True])
def test_few_queries_have_no_interval(scored):
    """Even where all of them rose."""
    for count in (1, 2, FEWEST - 1):
        base, scores = rand(count, 0), rand(count, 1).double() if scored else None
        other = base + 0.5 if not scored else scores.float()
        found = intervals(PerQuery({"a": base}, scores), PerQuery({"a": other}, scores))
        assert found == {} or found == {"a": (0.0, 0.0)}  # one pair, or two, may have one order
        assert outcome(found.get("a")) in ("unclear", "equal")
    base = torch.zeros(FEWEST)
    assert outcome(intervals(PerQuery({"a": base}), PerQuery({"a": base + 0.5}))["a"]) == "better"


@pytest.mark.parametrize("constant", ["scores", "base", "other"])
def test_what_is_constant_has_a_correlation_of_0_in_every_draw(constant):
    given = {"scores": rand(30, 0).double(), "base": rand(30, 1), "other": rand(30, 2)}
    given[constant] = torch.full_like(given[constant], 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = intervals(
            PerQuery({"a": given["base"]}, given["scores"]),
            PerQuery({"a": given["other"]}, given["scores"]),
        )
    low, high = found["a"]
    assert (low, high) == (0, 0) if constant == "scores" else low < 0 < high


def test_no_verdict_follows_from_rounding():
    """The lower end is of a draw in which rises and falls of reciprocal ranks cancel each other."""
    ranks = torch.tensor(
        [[2, 9, 12, 2, 8, 3, 7, 6, 8, 9, 8, 4], [3, 3, 3, 1, 8, 3, 7, 6, 2, 9, 8, 4]]
    )
    data = RetrievalSet([""] * 12, [""] * 12, [{0: 1}] * 12, [""] * 12, list("abcdefghijkl"), "")
    found = []
    for of_model in ranks:
        queries = -torch.arange(12.0).repeat(12, 1)  # the others in their order, and the relevant
        queries[:, 0] = 0.5 - of_model  # one at its rank
        measured = measure(data, queries, torch.eye(12), {"": 12}, torch.device("cpu"))
        found.append(measured.per_query)
    low, high = intervals(*found)["mrr@10"]
    assert low == 0
    assert high > 0.2
    swapped = intervals(*reversed(found))["mrr@10"]
    assert str(swapped[1]) == "0.0"  # without a minus


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_has_none(value):
    broken = rand(30, 1)
    broken[4] = value
    values = {"broken": rand(30, 0), "fine": rand(30, 0)}
    other = {"broken": broken, "fine": rand(30, 2)}
    assert list(intervals(PerQuery(values), PerQuery(other))) == ["fine"]
    assert list(intervals(PerQuery(other), PerQuery(values))) == ["fine"]
    scores = broken.double()
    assert intervals(PerQuery(values, scores), PerQuery(other, scores)) == {}


def test_what_only_one_of_them_has_is_left_out():
    base, other = {"a": rand(9, 0), "a/8": rand(9, 1)}, {"a/8": rand(9, 2), "a/64": rand(9, 3)}
    assert list(intervals(PerQuery(base), PerQuery(other))) == ["a/8"]
    assert intervals(PerQuery({}), PerQuery(other)) == {}


def test_they_are_the_same_again_and_draw_from_no_shared_generator():
    base, other = PerQuery({"a": rand(50, 0)}), PerQuery({"a": rand(50, 1)})
    found = intervals(base, other)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert intervals(base, other) == found
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002


def test_19_of_20_intervals_hold_the_true_difference():
    """Of 400 sets of 60 queries whose models are equally good."""
    generator = np.random.default_rng(3)
    values = {str(i): torch.from_numpy(generator.beta(0.5, 0.5, 60)) for i in range(800)}
    base = PerQuery({str(i): values[str(i)] for i in range(400)})
    other = PerQuery({str(i): values[str(i + 400)] for i in range(400)})
    found = intervals(base, other)
    clear = sum(outcome(ends) in ("better", "worse") for ends in found.values())
    assert 0.03 < clear / 400 < 0.08
