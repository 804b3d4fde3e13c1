"""Rows stay in a memory-mapped table; negatives are a function of (seed, epoch, example)."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import Ranks

from embedtune.data import rows as rows_module
from embedtune.data.examples import ExampleDataset, draw_negatives, negatives_generator
from embedtune.data.lines import resolve_paths
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.data.sampler import Key
from embedtune.errors import InputError


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def triplets(count: int) -> list[dict]:
    return [
        {"query": f"q{i}", "pos": [f"p{i}", f"r{i}"], "neg": [f"n{i}-{j}" for j in range(6)]}
        for i in range(count)
    ]


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = Rows([write(tmp_path / "f.jsonl", triplets(3))])
    assert rows.table[1] == {
        "query": "q1",
        "prompt": None,
        "positives": ["p1", "r1"],
        "negatives": [f"n1-{j}" for j in range(6)],
        "scores": [],
    }


def test_no_more_long_texts_than_fit_are_held_before_they_are_written(tmp_path):
    """Rows are counted where texts are short; Arrow's own limit is 2 GiB of text in a column."""
    texts = [f"{i} " + "long text " * 2**20 for i in range(3)]
    rows = Rows([write(tmp_path / "f.jsonl", [{"query": "q", "pos": [t]} for t in texts])])
    assert [len(chunk) for chunk in rows.table.data.column("positives").chunks] == [2, 1]
    assert [rows.table[i]["positives"] for i in range(3)] == [[text] for text in texts]


def test_a_file_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Though it ends as it was."""
    path = write(tmp_path / "f.jsonl", [{"query": f"old {i}"} for i in range(9)])
    read_digest = rows_module._file_digest

    def digest_before_a_copy(path):
        found = read_digest(path)
        path.write_bytes(path.read_bytes())
        return found

    monkeypatch.setattr(rows_module, "_file_digest", digest_before_a_copy)
    with pytest.raises(InputError, match="expected a file that stays as it is"):
        Rows([path])
    monkeypatch.undo()
    assert len(Rows([path])) == 9


def test_the_cache_follows_the_content(tmp_path, monkeypatch):
    reads = []
    open_table = rows_module.open_table

    def opened(path, schema, write, facts):
        return open_table(path, schema, lambda: reads.append(path) or write(), facts)

    monkeypatch.setattr(rows_module, "open_table", opened)
    path = write(tmp_path / "f.jsonl", [{"query": "cached"}])
    Rows([path])
    Rows([path])
    copy = tmp_path / "copy.v2.jsonl"
    copy.write_bytes(path.read_bytes())
    Rows([copy])
    assert len(reads) == 1
    write(path, [{"query": "edited"}])
    assert Rows([path]).table[0]["query"] == "edited"
    assert len(reads) == 2


def test_what_a_checkpoint_tells_of_rows_is_no_matter_of_how_they_are_read(tmp_path, monkeypatch):
    """A run goes on after an update, and where the format is now declared."""
    path = write(tmp_path / "f.jsonl", triplets(3))
    rows = Rows([path])
    monkeypatch.setattr(rows_module, "CACHE_VERSION", rows_module.CACHE_VERSION + 1)
    assert Rows([path], Format.TRIPLET).digest == rows.digest
    assert Rows([path]).table_digest != rows.table_digest
    assert Rows([path], Format.PAIR).digest != rows.digest


def test_a_text_file_is_not_taken_for_json_of_the_same_bytes(tmp_path):
    line = '{"query": "in json"}\n'
    for name, expected in (("f.jsonl", "in json"), ("f.txt", line.strip())):
        (tmp_path / name).write_text(line)
        assert Rows([tmp_path / name]).table[0]["query"] == expected


def test_a_row_that_fails_leaves_no_cache(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"query": "fails"}, {"query": 3}])
    for _ in range(2):
        with pytest.raises(InputError, match=":2:"):
            Rows([path])


def test_a_row_knows_its_file_and_line(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"query": "a0"}, {"query": "a1"}])
    second = write(tmp_path / "b.jsonl", [{"query": "b0"}])
    rows = Rows([first, second])
    assert [rows.place(i) for i in range(3)] == [f"{first}:1", f"{first}:2", f"{second}:1"]


def test_paths_may_be_a_file_a_list_or_a_glob(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, [{"query": name}])
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert resolve_paths(str(tmp_path / "*.jsonl"), "data.train_path") == files
    assert resolve_paths([str(files[1]), str(files[0])], "data.train_path") == files[::-1]


@pytest.mark.parametrize("spec", ["missing.jsonl", "*.none"])
def test_a_path_with_nothing_there_is_named_with_its_key(tmp_path, spec):
    with pytest.raises(InputError, match=r"data\.train_path: .*" + spec.replace("*", r"\*")):
        resolve_paths(str(tmp_path / spec), "data.train_path")


def test_a_row_with_several_positives_is_one_example_each(tmp_path):
    data = ExampleDataset(Rows([write(tmp_path / "f.jsonl", triplets(3))]), neg_nums=2)
    assert len(data) == 6
    assert [data[Key(0, i)].positives for i in range(6)] == [
        ["p0"],
        ["r0"],
        ["p1"],
        ["r1"],
        ["p2"],
        ["r2"],
    ]
    assert data[Key(0, 3)].known_positives == ["p1", "r1"]
    assert [example.example_id for example in data.__getitems__([Key(0, 5), Key(0, 0)])] == [5, 0]


def test_a_scored_row_is_one_list(tmp_path):
    row = {"query": "q", "pos": ["a", "b"], "scores": [1, 0.25]}
    data = ExampleDataset(Rows([write(tmp_path / "f.jsonl", [row])]))
    assert len(data) == 1
    assert (data[Key(0, 0)].positives, data[Key(0, 0)].scores) == (["a", "b"], [1.0, 0.25])


def test_negatives_are_redrawn_every_epoch_and_reproducible(tmp_path):
    rows = Rows([write(tmp_path / "f.jsonl", triplets(8))])
    data = ExampleDataset(rows, neg_nums=3, seed=1)
    epochs = [[data[Key(epoch, i)].negatives for i in range(16)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    again = ExampleDataset(rows, neg_nums=3, seed=1)
    assert [again[Key(1, i)].negatives for i in reversed(range(16))] == epochs[1][::-1]
    other = ExampleDataset(rows, neg_nums=3, seed=2)
    assert [other[Key(0, i)].negatives for i in range(16)] != epochs[0]
    # The two examples of one row do not share their draw.
    assert any(a != b for a, b in zip(epochs[0][::2], epochs[0][1::2], strict=True))


def test_no_two_streams_of_negatives_overlap():
    """Nor any of them that of the epoch's order: all of one seed share a key of Philox."""
    keys = [Key(epoch, example) for epoch in range(2) for example in (0, 1, 2, 3, 2**32, 2**40)]
    streams = [negatives_generator(7, key).bit_generator.random_raw(1000) for key in keys]
    order = [np.random.Philox(key=np.array([7, e], np.uint64)).random_raw(1000) for e in range(2)]
    values = np.concatenate([*streams, *order])
    assert len(np.unique(values)) == len(values)


