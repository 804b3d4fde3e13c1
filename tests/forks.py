"""Ranks in forks of a process that has imported everything: none waits for a start of its own.

Each is a real process in a group of its own, which a signal ends as it would any other. Where there
is a C compiler, what they write can be counted, and be let fail (``failing_at``).
"""

import atexit
import contextlib
import ctypes
import gc
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

PORTS = (15_000, 32_000)
"""Below those that Linux gives to connections."""
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "embedtune.cli.trainer_cli",
        "embedtune.cli.tool_commands",
        "deepspeed",
        "matplotlib.figure",
        "torch.utils.tensorboard",
        "transformers.models.bert.modeling_bert",
    ]
)


class Ranks:
    """A function that runs on one rank or several, which find each other as ``torchrun`` says."""

    def __init__(
        self, function: Callable[..., None], *arguments: Any, folder: Path, ranks: int = 1
    ) -> None:
        """Start it in ``folder``, where what is written goes to ``output-RANK.txt``."""
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(ranks)]
        _start_server()
        port = _free_port()
        environments = [{**os.environ, **_of_rank(rank, ranks, port)} for rank in range(ranks)]
        self.processes = [
            CONTEXT.Process(target=_run, args=(function, arguments, folder, environment, output))
            for environment, output in zip(environments, self.outputs, strict=True)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int | None = None) -> bool:
        """Kill a rank, or all at once; tell whether one was still there."""
        chosen = self.processes if rank is None else [self.processes[rank]]
        were_there = [process.is_alive() for process in chosen]
        for process in chosen:
            process.kill()
        return any(were_there)

    def wait(self, seconds: float = 240) -> list[int | None]:
        """Return the exit codes; a rank that has not ended by then is killed, and has None."""
        ends = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            process.join(max(0, ends - time.monotonic()))
            codes.append(process.exitcode)
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    def output(self) -> str:
        """Return what the ranks have written, one after another."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)


def embedtune(arguments: list[str]) -> None:
    """Run the command line."""
    from embedtune.cli import main

    main(arguments)


HAS_COMPILER = shutil.which("cc") is not None
"""Whether :func:`failing_at` is there."""


def failing_at(point: int, folder: Path, dies: bool, arguments: list[str]) -> None:
    """Run the command line on a disk that is full from one write on, or be killed in that.

    It ends with a line that says how many there were.

    Args:
        point: The write in a folder that fails first, and all that follow; from 1, 0 for none.
        folder: That folder, where the command runs.
        dies: Whether the process is killed instead.
        arguments: Those of the command line.
    """
    os.chdir(folder)
    library = ctypes.CDLL(None)
    library.write_points_arm(f"{folder}/".encode(), ctypes.c_long(point), int(dies))
    try:
        embedtune(arguments)
    finally:
        sys.stderr.write(f"\nwrite points: {library.write_points_seen()}\n")


@cache
def _start_server() -> None:
    """Start the process that is forked."""
    if HAS_COMPILER:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        library = f"{folder}/write_points.so"
        source = Path(__file__).parent / "faults" / "write_points.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        os.environ["LD_PRELOAD"] = library
    try:
        ensure_running()
    finally:
        os.environ.pop("LD_PRELOAD", None)


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: Path,
    environment: dict[str, str],
    output: Path,
) -> None:
    gc.freeze()  # DeepSpeed collects garbage among all that was imported, again and again
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    written = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(written, stream)
    function(*arguments)


def _of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what ``torchrun`` tells a rank of several, and a process alone no more than a port."""
    if ranks == 1:
        return {"MASTER_PORT": str(port)}
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    told |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told |= {"TORCHELASTIC_RUN_ID": "forks", "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in told.items()}


def _free_port() -> int:
    """Return a port that nobody listens at, and that the system gives to no connection meanwhile.

    A process that trains several times needs it again each time.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
