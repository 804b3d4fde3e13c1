"""What a fit trains with, whatever a checkpoint brings: the configuration wins."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from embedtune.errors import InputError


class FitSettings:
    """The rates and the decay of a fit, kept before a checkpoint brings those that it had.

    They are asked of the optimiser when the fit starts: a subclass may have changed it, and a
    callback have found another rate.
    """

    def __init__(self, schedule: LambdaLR, lr: float) -> None:
        """Know the schedule, and the rate that it was made with."""
        self.schedule, self.lr = schedule, lr
        self._kept: list[dict[str, Any]] = []

    def keep(self, trainer: Any, lr: float) -> None:
        """Remember those of the optimiser, with a peak rate of ``lr`` now.

        Raises:
            InputError: A parameter group was added after the schedule.
        """
        if self._is_used(trainer):
            self._kept = _settings_of(trainer.optimizers[0], lr / self.lr)

    def restore(self, trainer: Any, lr: float, share: Callable[[int], float]) -> None:
        """Let them win, at the step where the fit goes on.

        Args:
            trainer: That of the fit.
            lr: The peak rate.
            share: Of the peak rate, at each step of this fit, which may have more or fewer than was
                known before its checkpoint was loaded.
        """
        if not self._kept:  # a callback tries steps before the fit
            self.keep(trainer, lr)
        if self._is_used(trainer):
            self.schedule.lr_lambdas = [share] * len(self._kept)
            _restore(trainer.optimizers[0], self.schedule, self._kept)

    def _is_used(self, trainer: Any) -> bool:
        """Tell whether the schedule is, and not a subclass's own."""
        return self.schedule in [config.scheduler for config in trainer.lr_scheduler_configs]


def _settings_of(optimizer: Optimizer, factor: float) -> list[dict[str, Any]]:
    """Return what each parameter group is trained with: rates, decay and the like.

    Args:
        optimizer: Its groups have a peak rate each, which a schedule has taken.
        factor: By how much the peak rates are to be others.

    Raises:
        InputError: A group was added after the schedule.
    """
    new = sum("initial_lr" not in group for group in optimizer.param_groups)
    if new:
        raise InputError(
            "configure_optimizers: expected a schedule that was made after the last parameter "
            f"group, found {new} without a rate in it"
        )
    return [
        {name: value for name, value in group.items() if name != "params"}
        | {"initial_lr": group["initial_lr"] * factor}
        for group in optimizer.param_groups
    ]


def _restore(optimizer: Optimizer, schedule: LambdaLR, settings: list[dict[str, Any]]) -> None:
    """Let ``settings`` win over those that a checkpoint brought, at the step where it goes on."""
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update(wanted)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:  # a fused optimiser reads it where the parameter is
                step = torch.as_tensor(state["step"], dtype=torch.float32)
                state["step"] = step.to(parameter.device)
    schedule.base_lrs = [wanted["initial_lr"] for wanted in settings]
    rates = [
        base * share(schedule.last_epoch)
        for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