def test_negatives_do_not_repeat_while_there_are_enough():
    generator = np.random.default_rng(0)
    for _ in range(50):
        drawn = draw_negatives(list("abcdef"), ["x"], 6, generator)
        assert sorted(drawn) == list("abcdef")


def test_too_few_negatives_are_resampled_evenly():
    drawn = draw_negatives(["a", "b", "b"], ["x"], 5, np.random.default_rng(0))
    assert sorted(drawn.count(text) for text in "ab") == [2, 3]


def test_a_negative_is_never_equal_to_a_positive():
    generator = np.random.default_rng(0)
    drawn = [text for _ in range(50) for text in draw_negatives(["p", "a"], ["p"], 3, generator)]
    assert set(drawn) == {"a"}


def anonymous_megabytes():
    kilobytes = re.search(r"Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]
    return int(kilobytes) / 1024


def open_rows(path):
    """Write how many rows there are, and what they take of this process's own memory."""
    before = anonymous_megabytes()
    data = ExampleDataset(Rows([path]))
    assert data[Key(0, len(data) - 1)].query.endswith(str(len(data) - 1))
    sys.stdout.write(f"{len(data)} {anonymous_megabytes() - before}")
    sys.stdout.flush()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_a_quarter_million_rows_are_not_held_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(250_000):
            file.write(f'{{"query": "{"what is " * 8}{i}", "pos": ["{"a text " * 20}{i}"]}}\n')
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "cache"))
    for _ in range(2):  # reading the file, and opening the cache
        opened = Ranks(open_rows, path, folder=tmp_path)
        assert opened.wait() == [0]
        count, megabytes = opened.output().split()
        assert int(count) == 250_000
        assert float(megabytes) < 50  # the texts alone are 60
