"""Which strategy a name stands for, and which checkpoints it takes."""

from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy, StrategyRegistry
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from embedtune.checkpoints.shards import Kind, is_zero3, kind_of
from embedtune.distributed.fsdp import FSDP
from embedtune.distributed.zero import ZeRO
from embedtune.errors import InputError

NAMED: dict[str, tuple[type[FSDP] | type[ZeRO], dict[str, Any]]] = {
    "fsdp": (FSDP, {}),
    "zero1": (ZeRO, {"stage": 1}),
    "zero2": (ZeRO, {"stage": 2}),
    "zero3": (ZeRO, {"stage": 3}),
    "zero3_offload": (
        ZeRO,
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}
"""What ``trainer.strategy`` takes by name, beside Lightning's own names."""
FOREIGN = ("deepspeed", "fsdp_", "ddp_spawn", "ddp_fork", "ddp_notebook")
"""How those of Lightning's names begin that are refused."""


def named_strategy(name: str) -> Strategy | str:
    """Return the strategy of a name; one of Lightning's own is left to it.

    Raises:
        InputError: There is no such name, or what it needs is not installed.
    """
    known = sorted({*NAMED, "auto", *StrategyRegistry.available_strategies()})
    foreign = [other for other in known if other.startswith(FOREIGN)]
    known = [other for other in known if other not in foreign]
    if name not in known:
        raise InputError(f"trainer.strategy: expected one of {', '.join(known)}, found {name!r}")
    if name not in NAMED:
        return name
    kind, settings = NAMED[name]
    return kind(**settings)


def set_timeout(strategy: Strategy, seconds: float) -> None:
    """Let ranks wait so long for each other, unless the strategy was given a time of its own."""
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        cast(Any, strategy)._timeout = timedelta(seconds=seconds)


def refuse_unsupported(trainer: pl.Trainer) -> None:
    """Refuse what would train wrongly, or fail later with a library's traceback.

    Lightning's own FSDP and DeepSpeed round what a batch holds, and divide losses twice.

    Raises:
        InputError: It names the key, what was found and what is expected.
    """
    strategy = trainer.strategy
    for kind, ours in ((FSDPStrategy, FSDP), (DeepSpeedStrategy, ZeRO)):
        if isinstance(strategy, kind) and not isinstance(strategy, ours):
            raise InputError(
                f"trainer.strategy: expected embedtune.distributed.{ours.__name__}, "
                f"found {type(strategy).__name__}"
            )
    _refuse_copies(trainer)
    if shards_parameters(strategy):
        _refuse_routes(strategy, cast(Any, trainer.lightning_module).encoder)
    if isinstance(strategy, FSDP | ZeRO):
        _refuse_scalars(strategy, trainer.lightning_module)
    if not isinstance(strategy, ZeRO):
        return
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        raise InputError("trainer.gradient_clip_algorithm: expected norm under ZeRO, found value")
    if str(trainer.precision).startswith("16") and strategy.root_device.type == "cpu":
        raise InputError(
            "trainer.precision: expected bf16-mixed or 32-true under ZeRO on a CPU, "
            f"found {trainer.precision}"
        )


def _refuse_copies(trainer: pl.Trainer) -> None:
    """Refuse to train copies of a module in processes that Lightning starts within this one.

    It hands back weights alone: the module at hand would lack a new projection and its prompts.

    Raises:
        InputError: It names such a strategy.
    """
    is_copy = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    if is_copy and trainer.state.fn == TrainerFn.FITTING:
        raise InputError(
            "trainer.strategy: expected processes that each run the script or the command, such as "
            "ddp, for those of ddp_spawn, ddp_fork and ddp_notebook train copies of this module"
        )


def _refuse_routes(strategy: Any, encoder: Any) -> None:
    """Refuse towers, of which ranks need one or the other at a time.

    Ranks put a layer together from what each hands in next: layers of two towers would be mixed.

    Raises:
        InputError: The model has them, and several ranks divide its parameters.
    """
    if encoder.routes and strategy.world_size > 1:
        raise InputError(
            "trainer.strategy: expected ddp, zero1 or zero2 for a model with towers for queries "
            f"and documents, found {describe_strategy(strategy)}"
        )


def _refuse_scalars(strategy: FSDP | ZeRO, module: nn.Module) -> None:
    """Refuse parameters that have no dimension to be divided along.

    DeepSpeed fails where it sends them to the other ranks, one rank and frozen ones included.

    Raises:
        InputError: A loss, or the model, has one.
    """
    # On one rank FSDP is not told of those that are frozen.
    takes_frozen = isinstance(strategy, FSDP) and strategy.world_size == 1
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0 and (parameter.requires_grad or not takes_frozen):
            raise InputError(
                f"trainer.strategy: {type(strategy).__name__} divides parameters along a "
                f"dimension: expected {name} of shape (1,), as torch.ones(1) is, or strategy ddp, "
                "found a scalar of shape ()"
            )


def refuse_checkpoint(strategy: Strategy, path: Path) -> None:
    """Refuse a checkpoint that a strategy cannot go on from.

    Raises:
        InputError: It was saved by another strategy.
    """
    kind = kind_of(path)
    takes: dict[Kind, bool] = {
        "file": not isinstance(strategy, FSDP | ZeRO),
        "fsdp": isinstance(strategy, FSDP),
        "zero": isinstance(strategy, ZeRO),
    }
    saved = {"file": "one process or DDP", "fsdp": "FSDP", "zero": "ZeRO"}[kind]
    if kind == "zero":
        # Stage 3 divides otherwise, and neither of DeepSpeed's readers knows the other's files.
        saved = f"ZeRO stage {'3' if is_zero3(path) else '1 or 2'}"
        takes[kind] = isinstance(strategy, ZeRO) and strategy.zero_stage_3 == is_zero3(path)
    if not takes[kind]:
        raise InputError(
            f"ckpt_path: {path} was saved by {saved}: expected the same trainer.strategy, found "
            f"{describe_strategy(strategy)}; embedtune export makes a model of it for any strategy"
        )


def describe_strategy(strategy: Strategy) -> str:
    """Return the name of a strategy for people to read."""
    stage = f" stage {strategy.stage}" if isinstance(strategy, ZeRO) else ""
    return type(strategy).__name__.removesuffix("Strategy") + stage


def shards_parameters(strategy: Strategy) -> bool:
    """Tell whether ranks hold parts of the parameters, so that all must run forward alike."""
    return isinstance(strategy, FSDP) or (isinstance(strategy, ZeRO) and strategy.zero_stage_3)


def whole_weights(strategy: Strategy, encoder: nn.Module) -> dict[str, Tensor]:
    """Return the encoder's whole weights on the CPU, in the precision of the optimiser.

    All ranks must call it; those other than 0 may get an empty dict.
    """
    if isinstance(strategy, FSDP | ZeRO):
        return strategy.whole_weights(encoder)
    if not cast(Any, strategy).is_global_zero:
        return {}
    return {name: tensor.cpu() for name, tensor in encoder.state_dict().items()}
