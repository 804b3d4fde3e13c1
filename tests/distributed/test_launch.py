"""Whole processes: two ranks from one command and from torchrun, and what a killed one leaves."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forks import Ranks, embedtune
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from embedtune.callbacks import shared_folder
from embedtune.cli import main
from embedtune.losses import InfoNCE
from embedtune.reports.curves import read_rows

STRATEGIES = Path(__file__).parents[2] / "configs" / "strategy"
ROWS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(24)]
STEPS = 12  # of 4 pairs in 2 epochs
TEXTS = ["query 1", "another text"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for each of two ranks
LIMIT = 60  # seconds in which a run must end when one of its ranks has died
DYING = '''
import os
import signal

from embedtune.checkpoints import write
from embedtune.losses import InfoNCE


def die(*_):
    open("died", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(InfoNCE):
    """InfoNCE that kills one rank's process in its step `at`, counted from 0.

    Or in the save after it, when all is written and nothing renamed; or stops it.
    """

    def __init__(self, at: int, rank: int = 0, saving: bool = False, stopping: bool = False):
        super().__init__()
        self.left, self.rank, self.saving, self.stopping = at, rank, saving, stopping

    def forward(self, embeddings, target):
        if self.left == 0 and int(os.environ.get("LOCAL_RANK", 0)) == self.rank:
            if self.stopping:
                os.kill(os.getpid(), signal.SIGSTOP)
            elif not self.saving:
                die()
            write.put = die
        self.left -= 1
        return super().forward(embeddings, target)
'''


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("dying.py").write_text(DYING)


def fit(model, root: str, *flags: str) -> list[str]:
    """Return the arguments of a fit of 12 steps that saves every second."""
    return [
        *("fit", "--model.model_name_or_path", str(model), "--data.train_path", "train.jsonl"),
        *("--trainer.default_root_dir", root, "--trainer.accelerator", "cpu"),
        *("--data.batch_size", "4", "--model.lr", "1e-2", "--save_on_epoch_end", "false"),
        *("--checkpoint.every_n_train_steps", "2", "--trainer.precision", "32-true", *flags),
    ]


def on_two(strategy: str) -> list[str]:
    overlay = str(STRATEGIES / f"{strategy}.yaml")
    return ["--config", overlay, "--trainer.devices", "2", "--data.batch_size", "2"]


def start(arguments: list[str]) -> subprocess.Popen:
    """Start the command line as a process group of its own, so that nothing outlives a test."""
    shared = ONE_THREAD if "--trainer.devices" in arguments else {}
    return subprocess.Popen(
        [sys.executable, "-m", "embedtune", *arguments],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **shared},
    )


def finish(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str]:
    """Return the exit code and the output."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def steps_of(root: str) -> int:
    """Return how many steps a run has trained since it went on: at a speed of their own."""
    earlier, rows = (read_rows(Path(root, name)) for name in ("metrics-1.csv", "metrics.csv"))
    return sum(row not in earlier for row in rows)


def embed(folder: str) -> np.ndarray:
    return SentenceTransformer(folder, device="cpu").encode(TEXTS)


def test_a_run_killed_at_a_random_step_ends_as_the_uninterrupted_one(tiny_bert):
    """Bit for bit, with dropout; the step is in the message."""
    same = f"--model.temperature={InfoNCE().temperature}"  # as the loss has that dies
    main(fit(tiny_bert, "whole", same))
    at = random.SystemRandom().randrange(2, STEPS)
    dying = ("--model.loss", "dying.Dying", "--model.loss.at", str(at))
    killed = Ranks(embedtune, fit(tiny_bert, "killed", *dying), folder=Path.cwd())
    assert killed.wait() == [-signal.SIGKILL], killed.output()
    assert not Path("killed/model").exists()
    main(fit(tiny_bert, "killed", "--ckpt_path", "last", same))
    assert steps_of("killed") == STEPS - at // 2 * 2, f"killed in step {at}"
    whole, resumed = (Path(root, "model/model.safetensors") for root in ("whole", "killed"))
    assert whole.read_bytes() == resumed.read_bytes(), f"killed in step {at}"
    assert np.abs(embed("whole/model") - embed(str(tiny_bert))).max() > 1e-3


