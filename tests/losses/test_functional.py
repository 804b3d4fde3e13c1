"""Every function against an independent implementation with plain loops, and in closed form."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

from embedtune.losses import functional as F
from embedtune.losses import rank_hinge as hinge
from embedtune.losses.similarity import (
    cosine_similarity,
    nested_cosine_similarities,
    pairwise_cosine,
)

MARGIN = 0.015


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def symmetric(b, seed=0, dtype=torch.float64):
    e = torch.nn.functional.normalize(randn(b, 6, seed=seed), dim=-1)
    return (e @ e.T).to(dtype)


# --- Similarities ---------------------------------------------------------------------------


def test_cosines_equal_loops():
    q, d = randn(3, 5), randn(4, 5, seed=1)
    expected = [[cosine(a, b) for b in d.tolist()] for a in q.tolist()]
    torch.testing.assert_close(cosine_similarity(q, d), torch.tensor(expected).double())
    torch.testing.assert_close(pairwise_cosine(q, d[:3]), cosine_similarity(q, d).diag())


def test_nested_cosines_equal_those_of_each_prefix_in_the_order_given():
    q, d = randn(3, 16).requires_grad_(), randn(5, 16, seed=1).requires_grad_()
    dims = [16, 4, 8, 4]
    nested = nested_cosine_similarities(q, d, dims)
    alone = [cosine_similarity(q[:, :dim], d[:, :dim]) for dim in dims]
    for found, expected in zip(nested, alone, strict=True):
        torch.testing.assert_close(found, expected)
    weights = randn(4, 3, 5, seed=2)
    gradients = [
        torch.autograd.grad((torch.stack(sims) * weights).sum(), (q, d)) for sims in (nested, alone)
    ]
    assert gradients[0][0].abs().max() > 0.1
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_zero_prefix_has_finite_gradients():
    q = torch.cat([torch.zeros(2, 3), torch.ones(2, 3)], dim=1).requires_grad_()
    sims = nested_cosine_similarities(q, q, [3, 6])
    assert sims[0].abs().max() == 0
    torch.stack(sims).sum().backward()
    assert torch.isfinite(q.grad).all()


# --- InfoNCE --------------------------------------------------------------------------------


def info_nce_by_loops(logits, own, num_positives, in_batch_positives, known, multi_positive):
    total = 0.0
    for row, own_column, known_row in zip(logits, own, known, strict=True):
        positives = [own_column]
        if multi_positive:
            positives += [j for j, is_known in enumerate(known_row) if is_known]
        negatives = []
        for j in range(len(row)):
            counts = j >= num_positives or len(row) == num_positives or in_batch_positives
            if counts and j != own_column and not known_row[j]:
                negatives.append(math.exp(row[j]))
        terms = [
            -math.log(math.exp(row[j]) / (math.exp(row[j]) + sum(negatives))) for j in positives
        ]
        total += sum(terms) / len(terms)
    return total / len(logits)


@pytest.mark.parametrize("multi_positive", [False, True])
@pytest.mark.parametrize("in_batch_positives", [False, True])
@pytest.mark.parametrize(("b", "m", "k"), [(1, 1, 0), (1, 1, 3), (4, 4, 0), (4, 4, 2), (2, 5, 2)])
@pytest.mark.parametrize("share", [0, 0.3])
def test_info_nce_equals_loops(b, m, k, in_batch_positives, share, multi_positive):
    """With more positives than queries, as one rank's queries meet them."""
    similarity = cosine_similarity(randn(b, 6), randn(m + m * k, 6, seed=1))
    own = torch.arange(b) + (m - b)
    known = torch.rand(similarity.shape, generator=torch.Generator().manual_seed(3)) < share
    known[torch.arange(b), own] = False
    found = F.info_nce(
        similarity,
        0.1,
        in_batch_positives=in_batch_positives,
        own=own,
        num_positives=m,
        known=known,
        multi_positive=multi_positive,
    )
    logits = (similarity / 0.1).tolist()
    expected = info_nce_by_loops(
        logits, own.tolist(), m, in_batch_positives, known.tolist(), multi_positive
    )
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_info_nce_of_identical_embeddings_is_log_of_the_candidates():
    ones = torch.ones(5, 3)
    assert F.info_nce(cosine_similarity(ones, ones), 0.02).item() == pytest.approx(math.log(5))
    triplet = cosine_similarity(ones, torch.ones(15, 3))
    assert F.info_nce(triplet, 0.02).item() == pytest.approx(math.log(1 + 10))
    loss = F.info_nce(triplet, 0.02, in_batch_positives=True)
    assert loss.item() == pytest.approx(math.log(15))


