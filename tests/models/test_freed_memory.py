"""On glibc a training process keeps the memory that tensors no longer need."""

import json
import subprocess
import sys

import pytest

from embedtune.cli import main
from embedtune.models import freed_memory
from embedtune.training import gradient_cache

CODE = """
import resource, runpy, sys
if sys.argv[1] == "keep":
    runpy.run_path(sys.argv[2])["keep_freed"]()
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
            [sys.executable, "-c", CODE, argument, freed_memory.__file__],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults("keep") < faults("default") / 10


RETURN = """
import runpy, sys
memory = runpy.run_path(sys.argv[1])
memory["keep_freed"]()

def resident():
    return int(open("/proc/self/statm").read().split()[1])

before = resident()
parts = [b"x" * size for size in range(1 << 20, 2 << 20, 1 << 15)]
held = parts[-1:]  # so that what is free is a hole
del parts
kept = resident() - before
memory["return_freed"]()
print(kept, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_holes_are_given_back_when_asked_for():
    command = [sys.executable, "-c", RETURN, freed_memory.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert left < kept / 4


def fit(tiny_bert, tmp_path, *more: str) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"query": c, "pos": [c * 2]}) + "\n" for c in "abcd"))
    flags = {
        "model.model_name_or_path": tiny_bert,
        "data.train_path": data,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.enable_progress_bar": False,
    }
    main(["fit", *(f"--{name}={value}" for name, value in flags.items()), *more])


def test_a_fit_keeps_memory(tiny_bert, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(freed_memory, "keep_freed", lambda: calls.append("kept"))
    fit(tiny_bert, tmp_path)
    assert calls


def test_a_gradient_cache_returns_it_every_few_chunks(tiny_bert, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(freed_memory, "return_freed", lambda: calls.append("returned"))
    monkeypatch.setattr(gradient_cache, "CHUNKS_PER_TRIM", 3)
    # Eight texts, each a chunk: all but the last are encoded twice.
    fit(tiny_bert, tmp_path, "--model.grad_cache=true", "--data.tokens_per_chunk=1")
    assert len(calls) == 2 * 7 // 3
