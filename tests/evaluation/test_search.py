"""Exact search in blocks and over ranks, against a sort of all cosines."""

import pytest
import torch
from forks import Ranks
from torch import distributed

from embedtune.evaluation import search as searching
from embedtune.evaluation.search import Found, merge, search

DIM = 16


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vertices(count, seed):
    """Vertices of a cube, whose lengths and cosines are exact: most are shared."""
    return randn(count, DIM, seed=seed).sign()


def by_sort(queries, documents, rows, k):
    """Sort all cosines, equal ones by the lower row, in plain Python."""
    unit = [torch.nn.functional.normalize(x.float(), dim=-1) for x in (queries, documents)]
    scores, found = [], []
    for row in (unit[0] @ unit[1].T).tolist():
        best = sorted(zip(row, rows.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
        padded = (best + [(float("-inf"), -1)] * k)[:k]
        scores.append([score for score, _ in padded])
        found.append([number for _, number in padded])
    return Found(torch.tensor(scores), torch.tensor(found))


def assert_same(found, expected):
    assert found.rows.dtype == torch.int64
    assert found.scores.dtype == torch.float32
    assert found.rows.tolist() == expected.rows.tolist()
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("make", [lambda n, seed: randn(n, DIM, seed=seed), vertices])
@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("blocks", [(512, 8192), (4, 5), (1, 1)])
def test_what_is_found_equals_a_sort(make, k, blocks, monkeypatch):
    monkeypatch.setattr(searching, "QUERIES", blocks[0])
    monkeypatch.setattr(searching, "DOCUMENTS", blocks[1])
    q, d = make(9, seed=1), make(43, seed=2)
    rows = torch.randperm(43) + 2**31  # numbers that no int32 holds
    found = search(q, d, rows, k)
    assert_same(found, by_sort(q, d, rows, k))
    assert k < 43 or found.scores[:, 30:43].max() < 0  # negative cosines count


def test_no_block_is_larger_than_the_limit(monkeypatch):
    sizes = []
    keys = searching.sort_keys
    monkeypatch.setattr(searching, "QUERIES", 4)
    monkeypatch.setattr(searching, "DOCUMENTS", 8)
    monkeypatch.setattr(searching, "sort_keys", lambda s, r: sizes.append(s.shape) or keys(s, r))
    search(randn(10, DIM), randn(30, DIM), torch.arange(30), 3)
    assert len(sizes) == 3 * 4
    assert max(q * n for q, n in sizes) == 32


def test_equal_cosines_come_in_the_order_of_their_numbers():
    documents = torch.ones(100, 4)
    rows = torch.arange(100).flip(0)
    assert search(torch.ones(1, 4), documents, rows, 10).rows.tolist() == [list(range(10))]
    zeros = searching.sort_keys(torch.tensor([-0.0, 0.0, -0.0]), torch.arange(3))
    assert zeros.diff().tolist() == [-1, -1]  # 0 and -0 are one cosine


def test_any_scale_and_precision_and_under_autocast():
    q, d = randn(5, DIM), randn(20, DIM, seed=1)
    rows = torch.arange(20)
    expected = search(q, d, rows, 8)
    assert_same(search(q * 1e4, d * torch.linspace(1e-3, 1e3, 20)[:, None], rows, 8), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(search(q, d, rows, 8), expected)
    rounded = search(q.bfloat16().float(), d.bfloat16().float(), rows, 8)
    assert_same(search(q.bfloat16(), d.bfloat16(), rows, 8, torch.device("cpu")), rounded)


def test_no_documents_no_queries_and_no_numbers():
    found = search(randn(2, DIM), torch.empty(0, DIM), torch.empty(0, dtype=torch.int64), 3)
    assert found.rows.tolist() == [[-1] * 3] * 2
    assert found.scores.eq(float("-inf")).all()
    assert search(torch.empty(0, DIM), randn(4, DIM), torch.arange(4), 3).rows.shape == (0, 3)
    documents = randn(4, DIM)
    documents[2] = float("nan")
    documents[3] = 0
    found = search(randn(1, DIM), documents, torch.arange(4), 4)
    assert sorted(found.rows.tolist()[0]) == [-1, 0, 1, 3]
    assert found.rows[0, 3] == -1


def test_one_process_gets_back_what_it_gives():
    found = search(randn(2, DIM), randn(9, DIM, seed=1), torch.arange(9), 3)
    assert merge(found, 3) is found


@pytest.mark.parametrize("blocks", [(512, 8192), (4, 5)])
def test_a_document_that_is_left_out_is_not_found_and_another_is(blocks, monkeypatch):
    monkeypatch.setattr(searching, "QUERIES", blocks[0])
    monkeypatch.setattr(searching, "DOCUMENTS", blocks[1])
    q, d = vertices(9, seed=1), vertices(43, seed=2)
    rows = torch.randperm(43) + 7
    best = search(q, d, rows, 12).rows[:, 0]
    left_out = torch.where(torch.arange(9) % 3 > 0, best, -1)
    found = search(q, d, rows, 11, left_out=left_out)
    whole = search(q, d, rows, 12)
    for i in range(9):
        kept = [j for j in range(12) if whole.rows[i, j] != left_out[i]][:11]
        assert_same(Found(*(x[i] for x in found)), Found(*(x[i, kept] for x in whole)))
    only = search(q[:1], d[:1], rows[:1], 2, left_out=rows[:1])
    assert only.rows.tolist() == [[-1, -1]]


# --- Two ranks ------------------------------------------------------------------------------------

DEPTHS = 12, 60
"""Fewer and more than the 50 documents there are."""
SHARES = {  # the documents of rank 0; rank 1 has the others
    "in turns": range(0, 50, 2),
    "fewer than k": range(5),
    "none": (),
    "the last": range(30, 50),
}


def search_a_share(folder):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    q, d = vertices(6, seed=1), vertices(50, seed=2)
    found = {}
    for name, first in SHARES.items():
        mine = [row for row in range(50) if (row in first) == (rank == 0)]
        rows = torch.tensor(mine, dtype=torch.int64)
        found[name] = [tuple(merge(search(q, d[rows], rows, k), k)) for k in DEPTHS]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_find_what_one_process_finds(tmp_path):
    ranks = Ranks(search_a_share, tmp_path, folder=tmp_path, ranks=2)
    assert ranks.wait() == [0, 0], ranks.output()
    q, d = vertices(6, seed=1), vertices(50, seed=2)
    expected = [search(q, d, torch.arange(50), k) for k in DEPTHS]
    assert (expected[0].scores[:, 1:] == expected[0].scores[:, :-1]).any()  # ties across ranks
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found) == list(SHARES)
        for by_depth in found.values():
            for (scores, rows), one in zip(by_depth, expected, strict=True):
                assert_same(Found(scores, rows), one)