@pytest.mark.parametrize("multi_positive", [False, True])
def test_info_nce_without_any_negative_left_is_zero(multi_positive):
    similarity = randn(3, 3).requires_grad_()
    known = torch.ones(3, 3, dtype=torch.bool)
    loss = F.info_nce(similarity, 0.02, known=known, multi_positive=multi_positive)
    loss.backward()
    assert loss.item() == 0
    assert similarity.grad.abs().max() == 0


def test_a_masked_candidate_gets_no_gradient():
    similarity = randn(2, 6).requires_grad_()
    known = torch.zeros(2, 6, dtype=torch.bool)
    known[0, 3] = True
    F.info_nce(similarity, 0.5, known=known).backward()
    assert similarity.grad[0, 3] == 0
    assert similarity.grad[1, 3] > 0


def test_known_positives_are_found_by_text_and_by_query():
    query_id = torch.tensor([1, 2, 1])
    candidate_id = torch.tensor([10, 20, 30, 10, 11, 99])  # three positives, three negatives
    known = torch.tensor([[10, 11], [20, 0], [30, 0]])
    own = torch.arange(3)
    expected = [
        # own, other, equal query, duplicate of the positive, another known positive, a negative
        [False, False, True, True, True, False],
        [False, False, False, False, False, False],
        [True, False, False, False, False, False],
    ]
    assert F.known_positive_mask(query_id, candidate_id, known, query_id, own).tolist() == expected


@pytest.mark.parametrize(("columns", "texts"), [(1, 5), (4, 12), (60, 40)])
def test_known_positives_equal_a_loop(columns, texts):
    """Candidates occur several times; so do queries and the positives of a row."""
    generator = torch.Generator().manual_seed(columns)

    def draw(low, *shape):
        return torch.randint(low, texts, shape, generator=generator)

    query_id, candidate_id, known = draw(1, 9), draw(0, 30), draw(0, 9, columns)
    positive_query_id, own = draw(1, 12), draw(0, 9) % 12
    mask = F.known_positive_mask(query_id, candidate_id, known, positive_query_id, own)
    for i, j in itertools.product(range(9), range(30)):
        is_listed = candidate_id[j] != 0 and candidate_id[j] in known[i]
        is_of_equal = j < 12 and positive_query_id[j] == query_id[i]
        assert mask[i, j] == (bool(is_listed or is_of_equal) and j != own[i]), (i, j)
    assert 0 < mask.float().mean() < 1


def test_padding_is_no_known_positive():
    query_id, own = torch.tensor([1]), torch.tensor([0])
    candidate_id, known = torch.tensor([5, 0]), torch.tensor([[5, 0]])
    mask = F.known_positive_mask(query_id, candidate_id, known, query_id, own)
    assert not mask.any()


# --- Scores ---------------------------------------------------------------------------------


def softmax(values):
    exponents = [math.exp(v - max(values)) for v in values]
    return [e / sum(exponents) for e in exponents]


def kl_by_loops(similarity, scores, temperature, teacher_temperature):
    student = softmax([s / temperature for s in similarity])
    teacher = softmax([s / teacher_temperature for s in scores])
    return sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))


@pytest.mark.parametrize("lengths", [[3], [2, 5, 3], [1, 4]])
def test_kl_over_ragged_lists_equals_loops(lengths):
    m = sum(lengths)
    similarity, scores = randn(m).tanh(), randn(m, seed=1)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = F.kl_over_list(similarity, scores, index, len(lengths), 0.1, 0.5)
    parts = zip(similarity.split(lengths), scores.split(lengths), strict=True)
    expected = [kl_by_loops(s.tolist(), t.tolist(), 0.1, 0.5) for s, t in parts]
    assert found.item() == pytest.approx(sum(expected) / len(lengths), abs=1e-12)


def candidates_by_loops(similarity, scores, lists, columns, known, weight):
    """Return KL over each list and the others' texts, these ``weight`` times.

    similarity is b x n, all else but the weight is a list.
    """
    total = 0.0
    for query, of_list in enumerate(lists):
        own = [columns[i] for i in of_list]
        others = [c for c in range(len(similarity[0])) if c not in own and not known[query][c]]
        student = softmax([similarity[query][c] / 0.1 for c in (*own, *others * weight)])
        teacher = softmax([scores[i] / 0.5 for i in of_list])
        total += sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=False))
    return total / len(lists)


