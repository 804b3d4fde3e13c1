"""A command that a signal ends, but for a fit in its steps, leaves nothing half written."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from forks import Ranks, embedtune

from embedtune.cli import main
from embedtune.evaluation.sharded import Evaluation
from embedtune.models.encoder import Encoder
from embedtune.training.module import EmbeddingModule

ROWS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(8)]
TOLD = """
import os, signal
from embedtune.losses import InfoNCE


class Told(InfoNCE):
    def forward(self, embeddings, target):
        if os.environ["LOCAL_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(embeddings, target)
"""
PATHS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("rank_told.py").write_text(TOLD)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
    yield
    signal.signal(signal.SIGINT, former)


def flags(command: str, model: Path, *more: str) -> list[str]:
    given = {
        "model.model_name_or_path": model,
        f"data.{PATHS[command]}_path": "rows.jsonl",
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
    }
    return [command, *(f"--{name}={value}" for name, value in given.items()), *more]


def ended(capsys, number: int, arguments: list[str]) -> None:
    """Run a command in which the signal comes: it must end with its code and one line."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 128 + number
    stderr = capsys.readouterr().err
    line = f"embedtune: error: {signal.Signals(number).name}: ended before it was done"
    assert re.findall(r"^embedtune: error: .*$", stderr, re.MULTILINE) == [line]
    assert "Traceback" not in stderr
    assert not list(Path().rglob("*.part"))
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def told_in(monkeypatch, owner: type, name: str, number: int, at: int = 0) -> None:
    """Let the process get a signal in a method, when it has been called so often."""
    method, calls = getattr(owner, name), iter(range(100))

    def told(*args, **kwargs):
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("command", "step"),
    [("predict", "predict_step"), ("validate", "validation_step"), ("test", "test_step")],
)
def test_what_is_no_fit_ends_at_once(tiny_bert, capsys, monkeypatch, number, command, step):
    told_in(monkeypatch, EmbeddingModule, step, number, at=1)
    ended(capsys, number, flags(command, tiny_bert))
    written = ("embeddings.npy", "metrics.json")
    assert not any(Path("run", name).exists() for name in written)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Encoder, "__init__"), (Evaluation, "collect"), (EmbeddingModule, "on_fit_start")],
)
def test_a_fit_ends_at_once_before_its_first_step(
    tiny_bert, capsys, monkeypatch, number, owner, name
):
    scored = [{**row, "scores": [i / 8]} for i, row in enumerate(ROWS)]
    Path("sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    told_in(monkeypatch, owner, name, number)
    ended(capsys, number, flags("fit", tiny_bert, "--data.val_path=sts.jsonl"))
    assert not Path("run/checkpoints").exists()


def test_a_rank_ends_without_waiting_for_the_others(tiny_bert):
    two = ("--trainer.devices=2", "--model.loss=rank_told.Told", "--rank_timeout=600")
    arguments = flags("validate", tiny_bert, *two)
    ranks = Ranks(embedtune, arguments, folder=Path.cwd(), ranks=2)
    other, told = ranks.wait(180)
    assert (told, other) == (143, 1), ranks.output()
    assert "SIGTERM: ended before it was done" in ranks.output()
