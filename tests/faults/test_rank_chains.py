"""Going on with another number of ranks, again and again, is on the examples and steps of one run.

`pytest tests/faults/test_rank_chains.py --chains 500` tries a twentieth of that many chains.
"""

import json
import random
import signal
from pathlib import Path

import pytest
from forks import Ranks, embedtune

from embedtune.checkpoints.find import last_checkpoint
from embedtune.checkpoints.read import read_facts
from embedtune.export.folder import is_verified

STRATEGIES = Path(__file__).parents[2] / "configs" / "strategy"
EXAMPLES, BATCH, EPOCHS = 18, 4, 2
BATCHES = 5  # of an epoch, the last of two examples
RECORDER = """
import json
import os
import signal

import lightning.pytorch as pl


class Recorder(pl.Callback):
    def __init__(self, stop: int, name: str):
        self.stop, self.name, self.seen = stop, name, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen == self.stop:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1
        with open(f"{self.name}-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([trainer.current_epoch, batch.example_id.tolist()]) + "\\n")
"""


def run(
    folder: Path, model: Path, root: str, strategy: str, ranks: int, stop: int, name: str
) -> tuple[list[int | None], str, list]:
    """Go on, be killed before a batch (not for -1); return the codes, the output, and the examples.

    Of each step, those of all ranks in their order.
    """
    flags = {
        "model.model_name_or_path": model,
        "data.train_path": "train.jsonl",
        "data.batch_size": BATCH // ranks,
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_epochs": EPOCHS,
        "trainer.callbacks": "recorder.Recorder",
        "trainer.callbacks.stop": stop,
        "trainer.callbacks.name": name,
        "checkpoint.every_n_train_steps": 2,
        "save_on_epoch_end": False,
        "ckpt_path": "last",
    }
    overlay = []
    if strategy != "ddp" or ranks == 2:
        overlay = [f"--config={STRATEGIES / strategy}.yaml", f"--trainer.devices={ranks}"]
    arguments = ["fit", *overlay, *(f"--{key}={value}" for key, value in flags.items())]
    started = Ranks(embedtune, arguments, folder=folder, ranks=ranks)
    codes, seen = started.wait(), []
    for rank in range(ranks):
        path = folder / f"{name}-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        seen.append([json.loads(line) for line in lines])
    steps = [
        [parts[0][0], [example for _, ids in parts for example in ids]]
        for parts in zip(*seen, strict=False)
    ]
    return codes, started.output(), steps


@pytest.mark.timeout(0)
@pytest.mark.slow
def test_a_chain_over_other_numbers_of_ranks_is_one_run(tiny_bert, tmp_path, request):
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(EXAMPLES)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recorder.py").write_text(RECORDER)
    codes, output, whole = run(tmp_path, tiny_bert, "whole", "ddp", 1, -1, "whole")
    assert codes == [0], output
    assert len(whole) == EPOCHS * BATCHES
    chance = random.SystemRandom()
    for number in range(request.config.getoption("--chains") // 20):
        strategy, root = chance.choice(["ddp", "fsdp", "zero2"]), f"chain-{number}"
        for segment, ranks in enumerate((1, 2, 1) if chance.random() < 0.5 else (2, 1, 2)):
            stop = -1 if segment == 2 else chance.randrange(1, BATCHES)
            path = last_checkpoint(tmp_path / root / "checkpoints")
            place = {"epoch": 0, "batch": 0} if path is None else read_facts(path)["place"]
            start = place["epoch"] * BATCHES + place["batch"]
            name = f"{root}-{segment}"
            codes, output, seen = run(tmp_path, tiny_bert, root, strategy, ranks, stop, name)
            assert set(codes) <= {-signal.SIGKILL, 1} if stop > 0 else set(codes) == {0}, output
            assert seen == whole[start : start + len(seen)], (strategy, ranks, stop, output)
        assert start + len(seen) == len(whole)
        ends = [
            read_facts(last_checkpoint(tmp_path / of / "checkpoints")) for of in (root, "whole")
        ]
        assert ends[0]["place"] == ends[1]["place"]
        assert is_verified(tmp_path / root / "model")