@pytest.mark.parametrize("weight", [1, 3])
@pytest.mark.parametrize("lengths", [[3, 4], [2, 5, 1], [4]])
def test_kl_over_candidates_equals_loops(lengths, weight):
    b, m = len(lengths), sum(lengths)
    index = torch.repeat_interleave(torch.arange(b), torch.tensor(lengths))
    column = torch.arange(m) + 2  # two texts of another rank come before
    similarity, scores = randn(b, m + 3).tanh(), randn(m, seed=1)
    known = torch.zeros(b, m + 3, dtype=torch.bool)
    known[0, [0, m + 2]] = True
    found = F.kl_over_candidates(similarity, scores, index, column, known, 0.1, 0.5, float(weight))
    lists = [(index == i).nonzero().flatten().tolist() for i in range(b)]
    whole = similarity.tolist(), scores.tolist(), lists, column.tolist(), known.tolist()
    assert found.item() == pytest.approx(candidates_by_loops(*whole, weight), abs=1e-12)


def test_kl_over_candidates_without_others_is_that_over_lists():
    similarity, scores, index = randn(5).tanh(), randn(5, seed=1), torch.tensor([0, 0, 1, 1, 1])
    known = torch.arange(2)[:, None] != index
    alone = F.kl_over_list(similarity, scores, index, 2, 0.1, 0.5)
    found = F.kl_over_candidates(
        similarity.expand(2, 5), scores, index, torch.arange(5), known, 0.1, 0.5, 4.0
    )
    assert found.item() == pytest.approx(alone.item(), abs=1e-12)


def test_a_teacher_that_is_sure_makes_info_nce_of_it():
    similarity, index = randn(3, 6).tanh(), torch.tensor([0, 0, 1, 1, 2, 2])
    scores, own = torch.tensor([9.0, 0.0] * 3).double(), torch.tensor([0, 2, 4])
    known = torch.zeros(3, 6, dtype=torch.bool)
    found = F.kl_over_candidates(similarity, scores, index, torch.arange(6), known, 0.1, 0.01, 1.0)
    expected = torch.nn.functional.cross_entropy(similarity / 0.1, own)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_kl_over_the_batch_equals_loops_and_is_zero_for_a_perfect_student():
    similarity, scores = randn(7).tanh(), randn(7, seed=1)
    expected = kl_by_loops(similarity.tolist(), scores.tolist(), 0.1, 0.5) / 7
    assert F.kl_over_batch(similarity, scores, 0.1, 0.5).item() == pytest.approx(expected)
    assert F.kl_over_batch(scores, scores, 0.3, 0.3).item() == pytest.approx(0, abs=1e-15)


def cosent_by_loops(similarity, scores, scale):
    total = 1.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if scores[i] > scores[j]:
                total += math.exp(scale * (similarity[j] - similarity[i]))
    return math.log(total)


@pytest.mark.parametrize(
    "scores", [[0.1, 0.9, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 1.0, 0.0]]
)
def test_cosent_equals_loops_with_ties(scores):
    similarity = randn(4).tanh().requires_grad_()
    found = F.cosent(similarity, torch.tensor(scores).double(), 20.0)
    expected = cosent_by_loops(similarity.tolist(), scores, 20.0)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found.backward()
    assert (similarity.grad.abs().max() > 0) == (len(set(scores)) > 1)


def test_scored_losses_of_one_pair_are_zero_and_differentiable():
    for loss in (
        lambda s: F.cosent(s, torch.ones(1).double(), 20.0),
        lambda s: F.kl_over_batch(s, torch.ones(1).double(), 0.1, 0.1),
        lambda s: F.kl_over_list(s, torch.ones(1).double(), torch.zeros(1).long(), 1, 0.1, 0.1),
    ):
        similarity = randn(1).requires_grad_()
        value = loss(similarity)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-12)


# --- Distillation ---------------------------------------------------------------------------


def rank_hinge(student, teacher, margin):
    return hinge.rank_hinge(student, hinge.pair_order(teacher), margin)


def rank_hinge_directly(student, teacher, margin):
    """All m x m differences of pairs, as the reference forms them."""
    b = len(student)
    rows, columns = torch.triu_indices(b, b, offset=1)
    order = torch.sort(teacher[rows, columns], stable=True).indices
    s = student[rows, columns][order]
    m = len(s)
    hinge = (s[:, None] - s[None, :] + margin).relu()
    return hinge[torch.triu(torch.ones(m, m, dtype=torch.bool), 1)].sum() / (m * (m - 1) / 2)


