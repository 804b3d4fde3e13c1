"""Numbers and ticks of a chart."""

import math
import re
from collections.abc import Sequence


def number(value: float, decimals: int | None = None, sign: bool = False) -> str:
    """Return ``value`` as text without a leading zero; by default to four digits.

    >>> number(0.6449, 3), number(12345.6), number(2e-5), number(0.05, 2, sign=True)
    ('.645', '12,346', '2e-5', '+.05')
    """
    if decimals is not None:
        text = f"{abs(value):,.{decimals}f}"
    elif 1000 <= abs(value) < 1e9:
        text = f"{abs(value):,.0f}"
    else:
        text = re.sub(r"e([+-])0*", lambda e: "e" + e[1].strip("+"), f"{abs(value):.4g}")
    if not re.search("[1-9a-z]", text):  # what rounds to zero has no sign
        value = 0.0
    before = "\N{MINUS SIGN}" if value < 0 else "+" if sign and value > 0 else ""
    return before + text.removeprefix("0" if text.startswith("0.") else "")


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return ascending multiples of 1, 2 or 5 times a power of ten that enclose both values.

    Args:
        low: The smallest value.
        high: The largest; where it is hardly larger, room is made around both.
        most: Of the intervals between the values.

    >>> nice_ticks(0.612, 0.7)
    [0.6, 0.62, 0.64, 0.66, 0.68, 0.7]
    """
    if high - low <= abs(high) / 1000:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= most * 1.0001)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the texts of evenly spaced ticks, all with as many decimals as they need.

    >>> tick_labels([0.0, 0.5, 1.0]), tick_labels([0.0, 1e-5, 2e-5])
    (['0', '.5', '1.0'], ['0', '1e-5', '2e-5'])
    """
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-6))
    shown = decimals if 0 < decimals <= 4 else None
    return [number(tick, shown) if tick else "0" for tick in ticks]
