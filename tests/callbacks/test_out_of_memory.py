"""Where memory does not suffice, one line tells what did not fit, what did, and what helps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedtune.cli import main
from embedtune.errors import is_out_of_memory

LIMITED = """
import resource
from pathlib import Path

from embedtune.losses import InfoNCE


class Limited(InfoNCE):
    '''Leaves its process 200 MB in its step `at`, counted from 0, and asks for 2 GB.'''

    def __init__(self, at: int, of_torch: bool):
        super().__init__()
        self.left, self.of_torch = at, of_torch

    def forward(self, embeddings, target):
        if self.left == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 200 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            self.kept = embeddings.query.new_zeros(2**29) if self.of_torch else bytearray(2**31)
        self.left -= 1
        return super().forward(embeddings, target)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no limit on memory")
@pytest.mark.parametrize(
    ("at", "of_torch", "cache"),
    [(2, True, False), pytest.param(0, False, True, marks=pytest.mark.slow)],
)
def test_an_allocation_that_fails_is_one_line(tiny_bert, tmp_path, at, of_torch, cache):
    (tmp_path / "limited.py").write_text(LIMITED)
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model.model_name_or_path": tiny_bert,
        "model.grad_cache": cache,
        "model.loss": "limited.Limited",
        "model.loss.init_args.at": at,
        "model.loss.init_args.of_torch": of_torch,
        "data.train_path": "train.jsonl",
        "data.batch_size": 4,
        "data.tokens_per_chunk": 40,
        "trainer.accelerator": "cpu",
    }
    flags = [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, "-m", "embedtune", "fit", *flags],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (said,) = (line for line in done.stderr.splitlines() if "embedtune: error: " in line)
    assert "error: out of memory" in said
    assert f"; step {at + 1}; its batch is " in said
    keys = f"data.batch_size is 4, data.tokens_per_chunk 40, model.grad_cache {str(cache).lower()}"
    assert keys in said
    assert ("(asked for 2147483648 bytes more)" in said) == of_torch
    assert ("have fitted" in said) == (at > 0)
    assert ("give model.grad_cache true" in said) == (not cache)
    assert not Path(tmp_path / "run/model").exists()


def test_what_allocators_raise_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))


@pytest.mark.parametrize("command", ["evaluate", "teach"])
def test_so_is_it_beside_training(tiny_bert, tmp_path, monkeypatch, capsys, command):
    rows = [{"query": "q", "pos": ["p"], "scores": [i]} for i in range(3)]
    data = tmp_path / "sts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *_, **__: torch.empty(2**50))
    arguments = {
        "evaluate": [str(tiny_bert), "--data", str(data)],
        "teach": ["--model", str(tiny_bert), "--data", str(data), "--out", str(tmp_path / "out")],
    }
    with pytest.raises(SystemExit) as caught:
        main([command, *arguments[command]])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2
    assert said.startswith("embedtune: error: out of memory: ")
    assert "tried to allocate" in said
