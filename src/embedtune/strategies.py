"""FSDP and DeepSpeed ZeRO as this package trains with them, on GPUs and on CPU processes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import (
    DeepSpeedPrecision,
    FSDPPrecision,
    Precision,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from embedtune.errors import InputError

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# --- FSDP -------------------------------------------------------------------------------


class _FSDPPrecision(FSDPPrecision):
    """Clips by the norm over all shards, and leaves what a batch holds in float32."""

    root: FullyShardedDataParallel
    device_type: str = "cuda"

    def clip_grad_by_norm(self, optimizer: Any, clip_val: int | float) -> None:
        self.root.clip_grad_norm_(clip_val)

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> AbstractContextManager:
        if self.precision in HALF:
            return torch.autocast(self.device_type, dtype=HALF[self.precision])
        return super().forward_context()

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:  # type: ignore[override]
        if self.precision not in HALF:
            return None
        return MixedPrecision(
            param_dtype=HALF[self.precision],
            reduce_dtype=torch.float32,
            buffer_dtype=torch.float32,
            cast_root_forward_inputs=False,  # scores and teacher embeddings
        )


class FSDP(FSDPStrategy):
    """Fully sharded data parallel: parameters, gradients and optimiser states are divided.

    Checkpoints are folders with a file per rank.
    """

    def __init__(self, block_classes: list[str] | None = None, **kwargs: Any) -> None:
        """Describe the sharding.

        Args:
            block_classes: Names of the layer classes that are gathered and freed as a whole; the
                default asks the encoder.
            kwargs: Those of Lightning's FSDPStrategy, such as ``sharding_strategy``.
        """
        # A full state dict on a CPU crashes torch; sharded saves faster and less on any device.
        super().__init__(state_dict_type="sharded", **kwargs)
        self.block_classes = block_classes

    @property
    def precision_plugin(self) -> FSDPPrecision:
        """The precision, as this package needs it."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if isinstance(precision_plugin, FSDPPrecision):
            precision_plugin = _FSDPPrecision(cast(Any, precision_plugin.precision))
        self._precision_plugin = cast(Any, precision_plugin)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        policy = self.kwargs.pop("auto_wrap_policy", None) or ModuleWrapPolicy(self._blocks())
        # Lightning wraps what is not wrapped yet, but knows the numbers of GPUs alone.
        wrapped = FullyShardedDataParallel(
            module=model,
            auto_wrap_policy=policy,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )
        plugin = cast(_FSDPPrecision, self.precision_plugin)
        plugin.root, plugin.device_type = wrapped, self.root_device.type
        return super()._setup_model(wrapped)

    def _blocks(self) -> set[type[nn.Module]]:
        assert self.lightning_module is not None
        modules = list(self.lightning_module.modules())
        if self.block_classes is None:
            return cast(Any, self.lightning_module).encoder.block_classes
        known = {type(module).__name__: type(module) for module in modules}
        for name in self.block_classes:
            if name not in known:
                raise InputError(
                    f"trainer.strategy.init_args.block_classes: expected classes of the model "
                    f"({', '.join(sorted(known))}), found {name!r}"
                )
        return {known[name] for name in self.block_classes}

    def _determine_device_ids(self) -> list[int]:
        return [] if self.root_device.type == "cpu" else super()._determine_device_ids()


# --- DeepSpeed --------------------------------------------------------------------------


class _DeepSpeedPrecision(DeepSpeedPrecision):
    """Leaves what a batch holds in float32."""

    def convert_input(self, data: Any) -> Any:
        return data