@pytest.mark.parametrize(
    ("strategy", "rank", "saving"),
    [
        ("fsdp", 0, True),
        pytest.param("ddp", 1, False, marks=pytest.mark.slow),
        pytest.param("ddp", 0, True, marks=pytest.mark.slow),
        pytest.param("zero2", 1, False, marks=pytest.mark.slow),
        pytest.param("zero3", 0, True, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_run_and_the_last_checkpoint_resumes(
    tiny_bert, strategy, rank, saving
):
    dying = ("--model.loss", "dying.Dying", "--model.loss.at", "5", "--model.loss.rank", str(rank))
    dying += ("--model.loss.saving", str(saving).lower())
    process = start(fit(tiny_bert, "run", *on_two(strategy), *dying))
    while not Path("died").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    code, output = finish(process, LIMIT)  # communicate: until the last rank has closed its output
    assert code != 0, output
    if rank:
        said = f"error: rank {rank} was ended by SIGKILL, as the system does where memory is short"
        assert output.count(said) == 1, output
        assert "Traceback" not in output
    assert len(list(Path("run/checkpoints").glob("*.part"))) == saving
    arguments = fit(tiny_bert, "run", *on_two(strategy), "--ckpt_path", "last")
    resumed = Ranks(embedtune, arguments, folder=Path.cwd(), ranks=2)
    assert resumed.wait() == [0, 0], resumed.output()
    assert steps_of("run") == STEPS - 4
    kept = {path.name for path in Path("run/checkpoints").iterdir()}
    assert kept == {f"epoch=1-step={STEPS}.ckpt", "last.ckpt"}
    assert np.abs(embed("run/model") - embed(str(tiny_bert))).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 0), ("fsdp", 1)])
