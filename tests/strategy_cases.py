"""Small runs under every strategy; `torchrun strategy_cases.py FOLDER` trains them on two ranks.

The same function trains in one process and on several, so that only the strategy differs.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune import EmbeddingDataModule, EmbeddingModule, ExportModel, gather
from embedtune.losses import CoSENT, Distillation, InfoNCE, ListwiseKL
from embedtune.optim import build_optimizer
from embedtune.strategies import named_strategy, whole_weights
from embedtune.teacher_store import TeacherWriter

TEACHER_WIDTH = 24
LOSSES = {
    "pair": lambda: InfoNCE(0.1),
    "triplet": lambda: InfoNCE(0.1, in_batch_positives=True),
    "scored": lambda: ListwiseKL(temperature=0.1, teacher_temperature=0.1),
    "batch": lambda: ListwiseKL("batch", 0.1, 0.1),
    "cosent": lambda: CoSENT(),
    "distill": lambda: Distillation(over="global", similarity_weight=10.0, rank_weight=10.0),
}


def words(count: int, seed: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join(letters[(seed * 7 + i * (seed % 5 + 1)) % 26] for i in range(count))


def rows(name: str, count: int) -> list[dict]:
    """Texts of very different lengths, so that ranks need different numbers of chunks."""
    made = []
    for i in range(count):
        row = {"query": f"{words(1 + i % 4, i)} {i}"}
        if name == "distill":
            row["query"] = f"{words(2 + 5 * i % 23, i)} {i}"
        elif name in ("pair", "triplet"):
            row["pos"] = [f"{words(2 + 7 * i % 29, i + 1)} {i}"]
            if name == "triplet":
                row["neg"] = [f"{words(2 + (j + i) % 9, i + j)} n{j}" for j in range(5)]
        else:
            size = 2 + i % 3
            row["pos"] = [f"{words(3 + (j + i) % 8, i + j)} {j}" for j in range(size)]
            row["scores"] = [((i * 3 + j * 5) % 7) / 7 for j in range(size)]
        made.append(row)
    return made


class RecordingModule(EmbeddingModule):
    """Plain SGD, which shows a wrong gradient scale, or AdamW; remembers what it was given."""

    adamw = False

    def configure_optimizers(self):
        if not self.adamw:
            return torch.optim.SGD(self.parameters(), lr=self.lr)
        optimizer = build_optimizer(self, self.lr, 0.01)
        for group in optimizer.param_groups:
            group["eps"] = 1e-4  # or noise in a gradient that is zero moves weights by the rate
        return optimizer

    def setup(self, stage):
        super().setup(stage)
        self.start = {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}

    def training_step(self, batch, batch_idx):
        ids = batch.example_id.tolist()
        negatives = batch.negative_id.view(len(batch.query), -1)[: len(ids)].tolist()
        teacher = None if batch.teacher is None else batch.teacher[: len(ids)].clone()
        self.seen.append((ids, negatives, teacher))
        return super().training_step(batch, batch_idx)


class KeepWeights(pl.Callback):
    """Keep the consolidated weights of the end, while the strategy holds them."""

    def on_train_end(self, trainer, pl_module):
        weights = whole_weights(trainer.strategy, pl_module.encoder)
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}


def train(case: dict, folder: Path, ranks: int) -> dict:
    """Train a case; return its first and its last weights, and what each step was given."""
    pl.seed_everything(1, verbose=False)
    name = case["rows"]
    data_path = folder / "data" / f"{name}-{case['count']}.jsonl"
    settings = dict(case.get("data", {}))
    if name == "distill":
        settings["teacher_path"] = str(data_path.with_suffix(".f32"))
    module = RecordingModule(
        case["model"],
        loss=LOSSES[case.get("loss", name)](),
        pooling=case.get("pooling"),
        lr=case["lr"],
        projection_init="orthogonal",
        **case.get("module", {}),
    )
    module.adamw, module.seen = case.get("adamw", False), []
    keep = KeepWeights()
    callbacks = [keep, *([ExportModel(save_on_epoch_end=False)] if case.get("export") else [])]
    if every := case.get("checkpoint_every"):
        checkpoints = folder / case["name"] / "checkpoints"
        callbacks.append(
            ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=every, save_top_k=-1)
        )

    data = EmbeddingDataModule(
        str(data_path), batch_size=case["batch"] // ranks, tokens_per_chunk=64, **settings
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy_of(case) if ranks > 1 else "auto",
        default_root_dir=str(folder / case["name"]),
        callbacks=callbacks,
        max_epochs=case.get("epochs", 1),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing="checkpoint_every" in case,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=case.get("precision", "32-true"),
        gradient_clip_val=case.get("clip"),
        accumulate_grad_batches=case.get("accumulate", 1),
    )
    resume = case.get("resume")
    trainer.fit(module, data, ckpt_path=None if resume is None else folder / resume)
    return {"start": module.start, "weights": keep.weights, "seen": module.seen}


def strategy_of(case: dict):
    settings = case["strategy"]
    strategy = named_strategy(settings)
    if settings.startswith("zero3"):  # or small parameters are kept whole, and nothing is proven
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


def write_data(folder: Path, cases: list[dict]) -> None:
    (folder / "data").mkdir()
    for name, count in {(case["rows"], case["count"]) for case in cases}:
        path = folder / "data" / f"{name}-{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(name, count)))
        if name == "distill":
            teacher = torch.randn(count, TEACHER_WIDTH, generator=torch.Generator().manual_seed(5))
            TeacherWriter(path.with_suffix(".f32"), count, TEACHER_WIDTH).write(teacher.numpy())


def double_gather() -> None:
    """Make the gather's gradient wrong by a factor of two."""
    right = gather._Gather.backward
    gather._Gather.backward = staticmethod(lambda ctx, g: right(ctx, 2 * g))


def main(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    for case in cases:
        right = gather._Gather.backward
        if case.get("wrong"):
            double_gather()
        result = train(case, folder, ranks=2)
        gather._Gather.backward = staticmethod(right)
        torch.save(result, folder / f"{case['name']}-rank{gather.rank()}.pt")
    gather.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
