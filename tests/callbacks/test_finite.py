"""A loss or gradient that is no number ends the fit in its step, with the rows and a good model."""

import csv
import json
from importlib import import_module
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.callbacks import finite
from embedtune.checkpoints import last_checkpoint, read_facts, read_weights
from embedtune.cli import main
from embedtune.distributed import exchange
from embedtune.errors import TrainingError

ROWS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(12)]
LOSSES = """
import torch
from embedtune.losses import InfoNCE


class Breaking(InfoNCE):
    def __init__(self, at: int, what: str = "loss", times: int = 1):
        super().__init__()
        self.at, self.what, self.times, self.calls = at, what, times, 0

    def forward(self, embeddings, target):
        parts, call = super().forward(embeddings, target), self.calls
        self.calls += 1
        if not self.at <= call < self.at + self.times:
            return parts
        if self.what == "loss":
            return {"loss": parts["loss"] * float("nan")}
        query = embeddings.query  # a loss of 0 whose gradient is infinite
        return {"loss": parts["loss"] + (query - query.detach()).abs().sqrt().sum()}
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("breaking.py").write_text(LOSSES)


def fit(model, *flags: str) -> list[str]:
    """Train 6 steps, 3 an epoch, and save each; return the losses that were logged."""
    given = {
        "model.model_name_or_path": model,
        "data.train_path": "train.jsonl",
        "data.batch_size": 4,
        "data.shuffle": False,
        "trainer.default_root_dir": "run",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": False,
        "checkpoint.every_n_train_steps": 1,
        "log_with": "csv",
    }
    main(["fit", *(f"--{name}={value}" for name, value in given.items()), *flags])
    with Path("run/metrics.csv").open() as lines:
        return [row["train/loss"] for row in csv.DictReader(lines) if row["train/loss"]]


def breaking(at: int, what: str, times: int = 1) -> list[str]:
    values = {"at": at, "what": what, "times": times}
    flags = [f"--model.loss.init_args.{name}={value}" for name, value in values.items()]
    return ["--model.loss=breaking.Breaking", *flags]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_fit_ends_in_that_step(tiny_bert, capsys, what, accumulated):
    accumulates = f"--trainer.accumulate_grad_batches={accumulated}"
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, *breaking(4, what), accumulates)
    said = capsys.readouterr().err
    assert (caught.value.code, "Traceback" in said) == (1, False)
    done = {1: 4, 2: 2}[accumulated]  # the fifth batch is the second of the second epoch
    assert f"step {done + 1}: the {what} is " in said
    assert "its batch is of train.jsonl:5, train.jsonl:6, train.jsonl:7, train.jsonl:8" in said
    assert f"the last checkpoint is run/checkpoints/last.ckpt (step {done})" in said
    last = last_checkpoint(Path("run/checkpoints"))
    assert read_facts(last)["global_step"] == done
    assert all(value.isfinite().all() for value in read_weights(last).values())
    assert not Path("run/model").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_as_many_steps_as_asked_are_left_out(tiny_bert, caplog, capsys, what):
    with caplog.at_level("WARNING", logger="embedtune"):
        fit(tiny_bert, *breaking(2, what, times=2), "--skip_nonfinite=2")
    assert "step 3 is left out (1 of 2 that are tolerated)" in caplog.text
    assert Path("run/model/modules.json").is_file()
    weights = read_weights(last_checkpoint(Path("run/checkpoints")))
    assert all(value.isfinite().all() for value in weights.values())
    with pytest.raises(SystemExit):
        fit(tiny_bert, *breaking(2, what, times=2), "--skip_nonfinite=1")
    assert "step 4: the gradient is" in capsys.readouterr().err


def test_each_fit_counts_its_own(tiny_bert, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    counting = finite.Finite(skip_nonfinite=1)
    for _ in range(2):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[counting],
        )
        module = EmbeddingModule(str(tiny_bert), loss=import_module("breaking").Breaking(at=1))
        trainer.fit(module, EmbeddingDataModule("train.jsonl", batch_size=4))
        assert trainer.global_step == 2


def test_a_scaler_leaves_no_more_losses_out_than_asked(tiny_bert, caplog, monkeypatch):
    """It would skip every step whose loss is no number, to the end of the fit."""
    monkeypatch.syspath_prepend(Path.cwd())
    loss = import_module("breaking").Breaking(at=2, times=3)
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[finite.Finite(skip_nonfinite=2)],
    )
    module = EmbeddingModule(str(tiny_bert), loss=loss)
    with pytest.raises(TrainingError, match=r"the loss is nan; its batch is of train\.jsonl"):
        trainer.fit(module, EmbeddingDataModule("train.jsonl", batch_size=4, shuffle=False))
    assert "(2 of 2 that are tolerated): its loss is nan" in caplog.text


def test_a_step_that_is_left_out_changes_nothing(tiny_bert, monkeypatch):
    """The weights before it are those after it, and the next step is taken."""
    before: list[dict[str, torch.Tensor]] = []
    fit(tiny_bert, *breaking(1, "loss"), "--skip_nonfinite=1", "--checkpoint.save_top_k=-1")
    for step in (1, 2, 3):
        (path,) = Path("run/checkpoints").glob(f"*step={step}.ckpt")
        before.append(read_weights(path))
    first, second, third = before
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)


def test_a_rank_without_a_gradient_exchanges_as_the_others(monkeypatch):
    """Under FSDP a small part that is trained, such as a projection, may be all another rank's."""
    asked: list[float] = []
    monkeypatch.setattr(exchange, "sum_over_ranks", lambda own: asked.append(float(own)) or own)
    trainer, module = pl.Trainer(accelerator="cpu", logger=False), pl.LightningModule()
    module.own = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    trainer.strategy.connect(module)
    finite.Finite().on_before_optimizer_step(trainer, module, torch.optim.SGD([module.own]))
    assert asked == [0]


def test_a_loss_of_zero_is_told(tiny_bert, caplog):
    with caplog.at_level("WARNING", logger="embedtune"):
        Path("train.jsonl").write_text(
            "".join(json.dumps({**row, "pos": ["the same"]}) + "\n" for row in ROWS)
        )
        fit(tiny_bert, "--trainer.max_steps=1")
    assert "the loss of the first batch is 0" in caplog.text


class Answered:
    """An event of a device that is never behind."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_where_a_gpu_is_not_waited_for_its_optimiser_leaves_the_step_out(
    what, every, tiny_bert, monkeypatch, capsys
):
    flags = ["--model.loss", "breaking.Breaking", "--model.loss.at", "2"]
    flags += ["--model.loss.what", what, f"--checkpoint.every_n_train_steps={every}"]
    monkeypatch.setattr(finite, "_runs_ahead", lambda trainer: True)
    monkeypatch.setattr(torch.cuda, "Event", Answered)
    with pytest.raises(SystemExit) as ended:
        fit(str(tiny_bert), *flags)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"step 3: the {what} is " in said
    assert "its batch is of train.jsonl:9, train.jsonl:10" in said
    saved = Path("run/checkpoints/last.ckpt")
    if every == 3:
        assert not saved.exists()
        return
    assert read_facts(saved)["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in read_weights(saved).values())