def ties(matrix, levels):
    return (matrix * levels).round() / levels


@pytest.mark.parametrize("b", [3, 4, 5, 8, 17, 64])
@pytest.mark.parametrize("levels", [None, 4])
def test_rank_hinge_equals_the_direct_formula(b, levels):
    student, teacher = symmetric(b), symmetric(b, seed=1)
    if levels:
        student, teacher = ties(student, levels), ties(teacher, levels)
    results = []
    for compute in (rank_hinge, rank_hinge_directly):
        s = student.clone().requires_grad_()
        loss = compute(s, teacher, MARGIN)
        (3 * loss).backward()
        results.append((loss.item(), s.grad))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-10)
    assert results[0][0] > 0.01
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-10)
    assert results[0][1].abs().max() > 1e-6


def test_rank_hinge_counts_agree_in_float32():
    """Rounding may move a pair over the margin, but both sides must see it alike."""
    student, teacher = (symmetric(40, seed=seed, dtype=torch.float32) for seed in (0, 1))
    rows, columns = torch.triu_indices(40, 40, offset=1)
    s = ties(student, 64)[rows, columns][teacher[rows, columns].argsort()]
    beaten, beating = hinge.count_violations(s, s + MARGIN)
    assert beaten.sum() == beating.sum() > 0
    found = rank_hinge(student, teacher, MARGIN).item()
    expected = rank_hinge_directly(student.double(), teacher.double(), MARGIN).item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("b", [1, 2])
def test_rank_hinge_without_two_pairs_is_zero(b):
    student = symmetric(b).requires_grad_()
    loss = rank_hinge(student, symmetric(b, seed=1), MARGIN)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_rank_hinge_of_a_student_in_the_teachers_order_is_zero():
    teacher = symmetric(6)
    rows, columns = torch.triu_indices(6, 6, offset=1)
    student = torch.zeros(6, 6).double()
    student[rows, columns] = 0.1 * teacher[rows, columns].argsort().argsort().double()
    assert rank_hinge(student, teacher, MARGIN).item() == pytest.approx(0, abs=1e-12)


# The peak of /proc is the process's own; getrusage's starts from that of the parent.
MEMORY = """
import pathlib, sys, torch
from embedtune.losses.rank_hinge import pair_order, rank_hinge
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "VmHWM" in line).split()[1]) / 1024
e = torch.nn.functional.normalize(torch.randn(2, int(sys.argv[1]), 16), dim=-1)
student, teacher = (e @ e.mT).unbind()
student.requires_grad_()
before = peak()
rank_hinge(student, pair_order(teacher), 0.015).backward()
sys.stdout.write(str(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rank_hinge_of_256_texts_makes_no_table_of_pairs_of_pairs():
    """m = 32,640 pairs: their m x m table in float32 would be 4.3 GB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, "256"], capture_output=True, text=True, check=True
    )
    assert 0 < float(run.stdout) < 500


def test_distillation_terms_equal_loops():
    student, teacher = randn(4, 5), randn(4, 5, seed=1)
    cosines = [cosine(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert F.distill_cosine(student, teacher).item() == pytest.approx(1 - sum(cosines) / 4)
    a, b = symmetric(4), symmetric(4, seed=1)
    expected = sum((a[i, j] - b[i, j]).item() ** 2 for i in range(4) for j in range(4)) / 16
    assert F.similarity_mse(a, b).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.info_nce(cosine_similarity(x[:3], x), 0.5),
        lambda x: F.cosent(pairwise_cosine(x[:4], x[2:]), torch.tensor([0.3, 0.1, 0.1, 0.9]), 5.0),
        lambda x: F.kl_over_list(
            pairwise_cosine(x[:4], x[2:]),
            randn(4, seed=5),
            torch.tensor([0, 0, 1, 1]),
            2,
            0.5,
            1.0,
        ),
        lambda x: F.kl_over_batch(pairwise_cosine(x[:4], x[2:]), randn(4, seed=5), 0.5, 1.0),
        lambda x: rank_hinge(cosine_similarity(x, x), symmetric(6, seed=7), MARGIN),
    ],
    ids=["info_nce", "cosent", "kl_over_list", "kl_over_batch", "rank_hinge"],
)
def test_gradients_equal_finite_differences(function):
    assert torch.autograd.gradcheck(function, randn(6, 4, seed=3).requires_grad_())
