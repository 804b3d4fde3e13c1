"""Cached tables are kept within a limit, the ones not opened for longest go first."""

import json
import os
import time
from pathlib import Path

import pytest

from embedtune import InputError
from embedtune.cli import main
from embedtune.data import Rows
from embedtune.data.cache import cache_folder, cached_tables

DAY = 86_400


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(folder: Path, name: str, days: int = 0) -> Rows:
    """Read rows of about 100 kB, and say that they were last opened so many days ago."""
    path = folder / f"{name}.jsonl"
    text = "".join(json.dumps({"query": f"{name} {i} {'x' * 90}"}) + "\n" for i in range(1000))
    path.write_text(text)
    before = {table.path for table in cached_tables()}
    opened = Rows([path])
    for table in cached_tables():
        if table.path not in before:
            os.utime(table.path, (time.time() - days * DAY,) * 2)
    return opened


def flip_bit(path: Path, place: float) -> None:
    """Flip a bit at a place from 0, the start of a file, to 1, its end."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.7, 0.999, 1])
def test_a_damaged_table_is_made_anew(tmp_path, caplog, place):
    whole = rows(tmp_path, "a")
    before = whole.table[:]
    (table,) = cached_tables()
    flip_bit(table.path, place)
    again = Rows([tmp_path / "a.jsonl"])
    assert again.table[:] == before
    assert (again.format, again.queries_digest) == (whole.format, whole.queries_digest)
    assert f"{table.path}: is damaged, and made anew" in caplog.text
    caplog.clear()
    assert Rows([tmp_path / "a.jsonl"]).table[:] == before
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("size", [0, 1, 20, 100, -1])
def test_so_is_one_that_was_cut_short(tmp_path, size):
    before = rows(tmp_path, "a").table[:]
    (table,) = cached_tables()
    table.path.write_bytes(table.path.read_bytes()[:size])
    assert Rows([tmp_path / "a.jsonl"]).table[:] == before


def test_who_has_a_damaged_table_open_keeps_what_it_has(tmp_path):
    first = rows(tmp_path, "a")
    (table,) = cached_tables()
    with table.path.open("ab") as file:
        file.write(b"more")
    Rows([tmp_path / "a.jsonl"])
    assert first.table[999]["query"].startswith("a 999")


def test_the_tables_not_opened_for_longest_make_room(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("EMBEDTUNE_CACHE_LIMIT", "0.00025")
    for name, days in (("oldest", 3), ("older", 2), ("recent", 1)):
        rows(tmp_path, name, days)
    assert len(cached_tables()) == 2  # a third makes one go
    reopened = Rows([tmp_path / "older.jsonl"])  # now it was opened last
    new = rows(tmp_path, "new")
    assert len(cached_tables()) == 2
    assert len(reopened.table) == len(new.table) == 1000
    assert Rows([tmp_path / "oldest.jsonl"]).table[0]["query"].startswith("oldest 0")


def test_what_was_just_opened_stays_whatever_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDTUNE_CACHE_LIMIT", "0")
    for name in ("a", "b", "c"):
        rows(tmp_path, name)
    assert len(cached_tables()) == 3


@pytest.mark.parametrize("limit", ["-1", "many", "nan"])
def test_a_limit_that_is_none_is_named(tmp_path, monkeypatch, limit):
    monkeypatch.setenv("EMBEDTUNE_CACHE_LIMIT", limit)
    with pytest.raises(InputError, match=f"EMBEDTUNE_CACHE_LIMIT: expected GB, .* found '{limit}'"):
        rows(tmp_path, "a")
    monkeypatch.delenv("EMBEDTUNE_CACHE_LIMIT")
    rows(tmp_path, "a")
    monkeypatch.setenv("EMBEDTUNE_CACHE_LIMIT", limit)
    with pytest.raises(InputError, match="EMBEDTUNE_CACHE_LIMIT"):
        Rows([tmp_path / "a.jsonl"])  # of a table that is there


def test_the_command_lists_and_clears(tmp_path, cache, capsys):
    main(["cache"])
    assert f"0 tables in {cache}" in capsys.readouterr().out
    rows(tmp_path, "a")
    rows(tmp_path, "b")
    main(["cache"])
    listed = capsys.readouterr().out
    assert f"2 tables in {cache}" in listed
    assert all(table.path.name in listed for table in cached_tables())
    main(["cache", "--clear", "true"])
    assert f"2 tables removed from {cache}" in capsys.readouterr().out
    assert list(cache.iterdir()) == []


def test_tables_of_others_are_neither_listed_nor_removed(tmp_path, cache, monkeypatch, capsys):
    cache.mkdir()
    others = [cache / name for name in ("mine.arrow", f"{'0' * 31}.arrow", f"{'0' * 40}.arrow")]
    for path in others:
        path.write_bytes(b"x" * 10**6)
        os.utime(path, (0, 0))
    monkeypatch.setenv("EMBEDTUNE_CACHE_LIMIT", "0")
    rows(tmp_path, "a")
    assert len(cached_tables()) == 1
    main(["cache", "--clear", "true"])
    assert f"1 tables removed from {cache}" in capsys.readouterr().out
    assert sorted(cache.iterdir()) == sorted(others)


def test_a_cache_that_is_a_file_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="EMBEDTUNE_CACHE: expected a folder, found the file"):
        rows(tmp_path, "a")
    with pytest.raises(SystemExit) as caught:
        main(["cache"])
    assert caught.value.code == 2


def test_a_cache_that_leads_nowhere_is_told(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    for given, found in ((f"{tmp_path}/loop/x", "the link"), ("~nosuchuser/x", "~nosuchuser/x: ~")):
        monkeypatch.setenv("EMBEDTUNE_CACHE", given)
        with pytest.raises(InputError, match=f"EMBEDTUNE_CACHE: expected a folder, found {found}"):
            cache_folder()


def test_the_folder_of_the_cache_may_be_written_from_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EMBEDTUNE_CACHE", "~/tables")
    rows(tmp_path, "a")
    assert [table.path.parent for table in cached_tables()] == [tmp_path / "home/tables"]
    assert not Path("~").exists()
    monkeypatch.setenv("EMBEDTUNE_CACHE", "")
    assert cache_folder().is_absolute()


def test_what_a_kill_left_of_any_table_is_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    (tmp_path / "cache/.another.arrow.x1_y2_z3.part").mkdir(parents=True)
    (tmp_path / "cache/corpus.part").touch()  # a download of the user's
    for _ in range(2):
        Rows([tmp_path / "rows.jsonl"])
    left = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert left == [".arrow", ".part"]
