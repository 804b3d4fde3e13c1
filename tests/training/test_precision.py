"""A fit without a precision takes bfloat16 only where the device has it."""

import pytest
import torch

from embedtune.training import precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t: fpu avx512_bf16 sse", "bf16-mixed"),
        ("flags\t: fpu amx_bf16", "bf16-mixed"),
        ("Features\t: fp asimd bf16", "bf16-mixed"),
        ("flags\t: fpu avx512f", "32-true"),
    ],
)
def test_the_processors_flags_decide_on_a_cpu(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(precision, "Path", lambda _: tmp_path / "cpuinfo")
    assert precision.default_precision("cpu") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_gpu_decides_where_there_is_one(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert precision.default_precision("auto") == expected


def test_an_unknown_accelerator_stays_in_float32():
    assert precision.default_precision("tpu") == "32-true"
