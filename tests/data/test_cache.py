"""Cached tables are kept within a limit, the ones not opened for longest go first."""

import json
import os
import time
from pathlib import Path

import pytest

from embedtune import InputError
from embedtune.cli import main
from embedtune.data import Rows
from embedtune.data.cache import cached_tables

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


def test_the_tables_not_opened_for_longest_make_room(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("EMBEDTUNE_CACHE_LIMIT", "0.00025")
    for name, days in (("oldest", 3), ("older", 2), ("recent", 1)):
        rows(tmp_path, name, days)
    assert len(cached_tables()) == 2  # a third makes one go
    assert len(list(cache.glob("*.json"))) == 2
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
