"""The loss, the temperatures and the rate of a module, once they are settled for its data."""

import logging
from typing import Any

from embedtune.losses.contract import Loss
from embedtune.training.before_fit import tell_of_far_rate
from embedtune.training.choose_loss import choose_loss
from embedtune.training.optimizer import usual_lr
from embedtune.training.start_projection import sample_embeddings
from embedtune.training.temperature import (
    EXAMPLES,
    derive_temperature,
    forget_teacher_temperature,
    set_temperatures,
    temperatures_of,
)

log = logging.getLogger("embedtune")


class SettledLoss:
    """Chooses what a module is not given: once for all its fits.

    But for the temperature of a teacher, which is that of the data of each.

    Attributes:
        derived: Names of the temperatures that nobody gave.
        brought: Temperatures of the checkpoint that a module was loaded from, whose losses are
            measured with them; a fit derives its own.
    """

    def __init__(self) -> None:
        """Have settled nothing yet."""
        self.derived: set[str] = set()
        self.brought: dict[str, float] = {}
        self._given: tuple[Loss | None, float | None] | None = None
        self._has_settled = False  # by the first fit that gets so far, for one may end before

    def settle(self, module: Any, *, is_fit: bool) -> None:
        """Choose the loss, its temperatures and the learning rate, where they are not given.

        Args:
            module: Its ``loss`` and ``lr`` are set.
            is_fit: Whether it is going to train; else :meth:`forget` undoes the choice.
        """
        self._given = None if self._has_settled or is_fit else (module.loss, module.lr)
        given = set(temperatures_of(module.loss)) - self.derived
        given |= {"temperature"} if module.temperature else set()
        if is_fit:
            forget_teacher_temperature(module.loss, self.derived)

        def derived() -> float:
            strategy = module.trainer.strategy
            data, device = module.data, strategy.root_device
            sample = sample_embeddings(module.encoder, data, device, EXAMPLES)
            return strategy.broadcast(derive_temperature(sample))

        mrl_dims = module.mrl_dims if module.use_mrl else None
        derive = derived if is_fit else None
        module.loss = choose_loss(module.loss, module.temperature, mrl_dims, module.data, derive)
        self.derived = set(temperatures_of(module.loss)) - given
        if self._given is not None and self.brought:
            set_temperatures(module.loss, self.brought, self.derived)
        usual = usual_lr(module.encoder, module.data.format)
        module.lr = usual if module.lr is None else module.lr
        if is_fit:
            self._has_settled = True
            tell_of_far_rate(module.lr, usual)

    def tell(self, module: Any) -> None:
        """Say with what losses are measured alone, where no checkpoint has brought a fit's."""
        if self._given is not None and self.derived and module.is_base:
            found = ", ".join(f"{k} {v:.3g}" for k, v in temperatures_of(module.loss).items())
            log.info("losses have %s: a fit derives others, model.temperature gives one", found)

    def forget(self, module: Any) -> None:
        """Forget the loss that was chosen to evaluate alone: a fit derives more from its data."""
        if self._given is not None:
            forget_teacher_temperature(module.loss, self.derived)
            (module.loss, module.lr), self._given, self.derived = self._given, None, set()
