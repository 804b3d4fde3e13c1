"""What is done with local files opens no socket to anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import json, socket, sys

opened = []


def refuse(name):
    def refused(*args, **kwargs):
        opened.append(f"{name} {args}")
        raise OSError(101, "Network is unreachable")

    return refused


class Blocked(socket.socket):
    def __init__(self, family=-1, *args, **kwargs):
        super().__init__(family, *args, **kwargs)
        if self.family in (socket.AF_INET, socket.AF_INET6):
            for name in ("connect", "connect_ex", "sendto"):
                setattr(self, name, refuse(name))


# Nor is anybody asked for an address.
socket.socket = Blocked
for name in ("create_connection", "getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, refuse(name))

from embedtune.cli import main

for command in json.loads(sys.argv[1]):
    main(command)
    assert not opened, (command, opened)
try:
    socket.socket(socket.AF_INET).connect(("127.0.0.1", 9))
except OSError:
    print("opened", len(opened))
"""


def test_local_runs_open_no_socket(tiny_bert, tmp_path):
    rows = [{"query": f"query {i}", "pos": [f"document {i}"], "scores": [i]} for i in range(8)]
    for name, kept in (("train", ("query", "pos")), ("sts", ("query", "pos", "scores"))):
        lines = [json.dumps({key: row[key] for key in kept}) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    model, cpu = ["--model.model_name_or_path", str(tiny_bert)], ["--trainer.accelerator", "cpu"]
    train = ["--data.train_path", "train.jsonl", "--data.val_path", "sts.jsonl"]
    commands = [
        ["fit", *model, *train, *cpu, "--trainer.max_epochs", "1"],
        ["fit", *model, *train, *cpu, "--trainer.max_epochs", "2", "--ckpt_path", "last"],
        ["validate", *model, "--data.val_path", "sts.jsonl", *cpu],
        ["predict", "--model.model_name_or_path", "run/model", "--data.predict_path", "sts.jsonl"],
        ["export", "run/checkpoints/last.ckpt", "exported"],
        ["teach", "--model", "exported", "--data", "train.jsonl", "--out", "store"],
        ["evaluate", "exported", str(tiny_bert), "--data", "sts.jsonl", "--out", "results"],
        ["cache"],
    ]
    commands[3] += cpu
    # As a user has it: nothing says that the hub is not to be asked.
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("opened 1\n"), "the block itself works"
    for name in ("run/model", "run/embeddings.npy", "store/embeddings.f32", "results"):
        assert (Path(tmp_path) / name).exists()
