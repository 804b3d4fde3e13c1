"""A fit in processes that Lightning starts within this one would leave its module half trained."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.trainer.states import TrainerFn

from embedtune import EmbeddingModule, InputError
from embedtune.distributed.strategies import refuse_unsupported


@pytest.mark.parametrize("function", [TrainerFn.FITTING, TrainerFn.VALIDATING])
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp"])
def test_copies_are_measured_and_not_trained(tiny_bert, strategy, function):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet)
    trainer.strategy.connect(EmbeddingModule(str(tiny_bert)))
    trainer.state.fn = function
    if strategy == "ddp" or function != TrainerFn.FITTING:
        refuse_unsupported(trainer)
        return
    with pytest.raises(InputError, match=r"expected processes that each run the script"):
        refuse_unsupported(trainer)
