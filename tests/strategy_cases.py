"""Small runs under every strategy; `torchrun strategy_cases.py FOLDER CASES` runs them on ranks.

The same function runs in one process and on several, so that only the strategy differs.
"""

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from embedtune import EmbeddingDataModule, EmbeddingModule, ExportModel
from embedtune.callbacks.baseline import Baseline
from embedtune.distributed import exchange
from embedtune.distributed.strategies import named_strategy, whole_weights
from embedtune.losses import CoSENT, Distillation, InfoNCE, ListwiseKL

TEACHER_WIDTH = 24


class Unmasked(InfoNCE):
    """InfoNCE that takes every other document for a negative."""

    def at_widths(self, embeddings, target, dims):
        all_differ = torch.arange(len(target.positive_id), device=target.positive_id.device)
        none_known = torch.zeros_like(target.known_positive_id)
        unaware = target._replace(positive_id=all_differ, known_positive_id=none_known)
        return super().at_widths(embeddings, unaware, dims)


LOSSES = {
    "pair": lambda: InfoNCE(0.1),
    "multi_positive": lambda: InfoNCE(0.1, multi_positive=True),
    "over_rank": lambda: InfoNCE(0.1, over="rank"),
    "unmasked": lambda: Unmasked(0.1),
    "triplet": lambda: InfoNCE(0.1, in_batch_positives=True),
    "scored": lambda: ListwiseKL(temperature=0.1, teacher_temperature=0.1),
    "lists": lambda: ListwiseKL("list", 0.1, 0.1, in_batch_negatives=False),
    "batch": lambda: ListwiseKL("batch", 0.1, 0.1),
    "cosent": lambda: CoSENT(),
    "distill": lambda: Distillation(over="global", similarity_weight=10.0, rank_weight=10.0),
    "distill_over_rank": lambda: Distillation(similarity_weight=10.0, rank_weight=10.0),
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
        elif name in ("pair", "triplet", "duplicated", "shared"):
            # "duplicated": every document of the first half once more in the second.
            j = i % (count // 2) if name == "duplicated" else i
            if (
                name == "shared"
            ):  # each query of a half is in the other, with a neighbour's document
                h = i % (count // 2)
                row["query"], j = f"{words(1 + h % 4, h)} {h}", h ^ (i // (count // 2))
            row["pos"] = [f"{words(2 + 7 * j % 29, j + 1)} {j}"]
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
        configured = super().configure_optimizers()
        for settings in configured["optimizer"].param_groups:
            settings["eps"] = 1e-4  # or noise in a gradient that is zero moves weights by the rate
        return configured

    def setup(self, stage):
        super().setup(stage)
        if self.loss is not None:
            self.loss.register_forward_pre_hook(self._record_inputs)
        self.start = {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}

    def _record_inputs(self, loss, inputs):
        tensors = [value for given in inputs for value in given if value is not None]
        self.precisions |= {str(value.dtype) for value in tensors if value.is_floating_point()}
        self.precisions |= {"autocast"} if torch.is_autocast_enabled(self.device.type) else set()

    def training_step(self, batch, batch_idx):
        ids = batch.example_id.tolist()
        negatives = batch.negative_id.view(len(batch.query), -1)[: len(ids)].tolist()
        numbers = batch.scores if batch.teacher is None else batch.teacher
        self.seen.append((ids, negatives, None if numbers is None else numbers.clone()))
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


class KeepWeights(pl.Callback):
    """Keep what a rank holds and the whole weights at the end, while the strategy holds them."""

    def on_train_end(self, trainer, pl_module):
        self.logged = trainer.callback_metrics["train/loss"].item()
        (optimizer,) = trainer.optimizers
        optimizer = getattr(optimizer, "optimizer", optimizer)  # in that of DeepSpeed
        states = [value for state in optimizer.state.values() for value in state.values()]
        trained = [p for p in trainer.strategy.model.parameters() if p.requires_grad]
        self.held = {
            "parameters": sum(getattr(p, "ds_tensor", p).numel() for p in trained),
            "states": sum(value.numel() for value in states if value.dim()),
        }
        weights = whole_weights(trainer.strategy, pl_module.encoder)
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}


def run(case: dict, folder: Path, ranks: int) -> dict:
    """Run a case.

    Returns:
        The first and the last weights, and of each step the loss and what it was given; or the
        validation loss.
    """
    # Another seed on each rank: what is drawn must be shared by it that has drawn it.
    pl.seed_everything(1 + int(os.environ.get("RANK", 0)), verbose=False)
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
        **{"projection_init": "orthogonal", **case.get("module", {})},
    )
    module.adamw, module.seen, module.losses = case.get("adamw", False), [], []
    module.precisions = set()
    validated = str(data_path) if case.get("validate") else None
    data = EmbeddingDataModule(
        str(data_path),
        val_path=evaluated_paths(folder, data_path) if case.get("evaluate") else validated,
        batch_size=case["batch"] // ranks,
        tokens_per_chunk=64,
        **settings,
    )
    keep = KeepWeights()
    baseline = [Baseline()] if case.get("evaluate") else []
    trainer = make_trainer(case, folder, ranks, [*baseline, keep])
    checkpoint = folder / case["from"] if "from" in case else None
    if case.get("validate"):
        return trainer.validate(module, data, ckpt_path=checkpoint, verbose=False)[0]
    trainer.fit(module, data, ckpt_path=checkpoint)
    return {
        "start": {name: tensor.cpu() for name, tensor in module.start.items()},
        "weights": keep.weights,
        "held": keep.held,
        "logged": keep.logged,
        "losses": module.losses,
        "precisions": module.precisions,
        "base": module.base_metrics,
        "metrics": module.metrics,
        "intervals": {name: list(ends) for name, ends in module.intervals.items()},
        "seen": module.seen,
    }


def evaluated_paths(folder: Path, data_path: Path) -> dict[str, str]:
    scored = folder / "data" / "scored-pairs.jsonl"
    return {"docs": str(folder / "data" / "docs"), "pairs": str(scored), "loss": str(data_path)}


def make_trainer(case: dict, folder: Path, ranks: int, callbacks: list) -> pl.Trainer:
    root = folder / case["name"]
    if case.get("export"):
        callbacks.append(ExportModel(save_on_epoch_end=False))
    if every := case.get("checkpoint_every"):
        kept = {"save_last": "link"} if case.get("rotate") else {"save_top_k": -1}
        callbacks.append(
            ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=every, **kept)
        )
    return pl.Trainer(
        accelerator=case.get("accelerator", "cpu"),
        devices=ranks,
        strategy=strategy_of(case),
        default_root_dir=str(root),
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


def strategy_of(case: dict):
    settings = case["strategy"]
    strategy = named_strategy(settings)
    if settings.startswith("zero3"):  # or small parameters are kept whole, and nothing is proven
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


def write_testsets(folder: Path) -> None:
    """Write a retrieval set with grades, where documents occur twice, and scored pairs."""
    found = rows("triplet", 37)
    documents = [text for row in found for text in (*row["pos"], row["neg"][0])] + found[3]["pos"]
    lines = {
        "corpus.jsonl": [{"_id": f"d{i}", "text": text} for i, text in enumerate(documents)],
        "queries.jsonl": [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(found)],
    }
    (folder / "docs" / "qrels").mkdir(parents=True)
    for name, made in lines.items():
        (folder / "docs" / name).write_text("".join(json.dumps(line) + "\n" for line in made))
    grades = [f"q{i}\td{j}\t{1 + j % 3}\n" for i in range(37) for j in (2 * i, (5 * i) % 74)]
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "docs" / "qrels" / "dev.tsv").write_text(header + "".join(dict.fromkeys(grades)))
    scored = "".join(json.dumps(row) + "\n" for row in rows("scored", 13))
    (folder / "scored-pairs.jsonl").write_text(scored)


def write_data(folder: Path, cases: list[dict]) -> None:
    (folder / "data").mkdir()
    write_testsets(folder / "data")
    for name, count in {(case["rows"], case["count"]) for case in cases}:
        path = folder / "data" / f"{name}-{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(name, count)))
        if name == "distill":
            teacher = torch.randn(count, TEACHER_WIDTH, generator=torch.Generator().manual_seed(5))
            teacher.numpy().tofile(path.with_suffix(".f32"))


def double_gather() -> None:
    """Make the gather's gradient wrong by a factor of two."""
    right = exchange.GatherRows.backward
    exchange.GatherRows.backward = staticmethod(lambda ctx, g: right(ctx, 2 * g))


def main(folder: Path, cases_file: Path) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says
    cases = json.loads(cases_file.read_text())
    for case in cases:
        right = exchange.GatherRows.backward
        if case.get("wrong"):
            double_gather()
        result = run(case, folder, ranks)
        exchange.GatherRows.backward = staticmethod(right)
        torch.save(result, folder / f"{case['name']}-rank{exchange.rank()}.pt")
    exchange.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
