"""What is chosen for a device, where nobody says."""

import multiprocessing
import os

import pytest

from embedtune.data.device_defaults import num_workers, tokens_per_chunk


@pytest.mark.parametrize(
    ("device", "width", "grad_cache", "tokens"),
    [
        ("cpu", 384, False, 2048),
        ("cpu", 384, True, 2048),
        ("cuda", 384, False, 131072),
        ("cuda", 384, True, 65536),
        ("cuda", 768, False, 65536),
        ("cuda", 768, True, 32768),
        ("cuda", None, False, 65536),
    ],
)
def test_a_gpu_takes_more_tokens_at_once(device, width, grad_cache, tokens):
    assert tokens_per_chunk(device, width, grad_cache) == tokens


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    assert [num_workers("cuda", ranks) for ranks in (1, 2, 8, 32)] == [8, 8, 2, 1]
    assert num_workers("cpu", 1) == 0
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    assert num_workers("cuda", 1) == 0
