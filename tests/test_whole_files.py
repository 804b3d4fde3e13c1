"""What is written is whole or not there, whoever else writes and whenever a process dies."""

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from embedtune.errors import InputError
from embedtune.whole_files import (
    FORMER,
    discard,
    naming,
    part_of,
    put,
    put_together,
    refuse_in_the_way,
    remove,
    sweep,
    sweep_together,
    write_text,
    writing,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("below", ["", "a/b"])
@pytest.mark.parametrize(
    ("name", "is_told"), [("link", "the link"), ("loop", "the link"), ("file", "the file")]
)
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path, name, is_told, below):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=f"^out: expected a folder, found {is_told} .*/{name}"):
        refuse_in_the_way(tmp_path / name / below, "out: expected a folder")


def test_a_folder_and_a_link_to_one_are_in_no_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("", "a/b", "link", "link/a"):
        refuse_in_the_way(tmp_path / name, "out: expected a folder")


def test_a_file_takes_the_place_of_the_former_and_leaves_nothing(tmp_path):
    path = tmp_path / "below" / "a.txt"
    for text in ("first", "second"):
        write_text(path, text)
        assert path.read_text() == text
        assert names(path.parent) == ["a.txt"]


def test_a_block_that_fails_leaves_the_former(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "former")

    def fail() -> None:
        with writing(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "former"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("full", ["ENOSPC", "EIO"])
def test_what_has_not_reached_the_disk_takes_no_place(tmp_path, monkeypatch, full):
    path = tmp_path / "a.txt"
    write_text(path, "former")

    def fail(descriptor: int) -> None:
        raise OSError(getattr(errno, full), "lost")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="part"):
        write_text(path, "new")
    assert path.read_text() == "former"
    assert names(tmp_path) == ["a.txt"]


