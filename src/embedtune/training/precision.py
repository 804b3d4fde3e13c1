"""The precision that a run takes when none is asked for."""

import re
from pathlib import Path
from typing import Literal

import torch

CPU_FLAGS = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")


def default_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """Return bf16-mixed where the device multiplies bfloat16 natively, else 32-true.

    Weights, optimiser and loss stay in float32 in both.

    Args:
        accelerator: Lightning's name of the accelerator.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        cpu = Path("/proc/cpuinfo")
        has_bfloat16 = cpu.exists() and CPU_FLAGS.search(cpu.read_text()) is not None
    else:
        has_bfloat16 = False
    return "bf16-mixed" if has_bfloat16 else "32-true"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return what a Trainer's precision multiplies in, None where that is float32."""
    kinds = {"bf16": torch.bfloat16, "16": torch.float16}
    return kinds.get(precision.split("-")[0])
