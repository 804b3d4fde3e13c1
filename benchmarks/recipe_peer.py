"""The peer of the study of recipes: SentenceTransformerTrainer, by the recipes of its own pages."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from recipe_tasks import NEGATIVES, Task, read_lines
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses

BATCH, EPOCHS = 32, 2
"""As embedtune has them by default: both see as many examples."""
LR, DISTILL_LR = 2e-5, 1e-4
SCALE = 20.0
LONG = ("t2rank100.list", "t2rank100.triplet")
"""Tasks whose padded batches take more than 24 GiB: activations are computed again in backward."""


def train(
    model_name: str, task: Task, teacher: Path | None, seed: int, widths: list[int], out: Path
) -> None:
    """Train on a task and save to ``OUT/model``.

    Args:
        model_name: A sentence-transformers folder.
        task: What to train on.
        teacher: Folder of a teacher store, for distillation.
        seed: Of the trainer.
        widths: Those of MatryoshkaLoss; none for none.
        out: Folder to write to.
    """
    model = SentenceTransformer(model_name, device="cpu")
    rows = read_lines(task.rows if teacher is None else teacher / "texts.jsonl")
    loss, columns, per_list = _recipe(model, task, rows, teacher)
    if widths:
        loss = losses.MatryoshkaLoss(model, loss, widths)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        seed=seed,
        per_device_train_batch_size=BATCH * per_list,
        num_train_epochs=EPOCHS,
        learning_rate=LR if teacher is None else DISTILL_LR,
        warmup_steps=0.1,
        use_cpu=True,
        gradient_checkpointing=task.name.startswith(LONG),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        batch_sampler="no_duplicates" if task.format in ("pair", "triplet") else "batch_sampler",
        prompts=_prompts(model, columns),
    )
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(columns), loss=loss
    ).train()
    model.save(str(out / "model"))


def _recipe(
    model: SentenceTransformer, task: Task, rows: list[dict[str, Any]], teacher: Path | None
) -> tuple[Any, dict[str, list[Any]], int]:
    """Return a loss, its columns, and how many of its examples a row of ours is."""
    if teacher is not None:
        store = np.memmap(teacher / "embeddings.f32", dtype=np.float32, mode="r")
        labels = store.reshape(len(rows), -1).tolist()
        columns = {"query": [row["query"] for row in rows], "label": labels}
        return losses.MSELoss(model), columns, 1
    if task.format in ("list", "sts"):
        pairs = [
            (row["query"], text, score)
            for row in rows
            for text, score in zip(row["pos"], row["scores"], strict=True)
        ]
        columns = dict(
            zip(("query", "positive", "label"), map(list, zip(*pairs, strict=True)), strict=True)
        )
        return losses.CoSENTLoss(model, scale=SCALE), columns, len(pairs) // len(rows)
    count = NEGATIVES if task.format == "triplet" else 0
    names = ["query", "positive", *(f"negative_{i}" for i in range(count))]
    examples = [
        (row["query"], text, *(row.get("neg", []) * count)[:count])
        for row in rows
        for text in row["pos"]
    ]
    columns = dict(zip(names, map(list, zip(*examples, strict=True)), strict=True))
    return losses.MultipleNegativesRankingLoss(model, scale=SCALE), columns, 1


def _prompts(model: SentenceTransformer, columns: dict[str, list[Any]]) -> dict[str, str] | None:
    """Return the model's own prompt of each column of texts."""
    query, document = (model.prompts.get(role) or "" for role in ("query", "document"))
    found = {name: query if name == "query" else document for name in columns if name != "label"}
    return found if query or document else None
