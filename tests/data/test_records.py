"""Rows are validated one by one: what does not fit is named by file, line and field."""

import errno
import gzip
import io
import json
import os
from pathlib import Path

import pytest
import zstandard

from embedtune.data import lines
from embedtune.data.records import Format, Record, RecordReader
from embedtune.errors import InputError

PAIR = {"query": "q", "pos": ["p"]}
TRIPLET = {**PAIR, "neg": ["n"]}
SCORED = {**PAIR, "scores": [0.5]}
DISTILL = {"query": "q"}


def write(path: Path, rows: list[dict | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path, declared: Format | None = None) -> list[Record]:
    return list(RecordReader([path], declared))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, Format.PAIR),
        (TRIPLET, Format.TRIPLET),
        (SCORED, Format.SCORED),
        (DISTILL, Format.DISTILL),
        ({**PAIR, "neg": None}, Format.PAIR),
    ],
)
def test_the_fields_tell_the_format(tmp_path, row, expected):
    reader = RecordReader([write(tmp_path / "f.jsonl", [row, row])])
    assert len(list(reader)) == 2
    assert reader.format == expected


@pytest.mark.parametrize(
    ("rows", "place", "found"),
    [
        ([PAIR] * 6 + ['{"query": "q", "pos": ["p"'], ":7:", "invalid JSON"),
        ([PAIR, "[1, 2]"], ":2:", "a list [1, 2]"),
        ([{"query": "q", "pos": "one text"}], ":1:", 'found the string "one text"'),
        ([PAIR, {"query": "", "pos": ["p"]}], ":2:", "field 'query'"),
        ([PAIR, {"query": "q", "pos": []}], ":2:", "an empty list"),
        ([PAIR, {"query": "q", "pos": ["p", " "]}], ":2:", "an empty string at position 1"),
        ([PAIR, {"pos": ["p"]}], ":2:", "field 'query' is missing"),
        ([PAIR, {**PAIR, "prompt_for_query": 3}], ":2:", "field 'prompt_for_query'"),
        ([TRIPLET, {**PAIR, "neg": []}], ":2:", "field 'neg'"),
        ([TRIPLET, {**PAIR, "neg": ["p", "p"]}], ":2:", "not also a positive"),
        ([TRIPLET, {**PAIR, "neg": ["p", "q"]}], ":2:", "not also a positive, or the query"),
        (
            [SCORED, {**SCORED, "pos": ["a", "b"]}],
            ":2:",
            "expected 2 numbers, one per 'pos', found 1",
        ),
        ([SCORED, {**SCORED, "scores": ["0.5"]}], ":2:", "field 'scores'"),
        ([SCORED, {**SCORED, "scores": [True]}], ":2:", "the boolean true"),
        ([SCORED, '{"query": "q", "pos": ["p"], "scores": [NaN]}'], ":2:", "finite"),
        ([SCORED, '{"query": "q", "pos": ["p"], "scores": [1e400]}'], ":2:", "finite"),
        ([SCORED, {**SCORED, "scores": [-1e39]}], ":2:", "of float32"),
        ([SCORED, {**SCORED, "scores": [10**400]}], ":2:", "of float32"),
        ([SCORED, {**SCORED, "scores": [float("-inf")]}], ":2:", "found the number -Infinity"),
        ([PAIR, '{"query": "q", "pos": ["p"], "id": ' + "7" * 5000 + "}"], ":2:", "invalid JSON"),
        ([PAIR, json.dumps(PAIR)[:-1] + ', "pos": ["x"]}'], ":2:", 'the field "pos" twice'),
        ([PAIR, '{"query": ' + "[" * 10**5], ":2:", "nested too deep"),
        ([PAIR, '{"a":' * 10**5], ":2:", "nested too deep"),
        ([PAIR, "[" * 900 + "]" * 900], ":2:", "a list [[["),
        ([PAIR, '{"query": "a\0b", "pos": ["p"]}'], ":2:", "Invalid control character"),
        ([PAIR, TRIPLET], ":2:", "found a triplet row"),
        ([TRIPLET, PAIR], ":2:", "found a pair row"),
        ([{**TRIPLET, "scores": [1.0]}], ":1:", "ambiguous"),
        ([PAIR, "", PAIR], ":2:", "blank line"),
        ([""], "", "an empty file"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, place, found):
    path = write(tmp_path / "f.jsonl", rows)
    with pytest.raises(InputError) as caught:
        read(path)
    assert f"{path}{place}" in str(caught.value)
    assert found in str(caught.value)
    assert (
        "expected" in str(caught.value)
        or "declare" in str(caught.value)
        or "JSON" in str(caught.value)
    )


def test_a_mixed_file_names_both_lines(tmp_path):
    path = write(tmp_path / "f.jsonl", [PAIR, PAIR, SCORED])
    with pytest.raises(InputError, match=rf"{path}:3: .* {path}:1 is a pair row"):
        read(path)


def test_a_declared_format_wins_over_the_fields(tmp_path):
    path = write(tmp_path / "f.jsonl", [{**TRIPLET, "scores": [1.0]}, {**TRIPLET, "scores": [0.0]}])
    reader = RecordReader([path], Format.SCORED)
    assert [record.scores for record in reader] == [[1.0], [0.0]]
    assert reader.ignored_fields == {"neg"}


def test_unknown_fields_are_counted_and_ignored(tmp_path):
    reader = RecordReader([write(tmp_path / "f.jsonl", [{**PAIR, "id": 7, "source": "x"}])])
    assert list(reader) == [Record("q", None, ["p"])]
    assert reader.ignored_fields == {"id", "source"}


def test_compressed_files_read_as_plain_ones(tmp_path):
    plain = write(tmp_path / "f.jsonl", [{**PAIR, "query": "día 天"}] * 3)
    gz, zst = tmp_path / "f.jsonl.gz", tmp_path / "f.jsonl.zst"
    gz.write_bytes(gzip.compress(plain.read_bytes()))
    zst.write_bytes(zstandard.compress(plain.read_bytes()))
    assert read(gz) == read(zst) == read(plain)


ROWS = b"".join(b'{"query": "number %d"}\n' % (i * i) for i in range(20_000))
GZIP = gzip.compress(ROWS)
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(ROWS)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", GZIP[:-20]),
        ("flipped.jsonl.gz", flip(GZIP, len(GZIP) // 2)),
        ("no.jsonl.gz", ROWS),
        ("followed.jsonl.gz", GZIP + b"more"),
        ("cut.jsonl.zst", ZSTD[:-20]),
        ("half.jsonl.zst", ZSTD[: len(ZSTD) // 2]),
        ("second_cut.jsonl.zst", ZSTD + ZSTD[:-1]),
        ("flipped.jsonl.zst", flip(ZSTD, len(ZSTD) // 2)),
        ("no.jsonl.zst", ROWS),
        ("followed.jsonl.zst", ZSTD + b"more"),
    ],
)
def test_a_damaged_archive_is_one_clear_error(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_zstandard_file_may_have_several_frames(tmp_path, frames):
    (tmp_path / "f.jsonl.zst").write_bytes(ZSTD * frames)
    assert len(read(tmp_path / "f.jsonl.zst")) == 20_000 * frames


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read: No such file"):
        read(tmp_path / "none.jsonl")

    class FailingDisk(io.StringIO):
        def __next__(self) -> str:
            if self.tell():
                raise OSError(errno.EIO, "Input/output error")
            return self.readline()

    monkeypatch.setattr(lines, "open_text", lambda path: FailingDisk('{"query": "q"}\n' * 3))
    with pytest.raises(InputError, match=r"f\.jsonl, after line 1: cannot be read: Input/output"):
        read(tmp_path / "f.jsonl")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match=r"data\.train_path: .* which is no file"):
            lines.resolve_paths(str(path), "data.train_path")


def test_bytes_that_are_not_utf8_are_one_clear_error(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"query": "caf\xe9"}\n')
    with pytest.raises(InputError, match="expected UTF-8"):
        read(path)


def test_half_a_surrogate_pair_is_one_clear_error(tmp_path):
    path = write(tmp_path / "f.jsonl", [PAIR, '{"query": "\\ud83d\\ude00", "pos": ["p"]}'])
    assert read(path)[1].query == "\U0001f600"
    write(path, [PAIR, '{"query": "\\ud83d alone", "pos": ["p"]}'])
    with pytest.raises(InputError, match=r":2: .*half a pair"):
        read(path)


def test_trailing_blank_lines_and_a_byte_order_mark_are_harmless(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\n\n\n")
    assert len(read(path)) == 1


def test_an_empty_prompt_counts_as_none(tmp_path):
    rows = [{**PAIR, "prompt_for_query": ""}, {**PAIR, "prompt_for_query": None}, PAIR]
    assert {record.prompt for record in read(write(tmp_path / "f.jsonl", rows))} == {None}


def test_a_text_file_is_a_query_a_line(tmp_path):
    path = tmp_path / "f.txt"
    path.write_bytes(b"first\rtext\r\n{not json\n")
    assert [record.query for record in read(path)] == ["first\rtext", "{not json"]
    compressed = tmp_path / "f.txt.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(compressed) == read(path)
    assert read(write(tmp_path / "f.txt.jsonl", [PAIR])) == [Record("q", None, ["p"])]