def test_files_that_belong_together_are_all_put_back(tmp_path, monkeypatch):
    """Where their names do not reach the disk: not even a file that had no former keeps its."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"former {name}")
    parts = {tmp_path / f"{name}.part": tmp_path / name for name in ("a", "b", "c")}
    for part in parts:
        part.write_text("new")
    fsync = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "lost")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(OSError, match="lost"):
        put_together(parts)
    assert names(tmp_path) == ["a", "b"]
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["former a", "former b"]


def test_a_file_system_that_cannot_wait_for_the_disk_is_written_to(tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "no fsync")

    monkeypatch.setattr(os, "fsync", fail)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_what_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    make, made = tempfile.mkdtemp, []

    def make_and_lose(*args, **kwargs) -> str:
        made.append(make(*args, **kwargs))
        if len(made) == 1:
            sweep(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert len(made) == 2
    assert names(tmp_path) == ["a.txt"]


def test_the_first_of_two_writers_stays_where_asked(tmp_path):
    for keep, expected in ((True, "other"), (False, "own")):
        path = tmp_path / f"{keep}.txt"
        with writing(path, keep_existing=keep) as part:
            part.write_text("own")
            path.write_text("other")  # as another process would meanwhile
        assert path.read_text() == expected


@pytest.mark.parametrize("former", ["nothing", "file", "folder"])
def test_a_folder_takes_the_place_of_anything(tmp_path, former):
    path = tmp_path / "model"
    if former == "file":
        path.write_text("old")
    elif former == "folder":
        folder_of(path, "old")
    put(folder_of(part_of(path), "new"), path)
    assert (path / "file").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_replaced_keeps_its_name(tmp_path, monkeypatch):
    path = folder_of(tmp_path / "model", "old")
    part = folder_of(part_of(path), "new")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("embedtune.whole_files._swap", lambda one, other: False)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        put(part, path)
    assert (path / "file").read_text() == "old"
    assert not path.with_name(path.name + FORMER).exists()


class KilledError(Exception):
    """What ends a block as a kill would."""


@pytest.fixture(params=["swapped", "renamed twice"])
def swaps(request, monkeypatch) -> bool:
    """Whether the system swaps names, as Linux does."""
    if request.param == "swapped":
        if sys.platform != "linux":
            pytest.skip("it swaps no names")
        return True
    monkeypatch.setattr("embedtune.whole_files._swap", lambda one, other: False)
    return False


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("call", ["rename", "replace", "rmtree"])
def test_a_kill_while_a_folder_is_replaced_costs_nothing(tmp_path, monkeypatch, swaps, call, again):
    """Before its former is set aside, before it takes the place, when the former is half gone."""
    path = folder_of(tmp_path / "last.ckpt", "old")
    former = path.with_name(path.name + FORMER)

    def killed(*args, **kwargs):
        if call == "rmtree":
            (Path(args[0]) / "file").unlink(missing_ok=True)
        raise KilledError

    for kills in range(1 + again):
        remove(part_of(path))
        part = folder_of(part_of(path), f"new {kills}")
        with monkeypatch.context() as patch:
            patch.setattr(shutil if call == "rmtree" else Path, call, killed)
            with contextlib.suppress(KilledError):
                put(part, path)
        whole = path if path.exists() else former
        is_there = swaps or call == "rmtree"
        assert whole == path or not is_there
        assert (whole / "file").read_text().startswith("new" if is_there else "old")
    sweep_together(tmp_path, "*.ckpt")
    assert names(tmp_path) == [whole.name]
    put(folder_of(part_of(path), "newest"), path)
    assert names(tmp_path) == ["last.ckpt"]
    assert (path / "file").read_text() == "newest"


@pytest.mark.parametrize("former", ["file", "folder", "link"])
def test_a_name_that_does_not_reach_the_disk_stays_the_former_s(
    tmp_path, monkeypatch, swaps, former
):
    path, target = tmp_path / "model", folder_of(tmp_path / "target", "old")
    if former == "link":
        path.symlink_to(target)
    elif former == "file":
        path.write_text("old")
    else:
        folder_of(path, "old")
    part, fsync = folder_of(part_of(path), "new"), os.fsync

    def fail_for_the_name(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path):
            raise OSError(errno.EIO, "lost")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_the_name)
    with pytest.raises(OSError, match="lost"):
        put(part, path)
    kept = path if swaps else path.with_name(path.name + FORMER)
    assert (kept if former == "file" else kept / "file").read_text() == "old"
    assert kept.is_symlink() == (former == "link")


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    path = folder_of(tmp_path / "config.yaml", "somebody's")
    said = "config.yaml: expected a file or nothing, found a folder"
    with pytest.raises(InputError, match=said):
        write_text(path, "new")
    part_of(path).write_text("new")
    (tmp_path / "other.part").write_text("new")
    with pytest.raises(InputError, match=said):
        put_together({tmp_path / "other.part": tmp_path / "other", part_of(path): path})
    assert (path / "file").read_text() == "somebody's"
    assert names(tmp_path) == ["config.yaml", "config.yaml.part", "other.part"]
    (tmp_path / "last.ckpt").symlink_to(path)  # as Lightning makes, and nothing is lost of one
    write_text(tmp_path / "last.ckpt", "new")
    assert (tmp_path / "last.ckpt").read_text() == "new"
    assert (path / "file").read_text() == "somebody's"


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    target = folder_of(tmp_path / "target", "kept")
    (tmp_path / "link").symlink_to(target)
    remove(tmp_path / "link")
    remove(tmp_path / "link")
    assert names(tmp_path) == ["target"]


WRITER = """
import sys, time
from pathlib import Path
from embedtune.whole_files import writing
with writing(Path(sys.argv[1])) as part:
    part.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_of_what_is_discarded_a_kill_leaves_no_half(tmp_path, monkeypatch):
    """Under its name, that is: what is left is swept."""

    def dies(path: Path) -> None:
        (path / "file").unlink()
        raise KeyboardInterrupt

    folder = folder_of(tmp_path / "a.ckpt", "whole")
    with monkeypatch.context() as patch:
        patch.setattr("embedtune.whole_files.shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            discard(folder)
    assert names(tmp_path) == ["a.ckpt.part"]
    discard(folder_of(folder, "another of that name"))
    assert names(tmp_path) == []
    discard(folder)  # nothing


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is swept there")
def test_what_a_killed_process_left_is_swept_and_a_living_one_is_let_be(tmp_path):
    path = tmp_path / "a.txt"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "writing\n"
        write_text(path, "own")
        assert len(names(tmp_path)) == 2, "that of the living"
        other.send_signal(signal.SIGKILL)
        other.wait()
    write_text(path, "again")
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "again"


def test_sweeping_takes_parts_that_were_made_here_alone(tmp_path):
    """Others end their names so, too: what is downloaded, and split archives."""
    others = [".a.txt.part", ".hidden.part", "a.part", "b.txt", "corpus.jsonl.part"]
    for name in others:
        (tmp_path / name).touch()
    folder_of(tmp_path / "folder.part", "somebody else's")
    own = [tempfile.mkdtemp(prefix=".[a].txt.", suffix=".part", dir=tmp_path) for _ in range(2)]
    sweep(tmp_path, "a")
    assert all(Path(path).exists() for path in own)
    sweep(tmp_path, "[a].txt")
    assert names(tmp_path) == sorted([*others, "folder.part"])
    tempfile.mkdtemp(prefix=".b.", suffix=".part", dir=tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*others, "folder.part"])


def test_so_does_sweeping_what_several_processes_write_together(tmp_path):
    for name in ("a.ckpt", "a.ckpt.part", "corpus.jsonl.part"):
        (tmp_path / name).touch()
    folder_of(tmp_path / "b.ckpt.part", "half")
    sweep_together(tmp_path, "*.ckpt")
    assert names(tmp_path) == ["a.ckpt", "corpus.jsonl.part"]


def test_what_is_put_has_reached_the_disk(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync

    def remember(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", remember)
    path = tmp_path / "model"
    put(folder_of(part_of(path), "new"), path)
    # What it holds, itself, and then its name in the folder above.
    assert synced == ["file", "model.part", tmp_path.name]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(28, "No space left on device"), "here"),
        (OSError(28, "No space left on device", "there"), "there"),
        (RuntimeError("serialising: I/O error: No space left on device (os error 28)"), "here"),
    ],
)
def test_an_error_of_the_disk_names_what_was_written(error, named):
    with pytest.raises(OSError, match="No space left") as caught, naming(Path("here")):
        raise error
    assert (caught.value.errno, caught.value.filename) == (28, named)


def test_any_other_error_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="a defect"), naming(Path("here")):
        raise RuntimeError("a defect")
