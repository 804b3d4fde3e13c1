"""A long run takes no more memory, open files or threads at its end than after its start.

`pytest tests/faults/test_long_run.py --steps 20000` trains that many steps, all in one process.
"""

import json
import statistics
import sys

import pytest
from forks import Ranks, embedtune

MEASURES, WARM_UP = 20, 8
"""In all, and before the process holds all that it will."""
MEGABYTES = 8
"""That may come and go: a row of the metrics, a log line and an allocator's holes are some kB."""
RECORDER = '''
import json
import os
import re
from pathlib import Path

import lightning.pytorch as pl


class Recorder(pl.Callback):
    """Write what the process holds every so many steps."""

    def __init__(self, every: int):
        self.every = every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.every:
            return
        status = Path("/proc/self/status").read_text()
        held = {
            "step": trainer.global_step,
            "kilobytes": int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]),
            "threads": int(re.search(r"Threads:\\s+(\\d+)", status)[1]),
            "files": len(os.listdir("/proc/self/fd")),
        }
        with open("held.jsonl", "a") as file:
            file.write(json.dumps(held) + "\\n")
'''


@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_run_holds_no_more_at_its_end(tiny_bert, tmp_path, request):
    """With its checkpoints, loggers, and the exports of five epochs."""
    steps = request.config.getoption("--steps")
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(2 * steps // 5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recorder.py").write_text(RECORDER)
    flags = {
        "model.model_name_or_path": tiny_bert,
        "data.train_path": "train.jsonl",
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 5,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks": "recorder.Recorder",
        "trainer.callbacks.every": steps // MEASURES,
        "checkpoint.every_n_train_steps": steps // 10,
    }
    arguments = ["fit", *(f"--{name}={value}" for name, value in flags.items())]
    run = Ranks(embedtune, arguments, folder=tmp_path)
    assert run.wait(seconds=3600) == [0], run.output()[-5000:]
    held = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    assert held[-1]["step"] == steps
    for name in ("files", "threads"):
        assert len({measure[name] for measure in held[WARM_UP:]}) == 1, held
    taken = [measure["kilobytes"] / 1024 for measure in held[WARM_UP:]]
    half = len(taken) // 2
    assert statistics.median(taken[half:]) - statistics.median(taken[:half]) < MEGABYTES, held
    sys.stdout.write(f"{taken[0]:.1f} MB, at the end {taken[-1]:.1f} MB; {held[-1]}\n")
