"""A lock that a killed compilation has left is removed, one that is held is waited for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embedtune.distributed.compilation import prepare_compilation

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_without_an_owner_is_removed_and_named(lock, caplog):
    with caplog.at_level("INFO", logger="embedtune"):
        prepare_compilation(num_nodes=1, is_global_zero=True)
    assert not lock.exists()
    assert f"removed {lock}" in caplog.text
    assert "DeepSpeed compiles" in caplog.text


def test_one_that_a_process_holds_stays(lock):
    code = "import os, sys, time; os.open(sys.argv[1], os.O_RDONLY); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(lock)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as owner:
        owner.stdout.readline()
        prepare_compilation(num_nodes=1, is_global_zero=True)
        assert lock.exists()
        owner.kill()
    prepare_compilation(num_nodes=1, is_global_zero=True)
    assert not lock.exists()


def test_the_owner_may_be_on_another_machine_for_a_while(lock):
    prepare_compilation(num_nodes=2, is_global_zero=True)
    assert lock.exists()
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    prepare_compilation(num_nodes=2, is_global_zero=True)
    assert not lock.exists()


def test_what_is_compiled_already_is_not_spoken_of(lock, caplog):
    (lock.parent / "deepspeed_shm_comm.so").touch()
    with caplog.at_level("INFO", logger="embedtune"):
        prepare_compilation(num_nodes=1, is_global_zero=True)
    assert "compiles" not in caplog.text
