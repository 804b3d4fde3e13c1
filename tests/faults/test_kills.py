"""A run that is killed at any time, and gone on with, ends as the one that was never killed.

`pytest tests/faults/test_kills.py --kills 200` kills that many processes, or groups of two ranks.
"""

import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Ranks, embedtune

from embedtune.checkpoints.find import last_checkpoint
from embedtune.checkpoints.read import read_facts, read_weights
from embedtune.export.folder import is_verified

STRATEGIES = Path(__file__).parents[2] / "configs" / "strategy"
SHARES = {"one": 0.6, "ddp": 0.2, "fsdp": 0.1, "zero2": 0.1}
"""Of all kills. What is written differs, how it is written does not; two ranks take longer."""
EPOCHS, LONGEST = 2, 3
"""Of a run; and of a chain of kills, before a run is let be."""
LIMIT = 5
"""Seconds after which the launcher ends a rank whose other has died."""


def fit(model: Path, strategy: str) -> list[str]:
    """Return the arguments of a fit of 8 steps that saves every second, and exports each epoch."""
    flags = {
        "--model.model_name_or_path": model,
        "--data.train_path": "train.jsonl",
        "--trainer.default_root_dir": "run",
        "--trainer.accelerator": "cpu",
        "--trainer.precision": "32-true",
        "--trainer.max_epochs": EPOCHS,
        "--model.lr": "1e-2",
        "--checkpoint.every_n_train_steps": 2,
        "--data.batch_size": 4,
    }
    if strategy != "one":
        flags |= {"--config": STRATEGIES / f"{strategy}.yaml", "--trainer.devices": 2}
        flags["--data.batch_size"] = 2
    return ["fit", *(str(word) for flag in flags.items() for word in flag)]


def make_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder with rows, which also keeps the cache and what is temporary."""
    for name in ("cache", "temporary"):
        (folder / name).mkdir(parents=True)
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(folder / "cache"))
    monkeypatch.setenv("TMPDIR", str(folder / "temporary"))


def run(model: Path, strategy: str, folder: Path, *flags: str) -> Ranks:
    arguments = [*fit(model, strategy), *flags]
    return Ranks(embedtune, arguments, folder=folder, ranks=1 if strategy == "one" else 2)


def finish(command: Ranks) -> None:
    codes = command.wait()
    assert set(codes) == {0}, (codes, command.output()[-5000:])


def leftovers(folder: Path) -> list[str]:
    """Return what is written beside the place it is for."""
    marks = (".part", ".former", "UNVERIFIED", ".unverified")
    return [str(path) for path in folder.rglob("*") if path.name.endswith(marks)]


def tensors(states: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested states in their order."""
    if isinstance(states, torch.Tensor):
        yield states
    elif isinstance(states, dict | list | tuple):
        for value in states.values() if isinstance(states, dict) else states:
            yield from tensors(value)


def assert_same_run(killed: Path, whole: Path) -> None:
    """Hold that two run folders have the same verified exports and the same last checkpoint."""
    assert not leftovers(killed)
    exports = ["model", *(f"checkpoints/epoch-{epoch + 1}" for epoch in range(EPOCHS))]
    for name in exports:
        assert is_verified(killed / "run" / name), name
        for path in (whole / "run" / name).rglob("*"):
            other = killed / "run" / path.relative_to(whole / "run")
            assert path.is_dir() or path.read_bytes() == other.read_bytes(), other
    last, expected = (last_checkpoint(folder / "run/checkpoints") for folder in (killed, whole))
    assert last is not None
    assert expected is not None
    assert last.resolve().name == expected.resolve().name
    own, weights = read_weights(last), read_weights(expected)
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], value) for name, value in weights.items())
    own, facts = read_facts(last), read_facts(expected)
    assert own["place"] == facts["place"]
    states = [list(tensors(found.get("optimizer_states"))) for found in (own, facts)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    kept = [sorted(p.name for p in (f / "run/checkpoints").iterdir()) for f in (killed, whole)]
    assert kept[0] == kept[1]
    assert (killed / "run/report.html").is_file()


def kill_sometime(command: Ranks, seconds: float, chance: random.Random) -> bool:
    """Kill a run, or one of its ranks, within so many seconds; tell whether it was in time."""
    time.sleep(chance.uniform(0, seconds))
    alone = len(command.processes) > 1 and chance.random() < 0.5
    hit = command.kill(chance.randrange(2) if alone else None)
    if not alone or not hit:
        return hit
    command.wait(LIMIT)
    return True


@pytest.mark.timeout(0)
@pytest.mark.parametrize("strategy", SHARES)
def test_a_run_that_is_killed_at_any_time_ends_as_the_whole_one(
    tiny_bert, tmp_path, monkeypatch, request, strategy
):
    count = round(SHARES[strategy] * request.config.getoption("--kills"))
    if not count:
        pytest.skip("none of so few kills is its own")
    for name in ("first", "whole"):
        make_folder(tmp_path / name, monkeypatch)
    finish(run(tiny_bert, strategy, tmp_path / "first"))  # it imports, and compiles for DeepSpeed
    started = time.monotonic()
    finish(run(tiny_bert, strategy, tmp_path / "whole"))
    seconds = time.monotonic() - started
    kills, chance = 0, random.SystemRandom()
    for chain in itertools.count():
        folder = tmp_path / f"chain-{chain}"
        make_folder(folder, monkeypatch)
        flags: tuple[str, ...] = ()
        for _ in range(min(chance.randint(1, LONGEST), count - kills)):
            command = run(tiny_bert, strategy, folder, *flags)
            kills += kill_sometime(command, seconds, chance)
            command.wait(0)
            flags = ("--ckpt_path", "last")
        finish(run(tiny_bert, strategy, folder, *flags))
        assert_same_run(folder, tmp_path / "whole")
        shutil.rmtree(folder)
        if kills == count:
            break
