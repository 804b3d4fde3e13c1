"""Parameter groups, the number of steps and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import get_scheduler

from embedtune.checkpoints.resume import Place
from embedtune.data.records import Format
from embedtune.errors import InputError, require_choice
from embedtune.models.encoder import Encoder
from embedtune.models.towers import USUAL_WIDTH, layer_width
from embedtune.training.accumulation import accumulated_in, last_change

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Our schedule names, and those of ``transformers.get_scheduler``."""


USUAL_LR = 2e-5
"""What a model of BERT-base's width is usually fine-tuned with."""
STATIC_LR = 2e-3
"""Of a model without a transformer: a step changes the few words of its batch alone."""
DISTILL_FACTOR = 5
"""A student has more to learn, and a target for every text."""


def usual_lr(encoder: Encoder, row_format: Format) -> float:
    """Return the peak rate for a model and a format of data where none is given.

    AdamW moves each weight by about its rate, so what a layer puts out moves by the rate times its
    width: the rate falls as layers widen (Yang et al. 2022, "Tensor Programs V", table 3).
    """
    width = layer_width(encoder.model)
    rate = STATIC_LR if width is None else USUAL_LR * USUAL_WIDTH / width
    rate *= DISTILL_FACTOR if row_format == Format.DISTILL else 1
    return float(f"{rate:.6g}")  # as people read it, in card and report


def build_optimizer(module: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) over the trainable parameters of ``module``.

    Biases and every parameter of a norm layer are not decayed.

    Raises:
        InputError: There are none, as in a model that counts words.
    """
    undecayed_ids = {
        id(parameter)
        for path, layer in module.named_modules()
        for name, parameter in layer.named_parameters(recurse=False)
        # By class name, for each architecture brings its own LayerNorm or RMSNorm class. T5 and
        # MPNet keep biases of relative positions as a layer's weight.
        if "bias" in (name[-4:], path[-4:]) or "norm" in type(layer).__name__.lower()
    }
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError("model_name_or_path: expected a model with weights to train, found none")
    decayed = [parameter for parameter in trainable if id(parameter) not in undecayed_ids]
    undecayed = [parameter for parameter in trainable if id(parameter) in undecayed_ids]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizer = AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
    # It could unscale float16 gradients itself, but then they could not be clipped before.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def refuse_schedule(name: str, warmup_proportion: float) -> None:
    """Refuse a course of the learning rate that is none.

    Raises:
        InputError: It names the key.
    """
    require_choice("model.lr_schedule", name, Schedule)
    if not 0 <= warmup_proportion <= 1:
        raise InputError(
            f"model.warmup_proportion: expected a share from 0 to 1, found {warmup_proportion}"
        )


def count_steps(
    trainer: Any, batches_per_epoch: int, schedule: str, start: Place | None = None
) -> int:
    """Return the optimiser steps of a whole fit; of one epoch where it has no end.

    Lightning's ``estimated_stepping_batches`` would set up the loaders before a checkpoint restores
    its place in the data.

    Args:
        trainer: It tells the epochs or steps.
        batches_per_epoch: As many as there are now.
        schedule: Of the learning rate.
        start: Where the fit goes on; the steps before count as made, though an epoch may have had
            more or fewer of them.

    Raises:
        InputError: The fit has no end, and a schedule that needs one.
    """

    def per_epoch(epoch: int) -> int:
        return math.ceil(batches_per_epoch / accumulated_in(trainer, epoch))

    def until(epochs: int) -> int:
        last = min(epochs, last_change(trainer))  # all later epochs have as many steps
        return sum(map(per_epoch, range(last))) + per_epoch(last) * (epochs - last)

    start = Place() if start is None else start
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    by_epochs = math.inf
    if epochs >= 0:
        usual = until(start.epoch) + start.batch // accumulated_in(trainer, start.epoch)
        by_epochs = until(epochs) + start.step - usual
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    steps = min(by_epochs, by_steps)
    if steps == math.inf and schedule != "constant":
        raise InputError(
            f"model.lr_schedule: {schedule} falls to zero at the last step: expected "
            "trainer.max_epochs or max_steps to tell which that is, or constant"
        )
    return max(1, int(per_epoch(0) if steps == math.inf else steps))


def plan_rates(name: str, num_steps: int, warmup_proportion: float) -> Callable[[int], float]:
    """Return what gives the share of the peak rate that each step has, from 0 on.

    It rises linearly over the warm-up and then follows ``name``.

    Args:
        name: ``cosine`` or ``linear`` fall to zero at ``num_steps``, ``constant`` stays.
        num_steps: Optimiser steps of the whole run.
        warmup_proportion: Share of the steps that warm up.

    Raises:
        InputError: No step would have a rate.
    """
    warmup = round(num_steps * warmup_proportion)
    if warmup and num_steps == 1:
        raise InputError(
            "model.warmup_proportion: expected less than half of the fit's only step, which would "
            f"have a rate of 0, found {warmup_proportion}"
        )
    nothing = SGD([nn.Parameter(torch.zeros(1))])
    planned = get_scheduler(
        SCHEDULES[name], nothing, num_warmup_steps=warmup, num_training_steps=num_steps
    )
    return planned.lr_lambdas[0]
