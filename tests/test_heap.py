"""On glibc a training process keeps the memory that tensors no longer need."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from embedtune import heap
if sys.argv[1] == "keep":
    heap.keep_freed()
b"x" * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    size = 64 << 20
    b"x" * size
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_mapped_once():
    def faults(argument: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", CODE, argument], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("keep") < faults("default") / 10
