"""Ranks that divide parameters gather them in one order: a model has one way for all texts."""

import lightning.pytorch as pl
import pytest
import zoo_models
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling

from embedtune import EmbeddingModule
from embedtune.distributed.strategies import named_strategy, refuse_unsupported
from embedtune.errors import InputError


@pytest.fixture
def module(tmp_path) -> EmbeddingModule:
    towers = [[zoo_models.small_bert(tmp_path / role), Pooling(16)] for role in ("q", "d")]
    zoo_models.save([Router.for_query_document(*towers)], tmp_path / "model")
    return EmbeddingModule(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "ranks", "found"),
    [
        ("fsdp", 2, "FSDP"),
        ("zero3", 2, "ZeRO stage 3"),
        ("zero2", 2, None),
        ("ddp", 2, None),
        ("fsdp", 1, None),
    ],
)
def test_towers_are_refused_where_ranks_divide_parameters(module, monkeypatch, name, ranks, found):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=named_strategy(name), **quiet)
    trainer.strategy.connect(module)
    monkeypatch.setattr(type(trainer.strategy), "world_size", ranks)
    if found is None:
        refuse_unsupported(trainer)
        return
    said = "expected ddp, zero1 or zero2 for a model with towers for queries and documents, found "
    with pytest.raises(InputError, match=said + found):
        refuse_unsupported(trainer)
