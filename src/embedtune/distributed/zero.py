"""DeepSpeed ZeRO as this package trains with it, on GPUs and on CPU processes."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from embedtune.checkpoints.read import read_facts, read_weights
from embedtune.checkpoints.resume import refuse_other_weights
from embedtune.checkpoints.shards import divide_anew, refuse_code, zero_ranks, zero_shapes
from embedtune.checkpoints.write import SavesFolders
from embedtune.distributed.compilation import prepare_compilation
from embedtune.errors import InputError


class _DeepSpeedPrecision(DeepSpeedPrecision):
    """Leaves what a batch holds in float32."""

    def convert_input(self, data: Any) -> Any:
        return data


class ZeRO(SavesFolders, DeepSpeedStrategy):
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

        Raises:
            InputError: DeepSpeed is not installed.
        """
        if find_spec("deepspeed") is None:
            raise InputError("trainer.strategy: ZeRO needs pip install 'embedtune[deepspeed]'")
        super().__init__(stage=stage, **kwargs)
        assert isinstance(self.config, dict)
        zero = self.config.setdefault("zero_optimization", {})
        self.stage: int = zero.get("stage", 0)
        # For DeepSpeed's own log alone; Lightning would build a training loader to ask it.
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)
        # torch's own AdamW also updates states on the CPU.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        if stage3_param_persistence_threshold is not None:
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
        prepare_compilation(self.num_nodes, self.is_global_zero)
        # DeepSpeed wants a number from every device.
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(devices))]
        super(DeepSpeedStrategy, self).setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Load what ZeRO saved on any number of ranks; without optimiser states to evaluate."""
        path, module = Path(checkpoint_path), cast(pl.LightningModule, self.lightning_module)
        if module.trainer.state.fn != TrainerFn.FITTING:
            self._load_weights(module, path)
            return read_facts(path)
        refuse_code(path)
        refuse_other_weights(zero_shapes(path), _trained_shapes(module))
        if zero_ranks(path) == self.world_size:
            return super().load_checkpoint(path)
        if self.is_global_zero:
            divide_anew(path)
        self.barrier()
        self.deepspeed_engine._config.load_universal_checkpoint = True
        facts = super().load_checkpoint(path)
        # DeepSpeed 0.19 gives all groups of stage 3 one counter, which each of them would raise.
        for parameter, state in self.deepspeed_engine.optimizer.optimizer.state.items():
            state["step"] = deepcopy(state["step"]).to(parameter.device)
        return facts

    def _load_weights(self, module: pl.LightningModule, path: Path) -> None:
        import deepspeed

        weights = read_weights(path)
        for name, parameter in module.named_parameters():
            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            with gathered if self.zero_stage_3 else nullcontext(), torch.no_grad():
                parameter.copy_(weights[name].view_as(parameter))
        for name, buffer in module.named_buffers():
            if name in weights:  # others are made anew with the module
                buffer.copy_(weights[name])

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

    def gradient_norm(self) -> float | None:
        """Return the norm of the last step's gradient over all ranks, None where none is known.

        So it is where float16 could not hold the scaled gradient: DeepSpeed leaves such a step out,
        and tries a smaller scale in the next.
        """
        if self.deepspeed_engine.fp16_enabled() and not self.deepspeed_engine.was_step_applied():
            return None
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def whole_weights(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Return the encoder's weights put together, on rank 0 alone.

        In float32, but for those that are frozen, which DeepSpeed has as it computes with them.
        """
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
                with gathered if self.zero_stage_3 else nullcontext():
                    whole = parameter.detach().clone()
            if self.is_global_zero:
                weights[name] = whole.cpu().clone()
        return weights


def _trained_shapes(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's trained weights without their values; stage 3 knows their shapes alone."""
    return {
        name: torch.empty(getattr(weight, "ds_shape", weight.shape), device="meta")
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }
