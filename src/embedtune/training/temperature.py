"""The temperature of a loss that is given none."""

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor

from embedtune.losses.contract import Loss
from embedtune.losses.infonce import InfoNCE
from embedtune.losses.matryoshka import unwrapped
from embedtune.losses.scored import CoSENT, ListwiseKL

EXAMPLES = 128
"""Examples whose texts tell how alike texts are to a model."""
SHARE = 0.06
LOWEST, HIGHEST = 0.01, 0.06


def derive_temperature(sample: Tensor) -> float:
    """Return a temperature for a model, from its embeddings of different texts ``[n, d]``.

    Of two texts that have nothing to do with each other the cosine is about .2 in all-MiniLM-L6-v2
    and .83 in multilingual-e5-small: what tells texts apart is the rest up to 1, and a temperature
    is a share of that. With 0.06 it is 0.05 for the one and 0.01 for the other, as they were
    trained with (Wang et al. 2024, "Multilingual E5 Text Embeddings", section 2).
    """
    unit = torch.nn.functional.normalize(sample.double(), dim=-1)
    n = len(unit)
    if n < 2:
        return HIGHEST
    alike = (unit.sum(dim=0).square().sum().item() - n) / (n * (n - 1))
    # Two digits: as the sum of another device has them, too.
    return float(f"{min(max(SHARE * (1 - alike), LOWEST), HIGHEST):.2g}")


def temperatures_of(loss: Loss | None) -> dict[str, float]:
    """Return the temperatures of a loss, by the names of its attributes."""
    inner = unwrapped(loss)
    if isinstance(inner, CoSENT):
        return {"scale": inner.scale}
    if not isinstance(inner, InfoNCE | ListwiseKL):
        return {}
    found = {"temperature": inner.temperature}
    if isinstance(inner, ListwiseKL) and inner.teacher_temperature is not None:
        found["teacher_temperature"] = inner.teacher_temperature
    return found


def forget_teacher_temperature(loss: Loss | None, derived: Collection[str]) -> None:
    """Let that of lists be derived anew, for the scores of other data."""
    if "teacher_temperature" in derived:
        cast(Any, unwrapped(loss)).teacher_temperature = None


def set_temperatures(
    loss: Loss | None, temperatures: dict[str, float], derived: Collection[str]
) -> None:
    """Give a loss those of its derived temperatures that the loss of a checkpoint had.

    A teacher temperature goes with the temperature that it was derived for, and is another where
    that is given anew.
    """
    inner: Any = unwrapped(loss)
    for name in temperatures.keys() & set(derived):
        setattr(inner, name, temperatures[name])
    if "teacher_temperature" in derived and "teacher_temperature" in temperatures:
        inner.teacher_temperature *= inner.temperature / temperatures["temperature"]
