"""Every measure against sentence-transformers' evaluators, scikit-learn, scipy and plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.util import cos_sim
from sklearn.metrics import ndcg_score

from embedtune.evaluation.metrics import DEPTH, RETRIEVAL_METRICS, ndcg, retrieval_metrics, spearman
from embedtune.evaluation.search import search
from embedtune.losses.similarity import pairwise_cosine


def embeddings(count, tied, seed):
    """With ``tied`` the vertices of a cube: lengths and cosines are exact, and most are shared."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, 16, generator=generator)
    return made.sign() if tied else made


def judgements(queries, documents, highest=1, seed=2):
    """From one relevant document to nearly 100: beyond, MAP@100 differs from trec_eval's."""
    generator = np.random.default_rng(seed)
    sizes = [1, 2, 5, 40, 90]
    chosen = [generator.permutation(documents)[: sizes[i % 5]] for i in range(queries)]
    return [{int(d): int(generator.integers(1, highest + 1)) for d in row} for row in chosen]


class Precomputed(InformationRetrievalEvaluator):
    """sentence-transformers' evaluator of embeddings that are there already."""

    def embed_inputs(self, model, sentences, encode_fn_name=None, **kwargs):
        return model[encode_fn_name][[int(name) for name in sentences]]


def by_sentence_transformers(queries, documents, relevant):
    ids = [f"{row:05}" for row in range(len(documents))]  # equal scores are ordered by the id
    evaluator = Precomputed(
        queries={str(i): str(i) for i in range(len(queries))},
        corpus={name: name for name in ids},
        relevant_docs={str(i): {ids[row] for row in rows} for i, rows in enumerate(relevant)},
        precision_recall_at_k=[100],
        score_functions={"cosine": cos_sim},
        corpus_chunk_size=70,
        write_csv=False,
    )
    embedded = {"query": queries, "document": documents}
    found = evaluator.compute_all_metrics(embedded)["cosine"]
    split = {name: name.split("@") for name in RETRIEVAL_METRICS}
    return {name: float(found[f"{metric}@k"][int(k)]) for name, (metric, k) in split.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("documents", [200, 30])
def test_retrieval_metrics_equal_those_of_sentence_transformers(tied, documents):
    q, d = embeddings(40, tied, seed=0), embeddings(documents, tied, seed=1)
    relevant = judgements(len(q), documents)
    found = search(q, d, torch.arange(documents), DEPTH)
    metrics = retrieval_metrics(found.rows, relevant)
    assert list(metrics) == list(RETRIEVAL_METRICS)
    assert metrics == pytest.approx(by_sentence_transformers(q, d, relevant), abs=1e-6)
    assert min(metrics.values()) > 0
    if tied:
        assert (found.scores[:, 1:] == found.scores[:, :-1]).float().mean() > 0.2


def graded_by_loops(ranking, grades, k):
    gained = sum(grades.get(d, 0) / math.log2(i + 2) for i, d in enumerate(ranking[:k]))
    best = sorted(grades.values(), reverse=True)[:k]
    return gained / sum(grade / math.log2(i + 2) for i, grade in enumerate(best))


@pytest.mark.parametrize("k", [1, 10, 60])
def test_graded_ndcg_equals_loops_and_scikit_learn(k):
    q, d = embeddings(25, False, seed=3), embeddings(120, False, seed=4)
    relevant = judgements(len(q), len(d), highest=4)
    scores = cos_sim(q, d)
    found = search(q, d, torch.arange(len(d)), k=50).rows
    looped = [
        graded_by_loops(rows[:50], grades, k)
        for rows, grades in zip(scores.argsort(descending=True).tolist(), relevant, strict=True)
    ]
    torch.testing.assert_close(ndcg(found, relevant, k), torch.tensor(looped, dtype=torch.float64))
    if k <= 50:
        truth = np.zeros(scores.shape)
        for i, grades in enumerate(relevant):
            truth[i, list(grades)] = list(grades.values())
        expected = ndcg_score(truth, scores.numpy(), k=k, ignore_ties=True)
        assert ndcg(found, relevant, k).mean().item() == pytest.approx(expected, abs=1e-9)


def test_ndcg_in_closed_form():
    best_last = ndcg(torch.tensor([[0, 1, 2]]), [{1: 1, 2: 3}])
    assert best_last.item() == pytest.approx(
        (1 / math.log2(3) + 3 / math.log2(4)) / (3 + 1 / math.log2(3))
    )
    assert ndcg(torch.tensor([[5, -1]]), [{}]).tolist() == [0.0]
    assert ndcg(torch.empty(1, 0, dtype=torch.int64), [{4: 1}]).tolist() == [0.0]


def test_nothing_found_counts_as_a_miss():
    found = torch.tensor([[3, -1, -1], [-1, -1, -1]])
    metrics = retrieval_metrics(found, [{3: 1, 8: 1}, {0: 1}])
    ideal = 1 + 1 / math.log2(3)
    assert metrics == pytest.approx(
        {"ndcg@10": 0.5 / ideal, "mrr@10": 0.5, "map@100": 0.25, "recall@100": 0.25}
    )


# --- Spearman -------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_spearman_equals_scipy_with_ties(levels):
    generator = np.random.default_rng(levels)
    x = generator.integers(-levels, levels, 500) / levels
    y = x + generator.integers(-levels, levels, 500) / levels
    found = spearman(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert spearman(torch.tensor(-x), torch.tensor(y)) == pytest.approx(-found, abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_spearman_equals_that_of_sentence_transformers(tied):
    first, second = embeddings(400, tied, seed=5), embeddings(400, tied, seed=6)
    names = [str(i) for i in range(400)]
    scores = torch.arange(400) % 6 / 5 + pairwise_cosine(first, second)

    class Given(EmbeddingSimilarityEvaluator):
        def embed_inputs(self, model, sentences):
            return (first if sentences[0] is names[0] else second).numpy()

        def store_metrics_in_model_card_data(self, *args):
            pass

    others = [f"{name}'" for name in names]
    evaluator = Given(names, others, scores.tolist(), similarity_fn_names=["cosine"])
    expected = evaluator(None)["spearman_cosine"]
    assert spearman(pairwise_cosine(first, second), scores) == pytest.approx(expected, abs=1e-6)


def test_spearman_without_an_order_or_without_a_number():
    up, flat = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    assert spearman(flat, up) == spearman(up, flat) == 0
    assert spearman(up[:1], up[:1]) == spearman(up[:0], up[:0]) == 0
    assert math.isnan(spearman(up, torch.tensor([1.0, math.nan, 2.0])))
    # Ranks are summed in float64: in float32 the sums would not fit.
    assert spearman(torch.arange(3e4), -torch.arange(3e4).square()) == pytest.approx(-1, abs=1e-12)
