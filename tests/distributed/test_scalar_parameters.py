"""FSDP and ZeRO divide no scalar: that is said before anything is wrapped."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.distributed.fsdp import FSDP
from embedtune.distributed.strategies import named_strategy, refuse_unsupported
from embedtune.errors import InputError
from embedtune.losses import InfoNCE


class Scaled(InfoNCE):
    """InfoNCE with a scale that is learnt."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, embeddings, target):
        return {"loss": self.scale.sum() * super().forward(embeddings, target)["loss"]}


def trainer_of(module: EmbeddingModule, strategy: str = "fsdp") -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=named_strategy(strategy), **quiet)
    trainer.strategy.connect(module)
    return trainer


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("use_mrl", [False, True])
def test_a_scalar_of_a_loss_is_refused(tiny_bert, use_mrl, strategy):
    more = {"use_mrl": True, "mrl_dims": [8]} if use_mrl else {}
    whole = EmbeddingModule(str(tiny_bert), loss=Scaled((1,)), **more)
    refuse_unsupported(trainer_of(whole, strategy))
    scalar = EmbeddingModule(str(tiny_bert), loss=Scaled(()), **more)
    name = r"\.loss\.scale" if use_mrl else r"\.scale"
    with pytest.raises(InputError, match=rf"expected loss{name} of shape \(1,\)"):
        refuse_unsupported(trainer_of(scalar, strategy))


def test_a_scalar_of_the_model_is_refused_where_fsdp_is_told_of_it(tiny_bert, monkeypatch):
    module = EmbeddingModule(str(tiny_bert))
    module.encoder.model[0].gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InputError, match=r"expected encoder\..*gain of shape"):
        refuse_unsupported(trainer_of(module))
    module.encoder.model[0].gain.requires_grad_(False)
    refuse_unsupported(trainer_of(module))  # left alone on one rank
    monkeypatch.setattr(FSDP, "world_size", 2)
    with pytest.raises(InputError, match=r"expected encoder\..*gain of shape"):
        refuse_unsupported(trainer_of(module))


def test_a_fit_says_so_in_one_line(tmp_path, tiny_bert):
    (tmp_path / "rows.jsonl").write_text('{"query": "a", "pos": ["b"]}\n' * 4)
    module = EmbeddingModule(str(tiny_bert), loss=Scaled(()))
    data = EmbeddingDataModule(str(tmp_path / "rows.jsonl"), batch_size=2)
    with pytest.raises(InputError, match="or strategy ddp, found a scalar"):
        trainer_of(module).fit(module, data)