def test_a_rank_that_hangs_ends_the_run_in_time(tiny_bert, strategy, rank):
    stopping = ("--model.loss", "dying.Dying", "--model.loss.at", "5", "--model.loss.rank")
    stopping += (str(rank), "--model.loss.stopping", "true", "--rank_timeout", "60")
    code, output = finish(start(fit(tiny_bert, "run", *on_two(strategy), *stopping)), 4 * LIMIT)
    assert code == (1 if rank else -signal.SIGKILL), output
    said = "step 6: a rank has neither come nor ended within rank_timeout, 60 seconds"
    assert output.count(said) == 1, output
    assert ("rank 0 still runs, and is killed" in output) == (rank == 0)
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "file"), [("fsdp", "__1_0.distcp"), ("zero2", "*_1_*.pt")])
def test_a_damaged_shard_of_any_rank_is_told_once(tiny_bert, strategy, file):
    arguments = fit(tiny_bert, "run", *on_two(strategy), "--trainer.max_epochs", "1")
    assert finish(start(arguments))[0] == 0
    (path,) = Path("run/checkpoints").glob(f"last.ckpt/**/{file}")
    data = bytearray(path.read_bytes())
    largest = max(re.finditer(rb"PK\x03\x04.*?(?=PK)", bytes(data), re.DOTALL), key=len_of)
    data[(largest.start() + largest.end()) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(data)
    code, output = finish(start([*arguments, "--ckpt_path", "last"]), LIMIT)
    assert code == 2, output
    assert output.count("embedtune: error: ") == 1, output
    assert f"{path.name}: is damaged" in output
    assert "Traceback" not in output


def len_of(found: re.Match) -> int:
    return found.end() - found.start()


@pytest.mark.slow
def test_one_command_trains_on_two_and_exports_offline(tiny_bert):
    code, output = finish(start(fit(tiny_bert, "own", *on_two("zero2"))))
    assert code == 0, output
    assert "ZeRO stage 2" in output
    kept = {path.name for path in Path("own/checkpoints").iterdir()}
    assert kept == {f"epoch=1-step={STEPS}.ckpt", "last.ckpt"}
    main(["export", "own/checkpoints/last.ckpt", "offline"])
    assert np.array_equal(embed("offline"), embed("own/model"))


@pytest.mark.slow
def test_torchrun_trains_what_one_command_does(tiny_bert):
    for folder in ("own", "torchrun"):
        arguments = fit(tiny_bert, folder, *on_two("zero2"))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        launch = launch if folder == "torchrun" else []
        done = subprocess.run(
            [sys.executable, *launch, "-m", "embedtune", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert np.array_equal(embed("torchrun/model"), embed("own/model"))


@pytest.mark.slow
def test_the_readmes_torchrun_example_runs(tiny_bert):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    Path("train.jsonl").write_text(re.search(r"<<'ROWS'\n(.*?)ROWS", readme, re.DOTALL)[1])
    (command,) = re.findall(r"^torchrun --standalone .*?(?=^```)", readme, re.DOTALL | re.MULTILINE)
    command = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    command = command.replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_bert))
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path("run/model/modules.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_nodes_train_alike(tiny_bert, launcher):
    """Each node is one process here; SLURM is what its variables say."""
    arguments = fit(tiny_bert, "nodes", *on_two("zero3"), "--trainer.num_nodes", "2")
    arguments[arguments.index("--trainer.devices") + 1] = "1"
    port = str(free_port())
    processes = []
    for node in ("0", "1"):
        command, env = [sys.executable, "-m", "embedtune"], {"MASTER_PORT": port}
        if launcher == "torchrun":
            options = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
            options += ["--master_addr=127.0.0.1", f"--master_port={port}", "-m", "embedtune"]
            command = [sys.executable, "-m", "torch.distributed.run", *options]
        else:
            env |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2"}
            env |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
            env |= {"SLURM_PROCID": node, "SLURM_NODEID": node, "SLURM_NODELIST": "127.0.0.1"}
        processes.append(
            subprocess.Popen([*command, *arguments], env={**os.environ, **env, **ONE_THREAD})
        )
    assert [process.wait(180) for process in processes] == [0, 0]
    assert finish(start(fit(tiny_bert, "own", *on_two("zero3"))))[0] == 0
    assert np.array_equal(embed("nodes/model"), embed("own/model"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_a_mistake_is_told_once_by_two_ranks(tiny_bert):
    Path("train.jsonl").write_text('{"query": "q", "pos": ["p"]}\n{"query": "q", "pos": "p"}\n')
    code, output = finish(start(fit(tiny_bert, "run", *on_two("ddp"))))
    assert code == 2, output
    assert output.count("embedtune: error: train.jsonl:2: field 'pos'") == 1, output
    assert "Traceback" not in output


def fit_apart(what: str, arguments: list[str]) -> None:
    """Fit with one thing that each rank has of its own."""
    rank, shared_folder.SECONDS = os.environ["RANK"], 1
    given = {"data.train_path": "rows0.jsonl", "model.lr": 1e-4, "trainer.default_root_dir": "run"}
    given |= {
        "data": {"data.train_path": f"rows{rank}.jsonl"},
        "rate": {"model.lr": 1e-4 + int(rank)},
        "set": {"data.val_path.a": f"rows{rank}.jsonl"},
        "weights": {"model.model_name_or_path": f"base{rank}"},
        "length": {"data.query_max_len": 32 + int(rank)},
        "saves": {"checkpoint.every_n_train_steps": 2 + int(rank)},
        "folder": {"trainer.default_root_dir": f"run{rank}"},
    }[what]
    embedtune([*arguments, *(f"--{name}={value}" for name, value in given.items())])


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("data", "rank 1: expected the training data of rank 0, found another"),
        pytest.param(
            "rate",
            "rank 1: expected the configuration of rank 0, found another",
            marks=pytest.mark.slow,
        ),
        ("set", "rank 1: expected the validation data of rank 0, found another"),
        ("weights", "rank 1: expected the base model of rank 0, found another"),
        *(
            pytest.param(
                what,
                "rank 1: expected the configuration of rank 0, found another",
                marks=pytest.mark.slow,
            )
            for what in ("length", "saves")
        ),
        pytest.param(
            "folder",
            "expected a folder that all ranks share, found that rank 1 does not see in run",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_differ_are_told_at_the_start(tiny_bert, what, expected):
    for number, count in ((0, 24), (1, 20)):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS[:count])
        Path(f"rows{number}.jsonl").write_text(lines)
        weights = Path(shutil.copytree(tiny_bert, f"base{number}"), "model.safetensors")
        moved = {name: value + 0.01 * number for name, value in load_file(weights).items()}
        save_file(moved, weights, {"format": "pt"})
    flags = ["--model.model_name_or_path", str(tiny_bert), "--trainer.accelerator", "cpu"]
    arguments = ["fit", *flags, "--trainer.devices", "2"]
    ranks = Ranks(fit_apart, what, arguments, folder=Path.cwd(), ranks=2)
    assert 0 not in ranks.wait()
    assert expected in ranks.output()
    assert not [*Path().glob("run*/model"), *Path().glob("run*/.seen-*")]
