"""The order of the examples depends on (seed, epoch, step) and on nothing else."""

import pytest

from embedtune.data.sampler import GlobalBatchSampler


def sampler(num_examples=50, batch_size=8, **kwargs):
    return GlobalBatchSampler(num_examples, batch_size, **{"seed": 3, "shuffle": True, **kwargs})


def test_an_epoch_holds_every_example_once():
    batches = list(sampler())
    assert len(batches) == len(sampler()) == 7
    assert sorted(index for batch in batches for _, index, _ in batch) == list(range(50))
    assert [len(batch) for batch in batches] == [8] * 6 + [2]


def test_file_order_is_kept_without_shuffle():
    flat = [index for batch in sampler(shuffle=False) for _, index, _ in batch]
    assert flat == list(range(50))


def test_epochs_and_seeds_differ_and_repeat():
    first = list(sampler(cursor=lambda: (0, 0)))
    assert first == list(sampler(cursor=lambda: (0, 0)))
    second = list(sampler(cursor=lambda: (1, 0)))
    assert [i for b in first for _, i, _ in b] != [i for b in second for _, i, _ in b]
    assert {epoch for batch in second for epoch, _, _ in batch} == {1}
    assert first != list(sampler(seed=4))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_the_global_batch_of_one_rank(num_ranks):
    alone = list(sampler(batch_size=8))
    shares = [
        list(sampler(batch_size=8 // num_ranks, rank=rank, num_ranks=num_ranks))
        for rank in range(num_ranks)
    ]
    counted = [[[key for key in batch if not key.spare] for batch in share] for share in shares]
    together = [[key for share in counted for key in share[step]] for step in range(len(alone))]
    assert together == alone
    sizes = [len(share[-1]) for share in counted]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_without_a_share_gets_a_spare_example():
    first, last = (list(sampler(9, 2, rank=rank, num_ranks=4)) for rank in (0, 3))
    assert [key.spare for key in first[-1]] == [False]
    assert last[-1] == [first[-1][0]._replace(spare=True)]


def test_a_resumed_epoch_is_the_rest_of_the_whole_one():
    whole = list(sampler(cursor=lambda: (2, 0)))
    assert list(sampler(cursor=lambda: (2, 3))) == whole[3:]
