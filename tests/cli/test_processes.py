"""Which of the processes that were launched this one is, before the ranks have met."""

import sys

import pytest

from embedtune.cli.processes import RANK_VARIABLES, launched_rank


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"SLURM_PROCID": "2"}, 2),
    ],
)
def test_it_is_told_by_the_environment_and_then_by_lightning(monkeypatch, variables, rank):
    from lightning.pytorch.utilities import rank_zero_only

    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as before_lightning:
        before_lightning.delitem(sys.modules, "lightning.pytorch.utilities")
        assert launched_rank() == rank
    monkeypatch.setattr(rank_zero_only, "rank", 5)
    assert launched_rank() == 5
