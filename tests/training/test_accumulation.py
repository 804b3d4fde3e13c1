"""The gradient and the logged loss of a step are those of all its queries."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.losses import ListwiseKL, Loss
from embedtune.training.accumulation import StepMeans

ROWS = [
    {"query": f"query {i}", "pos": [f"a {i}", f"b {i * i}", "c"], "scores": [i % 3, 0.1, 0.7]}
    for i in range(23)
]


class Parts(ListwiseKL):
    """A loss with a part that only some batches have."""

    def forward(self, embeddings, target):
        found = super().forward(embeddings, target)
        odd = {"odd": found["loss"].detach() * 2} if len(embeddings.query) % 2 else {}
        return {**found, **odd}


class Watch(pl.Callback):
    """Keep the gradient and the logged loss of each step."""

    def __init__(self):
        self.gradients, self.losses, self.rates = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(found).clone())
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.losses) < len(self.gradients):
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def fit(folder, model, batch_size, *callbacks, ckpt_path=None, **settings):
    """Train at a rate of nearly 0: gradients of runs in other batches can be compared."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="32-true",
        callbacks=[watch, *callbacks],
        **{"max_epochs": 1, **settings},
    )
    module = EmbeddingModule(
        str(model), loss=Parts(in_batch_negatives=False), lr=1e-12, weight_decay=0.0, dropout=0.0
    )
    data = EmbeddingDataModule(str(path), batch_size=batch_size)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
    return watch


def assert_same_steps(found, expected):
    assert len(found.gradients) == len(expected.gradients) > 1
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * b.abs().max().item(), rtol=1e-3)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "accumulated"),
    [
        (2, 3),  # 23 rows: the last step has batches of 2, 2 and 1
        (2, 5),  # 2 and 1
        (4, 2),  # 4 and 3
        (5, 4),  # 3 alone
        (3, 100),  # all batches in one step
    ],
)
def test_a_step_is_that_of_one_batch_of_all_its_queries(
    tmp_path, tiny_bert, batch_size, accumulated
):
    settings = {"max_epochs": 2}  # each epoch ends with what is left
    expected = fit(tmp_path, tiny_bert, min(23, batch_size * accumulated), **settings)
    found = fit(tmp_path, tiny_bert, batch_size, accumulate_grad_batches=accumulated, **settings)
    assert_same_steps(found, expected)


def test_a_limit_ends_a_step_too(tmp_path, tiny_bert):
    """Of batches of 4, 4, 4 the last is a step of its own."""
    limited = {"limit_train_batches": 3, "max_epochs": 2}
    found = fit(tmp_path, tiny_bert, 4, accumulate_grad_batches=2, **limited)
    alone = fit(tmp_path, tiny_bert, 4, **limited)
    assert len(found.gradients) == 4
    for step, batch in ((1, 2), (3, 5)):
        torch.testing.assert_close(
            found.gradients[step], alone.gradients[batch], rtol=1e-3, atol=1e-5
        )
        assert found.losses[step] == pytest.approx(alone.losses[batch], rel=1e-5)


def test_another_number_in_each_epoch(tmp_path, tiny_bert):
    schedule = GradientAccumulationScheduler({0: 2, 1: 4})
    found = fit(tmp_path, tiny_bert, 3, schedule, max_epochs=2)
    assert found.rates[-1] < max(found.rates) / 5, "it falls over the 6 steps"
    by_two, by_four = (fit(tmp_path, tiny_bert, size, max_epochs=2) for size in (6, 12))
    assert len(found.gradients) == 4 + 2
    for i, expected in enumerate([*by_two.gradients[:4], *by_four.gradients[2:]]):
        torch.testing.assert_close(found.gradients[i], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 4, 5])
def test_another_number_in_each_epoch_goes_on(tmp_path, tiny_bert, steps):
    """In the middle of the first epoch, at its end, and in the middle of the second."""
    schedule = {0: 2, 1: 4}
    expected = fit(tmp_path, tiny_bert, 3, GradientAccumulationScheduler(schedule), max_epochs=2)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tmp_path, tiny_bert, 3, GradientAccumulationScheduler(schedule), saved, max_epochs=2)
    found = fit(
        *(tmp_path, tiny_bert, 3, GradientAccumulationScheduler(schedule)),
        ckpt_path=tmp_path / f"step={steps}.ckpt",
        max_epochs=2,
    )
    for name in ("gradients", "losses"):
        setattr(expected, name, getattr(expected, name)[steps:])
    assert len(found.gradients) == 6 - steps
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-3, atol=1e-5)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


class Scaled(Loss):
    """A sum over the batch, which is no mean over queries: batches are weighed all the same."""

    def forward(self, embeddings, target):
        return {"loss": embeddings.query.sum()}


def test_without_accumulation_a_loss_is_left_as_it_is(tmp_path, tiny_bert):
    watch, returned = Watch(), []

    class Keep(EmbeddingModule):
        def _compute_loss(self, batch):
            found = super()._compute_loss(batch)
            returned.append(found[1]["loss"])
            return found

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert loss is returned[-1]
            return loss

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[watch],
    )
    trainer.fit(Keep(str(tiny_bert), loss=Scaled()), EmbeddingDataModule(str(path), batch_size=5))
    assert watch.losses == [loss.float().item() for loss in returned]
    assert len(watch.losses) == 5


def test_means_over_a_step():
    means = StepMeans()
    value = torch.tensor(0.1)
    assert means.add({"loss": value}, 3, is_first=True)["loss"] is value
    found = means.add({"loss": torch.tensor(0.5), "odd": torch.tensor(7.0)}, 1, is_first=False)
    assert {k: v.item() for k, v in found.items()} == pytest.approx({"loss": 0.2, "odd": 7.0})
    again = means.add({"loss": torch.tensor(math.inf)}, 1, is_first=False)
    assert {k: v.item() for k, v in again.items()} == {"loss": math.inf}
    assert means.add({"loss": value}, 2, is_first=True)["loss"] is value