class ZeRO(DeepSpeedStrategy):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020): what stage 1, 2 or 3 divides among the ranks.

    Stage 1 divides the optimiser states, 2 also the gradients, 3 also the parameters. Checkpoints
    are folders with a file per rank.
    """

    def __init__(
        self, stage: int = 2, stage3_param_persistence_threshold: int | None = None, **kwargs: Any
    ) -> None:
        """Describe the division.

        Args:
            stage: 1, 2 or 3.
            stage3_param_persistence_threshold: Parameters with fewer elements are kept whole on
                every rank; the default is DeepSpeed's.
            kwargs: Those of Lightning's DeepSpeedStrategy, such as ``offload_optimizer``.
        """
        super().__init__(stage=stage, **kwargs)
        assert isinstance(self.config, dict)
        # torch's own AdamW also updates states on the CPU.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        if stage3_param_persistence_threshold is not None:
            zero = self.config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = stage3_param_persistence_threshold

    @property
    def precision_plugin(self) -> Precision:
        """The precision, as this package needs it."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if isinstance(precision_plugin, DeepSpeedPrecision):
            precision_plugin = _DeepSpeedPrecision(cast(Any, precision_plugin.precision))
        self._precision_plugin = precision_plugin

    def setup_environment(self) -> None:
        """Join the process group, also on CPU processes."""
        devices = self.parallel_devices or []
        if not devices or devices[0].type != "cpu":
            super().setup_environment()
            return
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
        # DeepSpeed wants a number from every device.
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(devices))]
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning also steps with what is left at the end of an epoch."""
        return False

    def block_backward_sync(self) -> AbstractContextManager:  # type: ignore[override]
        """Leave it to DeepSpeed what is exchanged between two steps."""
        return nullcontext()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward, and tell DeepSpeed whether a step follows."""
        accumulates = cast(Any, self.lightning_module).trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        # Lightning has divided the loss by the number of accumulated batches.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


# --- Both -------------------------------------------------------------------------------

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


def named_strategy(name: str) -> Strategy | str:
    """Return the strategy of a name; one of Lightning's own is left to it.

    Raises:
        InputError: There is no such name, or what it needs is not installed.
    """
    known = sorted({*NAMED, "auto", *StrategyRegistry.available_strategies()})
    foreign = [other for other in known if other.startswith(("deepspeed", "fsdp_"))]
    known = [other for other in known if other not in foreign]
    if name not in known:
        raise InputError(f"trainer.strategy: expected one of {', '.join(known)}, found {name!r}")
    if name not in NAMED:
        return name
    kind, settings = NAMED[name]
    try:
        return kind(**settings)
    except MisconfigurationException as error:
        raise InputError(
            f"trainer.strategy: {name} needs pip install 'embedtune[deepspeed]'"
        ) from error


def refuse_foreign(strategy: Strategy) -> None:
    """Refuse Lightning's own FSDP and DeepSpeed: they round what a batch holds, and scale losses.

    Raises:
        InputError: It is one of them.
    """
    for kind, ours in ((FSDPStrategy, FSDP), (DeepSpeedStrategy, ZeRO)):
        if isinstance(strategy, kind) and not isinstance(strategy, ours):
            raise InputError(
                f"trainer.strategy: expected embedtune.strategies.{ours.__name__}, "
                f"found {type(strategy).__name__}"
            )


def shards_parameters(strategy: Strategy) -> bool:
    """Tell whether ranks hold parts of the parameters, so that all must run forward alike."""
    return isinstance(strategy, FSDP) or (isinstance(strategy, ZeRO) and strategy.zero_stage_3)


def consolidated_weights(strategy: Strategy, encoder: nn.Module) -> dict[str, Tensor]:
    """Return the encoder's whole weights on the CPU, in the precision of the optimiser.

    All ranks must call it; those other than 0 may get an empty dict.
    """
    if isinstance(strategy, FSDP):
        options = StateDictOptions(
            # Offloading what lies on the CPU crashes torch.
            full_state_dict=True,
            cpu_offload=strategy.root_device.type != "cpu",
        )
        state: dict[str, Any] = get_model_state_dict(
            cast(nn.Module, strategy.model), options=options
        )
        prefix = "encoder."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
    if isinstance(strategy, ZeRO):
        return _zero_weights(strategy, encoder)
    return {name: tensor.cpu() for name, tensor in encoder.state_dict().items()}


def _zero_weights(strategy: ZeRO, encoder: nn.Module) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = dict(encoder.named_parameters(remove_duplicate=False))
    weights = {}
    for name, tensor in encoder.state_dict().items():
        if name not in parameters:
            weights[name] = tensor.cpu()
            continue
        parameter = parameters[name]
        # One at a time: a rank need not have room for more.
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:
            gathered = deepspeed.zero.GatheredParameters([parameter])
            with gathered if strategy.zero_stage_3 else nullcontext():
                whole = parameter.detach().float().clone()
        if strategy.is_global_zero:
            weights[name] = whole.cpu().clone()
    return weights
