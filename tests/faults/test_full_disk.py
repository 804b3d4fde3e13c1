"""A disk that is full from any write on costs nothing that was there, and is one line.

What a command asks the system to write is counted, and each write in its turn fails: every open,
write, folder, rename, link and wait for the disk, also of Rust and C++ (write_points.c). Instead of
that the process may be killed there. `--write-points 0` tries every one of them, `751-1407` those.
"""

import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from forks import HAS_COMPILER, Ranks, failing_at

from embedtune.checkpoints.find import last_checkpoint
from embedtune.checkpoints.read import read_weights
from embedtune.data.lines import resolve_paths
from embedtune.data.rows import Rows
from embedtune.data.teacher_store import TeacherStore
from embedtune.errors import InputError
from embedtune.export.folder import is_verified

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")


def fit(model: Path, rows: str, *flags: str) -> list[str]:
    return [
        *("fit", "--model.model_name_or_path", str(model), "--data.train_path", rows),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.batch_size=4"),
        *("--trainer.max_epochs", "1", "--checkpoint.every_n_train_steps", "1", *flags),
    ]


def fit_under(strategy: str, model: Path, rows: str) -> list[str]:
    return fit(model, rows, "--trainer.strategy", strategy)


def go_on(save_last: str, model: Path, rows: str = "former.jsonl", epochs: int = 2) -> list[str]:
    """Return the arguments that go on with the run of :func:`make_killed`."""
    more = ("--trainer.default_root_dir", f"killed-{save_last}", "--ckpt_path", "last")
    more += ("--checkpoint.save_last", save_last, "--trainer.max_epochs", str(epochs))
    return fit(model, "former.jsonl", *more)


def teach(model: Path, rows: str) -> list[str]:
    return ["teach", "--model", str(model), "--data", rows, "--out", "store"]


def predict(model: Path, rows: str) -> list[str]:
    return [
        *("predict", "--model.model_name_or_path", str(model), "--data.predict_path", rows),
        *("--trainer.accelerator", "cpu"),
    ]


def evaluate(model: Path, rows: str) -> list[str]:
    return ["evaluate", str(model), "--data", f"{Path(rows).stem}-set", "--out", "measured"]


def export(model: Path, rows: str) -> list[str]:
    return ["export", f"{Path(rows).stem}.ckpt", "exported", "--model_name_or_path", str(model)]


def hold_fit(root: str, folder: Path) -> None:
    assert is_verified(folder / root / "model")
    kept = [last_checkpoint(path) for path in (folder / root).glob("checkpoints*")]
    for path in filter(None, kept):
        read_weights(path)


def hold_store(folder: Path) -> None:
    rows = Rows(resolve_paths(str(folder / "store/texts.jsonl"), "data"))
    if not (folder / "store/embeddings.f32.json").is_file():
        raise InputError("store: expected its description")
    TeacherStore([folder / "store/embeddings.f32"], len(rows), None, rows.queries_digest)


def hold_measured(folder: Path) -> None:
    json.loads((folder / "measured/evaluation.json").read_text())


class Case(NamedTuple):
    """A command: its arguments, what it leaves, and what must hold of that."""

    arguments: Callable[[Path, str], list[str]]
    leaves: list[str]
    holds: Callable[[Path], None]


def case_of_fit(arguments: Callable[[Path, str], list[str]], root: str = "run") -> Case:
    return Case(arguments, [f"{root}/model"], partial(hold_fit, root))


CASES = {
    "fit": case_of_fit(fit),
    "fsdp": case_of_fit(partial(fit_under, "fsdp")),
    "zero2": case_of_fit(partial(fit_under, "zero2")),
    "go-on": case_of_fit(partial(go_on, "link"), "killed-link"),
    "copy-last": case_of_fit(partial(go_on, "true"), "killed-true"),
    "teach": Case(teach, ["store"], hold_store),
    "predict": Case(predict, ["run/embeddings.npy"], lambda folder: None),
    "evaluate": Case(evaluate, ["measured/evaluation.json", "measured/quality.png"], hold_measured),
    "export": Case(export, ["exported"], lambda folder: is_verified(folder / "exported")),
}
AGAIN = ("fit", "fsdp", "zero2")
"""Cases whose second start is another run, and keeps the checkpoints of the first."""

WORDS = {False: "full", True: "killed"}
FAST = [("fit", False), ("teach", True)]
OTHERS = [(name, dies) for name in CASES for dies in WORDS if (name, dies) not in FAST]
WAYS = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]


