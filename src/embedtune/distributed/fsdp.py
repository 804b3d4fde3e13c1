"""FSDP as this package trains with it, on GPUs and on CPU processes."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from embedtune.checkpoints.read import PREFIX
from embedtune.checkpoints.resume import refuse_other_weights
from embedtune.checkpoints.shards import fsdp_shapes, refuse_code
from embedtune.checkpoints.write import SavesFolders
from embedtune.errors import InputError

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


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


class FSDP(SavesFolders, FSDPStrategy):
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
        # The default policy asks the model, later; but Lightning refuses HYBRID_SHARD without any.
        policy = kwargs.pop("auto_wrap_policy", None)
        # A full state dict on a CPU crashes torch; sharded saves faster and less on any device.
        super().__init__(state_dict_type="sharded", auto_wrap_policy=policy or set(), **kwargs)
        given = self.kwargs.pop("auto_wrap_policy")
        self._policy = None if policy is None else given
        self.block_classes = block_classes
        self._shapes: dict[str, Tensor] = {}

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
        kwargs = dict(self.kwargs)
        # As they are before they are divided.
        self._shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        if self.world_size == 1:
            # Nothing is divided on one rank, and there torch loses parameters that are frozen.
            kwargs["ignored_states"] = [p for p in model.parameters() if not p.requires_grad]
            model.to(self.root_device)
        # Lightning wraps what is not wrapped yet, but knows the numbers of GPUs alone.
        wrapped = FullyShardedDataParallel(
            module=model,
            auto_wrap_policy=self._policy or ModuleWrapPolicy(self._blocks()),
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **kwargs,
        )
        plugin = cast(_FSDPPrecision, self.precision_plugin)
        plugin.root, plugin.device_type = wrapped, self.root_device.type
        if plugin.scaler is not None:
            plugin.scaler = ShardedGradScaler(device=self.root_device.type)
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

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Load the weights of this model, or say which are others before torch fails to."""
        path = Path(checkpoint_path)
        if cast(pl.LightningModule, self.lightning_module).trainer.state.fn == TrainerFn.FITTING:
            refuse_code(path)
            refuse_other_weights(fsdp_shapes(path), self._shapes)
        return super().load_checkpoint(path, weights_only)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Save, or raise on every rank what has happened on one, such as that its disk is full."""
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error

    def whole_weights(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Return the encoder's weights put together, on rank 0 alone where GPUs train."""
        options = StateDictOptions(
            # Offloading what lies on the CPU crashes torch.
            full_state_dict=True,
            cpu_offload=self.root_device.type != "cpu",
        )
        state: dict[str, Any] = get_model_state_dict(cast(nn.Module, self.model), options=options)
        return {
            name.removeprefix(PREFIX): tensor
            for name, tensor in state.items()
            if name.startswith(PREFIX)
        }
