"""Data from which a loss would learn nothing is refused or told, with the reason."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest

from embedtune import EmbeddingDataModule, EmbeddingModule, InputError
from embedtune.losses import CoSENT, InfoNCE, ListwiseKL, Matryoshka

PAIRS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(4)]


def fit(folder: Path, model, rows: list[dict], data: dict | None = None, **module) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(EmbeddingModule(str(model), **module), EmbeddingDataModule(str(path), **data or {}))


@pytest.mark.parametrize("rows", [PAIRS, PAIRS[:1]])
def test_a_batch_of_one_pair_has_no_negative(tmp_path, tiny_bert, rows):
    size = {"batch_size": 1 if len(rows) > 1 else 8}
    with pytest.raises(InputError, match=r"data.batch_size: .* at least 2 pairs .*, found 1"):
        fit(tmp_path, tiny_bert, rows, size)


def test_a_hard_negative_is_enough(tmp_path, tiny_bert):
    fit(tmp_path, tiny_bert, [{**PAIRS[0], "neg": ["wrong"]}], {"batch_size": 1})


@pytest.mark.parametrize(
    "loss", [InfoNCE(over="rank"), Matryoshka(InfoNCE(), [8]), Matryoshka(ListwiseKL(), [8])]
)
def test_a_wrapped_loss_is_looked_into(tmp_path, tiny_bert, loss):
    rows, expected = PAIRS, "found 1"
    if isinstance(loss, Matryoshka) and isinstance(loss.loss, ListwiseKL):
        rows = [{**row, "scores": [i / 4]} for i, row in enumerate(PAIRS)]
        expected = "rows.jsonl:1: expected lists of at least two texts"
    with pytest.raises(InputError, match=expected):
        fit(tmp_path, tiny_bert, rows, {"batch_size": 1}, loss=loss)


def test_scores_that_are_all_alike_are_told(tmp_path, tiny_bert, caplog):
    rows = [{**row, "scores": [0.5]} for row in PAIRS]
    with caplog.at_level("WARNING", logger="embedtune"):
        path = tmp_path / "rows.jsonl"
        fit(tmp_path, tiny_bert, rows, {"val_path": {"sts": str(path)}}, loss=CoSENT())
    assert "train: all scores are 0.5: they order nothing" in caplog.text
    assert "val/sts: all scores are 0.5: a Spearman correlation is 0" in caplog.text


def test_a_prompt_that_fills_the_longest_input_is_refused(tmp_path, tiny_bert):
    rows = [{**row, "prompt_for_query": "a b c d e f g h"} for row in PAIRS]
    with pytest.raises(InputError, match=r"data.query_max_len: .*'a b c.* takes, found 10"):
        fit(tmp_path, tiny_bert, rows, {"query_max_len": 10})
    fit(tmp_path, tiny_bert, rows, {"query_max_len": 11})