@pytest.fixture(scope="module")
def template(tiny_bert, tmp_path_factory) -> Path:
    """Return a folder where every command has run once, on the former rows."""
    folder = tmp_path_factory.mktemp("template") / "work"
    folder.mkdir()
    for name, count in (("former", 12), ("new", 16)):
        made = [{"query": f"{name} {i}", "pos": [f"document {i}"]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        write_plain_set(folder / f"{name}-set", name)
    for name in ("new", "former"):
        run(folder, fit(tiny_bert, f"{name}.jsonl"))
        shutil.copy((folder / "run/checkpoints/last.ckpt").resolve(), folder / f"{name}.ckpt")
        if name == "new":
            shutil.rmtree(folder / "run")
    for save_last in ("link", "true"):
        make_killed(folder, tiny_bert, save_last)
    for case in CASES.values():
        if case.arguments in (teach, predict, evaluate, export):
            run(folder, case.arguments(tiny_bert, "former.jsonl"))
    return folder


def make_killed(folder: Path, model: Path, save_last: str) -> None:
    """Make a run of an epoch that was killed in its last save: its former one is still there."""
    saved = folder / f"killed-{save_last}" / "checkpoints"
    arguments = go_on(save_last, model, epochs=1)
    run(folder, [*arguments, "--trainer.max_steps", "2"])
    shutil.copytree(saved, folder / "former-save", symlinks=True)
    run(folder, arguments)
    (saved / "last.ckpt").unlink()
    shutil.copytree(folder / "former-save", saved, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(folder / "former-save")


def write_plain_set(folder: Path, name: str) -> None:
    (folder / "qrels").mkdir(parents=True)
    texts = [{"_id": str(i), "text": f"{name} {i}"} for i in range(8)]
    for file in ("corpus", "queries"):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    judged = "".join(f"{i}\t{(i + 1) % 8}\t1\n" for i in range(8))
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


def run(folder: Path, arguments: list[str], point: int = 0, dies: bool = False) -> tuple[int, str]:
    """Run a command in a folder; return its exit code and what it has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDTUNE_CACHE", str(folder / "cache"))
        patch.setenv("TMPDIR", str(folder))
        started = Ranks(failing_at, point, folder, dies, arguments, folder=folder.parent)
    (code,) = started.wait()
    return code, started.output()


def states(folder: Path, leaves: list[str]) -> list[dict[str, bytes]]:
    """Return the files of what a command leaves, without those that the next command sweeps."""
    found = []
    for leaf in leaves:
        path = folder / leaf
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        named = {str(file.relative_to(folder)): file for file in files}
        kept = {at: file for at, file in named.items() if ".part/" not in at}
        found.append({at: kept[at].read_bytes() for at in kept if not at.endswith(".former")})
    return found


def checkpoints(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/checkpoints*/*"))


def leftovers(folder: Path) -> list[str]:
    marks = (".part", ".former", ".unverified", "UNVERIFIED")
    return [str(path) for path in folder.rglob("*") if path.name.endswith(marks)]


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("name", "dies"), WAYS, ids=lambda value: WORDS.get(value, value))
def test_a_write_that_fails_costs_nothing_that_was_there(
    tiny_bert, template, tmp_path, request, name, dies
):
    case = CASES[name]
    arguments = case.arguments(tiny_bert, "new.jsonl")
    shutil.copytree(template, tmp_path / "whole", symlinks=True)
    code, output = run(tmp_path / "whole", arguments)
    assert code == 0, output
    former, new = (states(folder, case.leaves) for folder in (template, tmp_path / "whole"))
    assert all(a != b for a, b in zip(former, new, strict=True))
    count = int(re.findall(r"^write points: (\d+)$", output, re.MULTILINE)[0])
    points = chosen(request.config.getoption("--write-points"), count)
    for point in points:
        folder = tmp_path / f"{point}-of-{count}"
        shutil.copytree(template, folder, symlinks=True)
        code, output = run(folder, arguments, point, dies)
        found = states(folder, case.leaves)
        is_old_or_new = all(own in of for own, *of in zip(found, former, new, strict=True))
        if dies and name == "teach" and not is_old_or_new:
            assert_refused(folder)
        else:
            assert is_old_or_new, output
            case.holds(folder)
        if dies:
            assert code in (-signal.SIGKILL, 0), output
        else:
            assert_told(code, output)
            assert code or found == new
        code, output = run(folder, arguments)
        assert code == 0, output
        assert states(folder, case.leaves) == new
        assert not leftovers(folder)
        assert checkpoints(folder) == checkpoints(tmp_path / "whole") or name in AGAIN
        shutil.rmtree(folder)
        sys.stdout.write(f"{name}, {WORDS[dies]} at write point {point} of {count}: held\n")


def chosen(asked: str, count: int) -> list[int]:
    """Return which of ``count`` points are asked for."""
    first, _, last = asked.partition("-")
    if last:
        return list(range(int(first), min(int(last), count) + 1))
    every = range(1, count + 1)
    return sorted(random.SystemRandom().sample(every, int(asked) or count))


def assert_refused(folder: Path) -> None:
    """Hold that a store is none: its files cannot take their places at once."""
    with pytest.raises(InputError, match="store"):
        hold_store(folder)


def assert_told(code: int, output: str) -> None:
    """Hold that a command has ended with one line, or well."""
    said = re.findall(r"embedtune: error: .*$", output, re.MULTILINE)
    assert code in (0, 1, 2), output
    assert len(said) == (code != 0), output
    assert "Traceback" not in output, output
