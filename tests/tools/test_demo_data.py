"""Harvesting docstrings: always the same, split by module, in the formats that the rest reads."""

import json
import subprocess
import sys

import pytest

from embedtune import whole_files
from embedtune.data.lines import read_lines
from embedtune.data.records import Format, detect_format, parse_record
from embedtune.errors import InputError
from embedtune.tools import demo_data, docstrings
from embedtune.tools.demo_data import (
    MAX_DOCUMENT_CHARACTERS,
    Pair,
    collect_pairs,
    harvest,
    split_docstring,
    split_pairs,
)
from embedtune.tools.docstrings import Docstring

REST = "It says at some length what happens to the array and to each of its elements. " * 2


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, harvest(out)


@pytest.fixture(scope="module")
def pairs():
    return list(collect_pairs(docstrings.docstrings()))


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def files(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# --- The whole harvest ----------------------------------------------------------------------------


@pytest.mark.slow
def test_another_process_harvests_the_same_bytes_in_silence(harvested, tmp_path):
    code = """
import inspect, sys, sysconfig, warnings
from embedtune.tools.demo_data import harvest
warnings.simplefilter("always")
sysconfig.get_config_vars()
loaded = set(sys.modules)
harvest(sys.argv[1])
assert set(sys.modules) == loaded, set(sys.modules) - loaded
assert not {"numpy", "torch"} & loaded
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert files(tmp_path) == files(harvested[0])


def test_counts_are_those_of_the_files_and_as_many_as_promised(harvested):
    out, counts = harvested
    assert counts == (
        len(lines(out / "train.jsonl")),
        len(lines(out / "dev.jsonl")),
        len(lines(out / "test" / "queries.jsonl")),
        len(lines(out / "test" / "corpus.jsonl")),
    )
    assert 2000 <= counts.train <= 3200
    assert 200 <= counts.dev < 240
    assert 250 <= counts.test < 290
    assert counts.corpus == 1000


@pytest.mark.parametrize("split", ["train", "dev"])
def test_rows_are_pairs(harvested, split):
    rows = lines(harvested[0] / f"{split}.jsonl")
    assert all(row.keys() == {"query", "pos"} and len(row["pos"]) == 1 for row in rows)
    for line in read_lines([harvested[0] / f"{split}.jsonl"]):
        assert detect_format(line) is Format.PAIR
        parse_record(line, Format.PAIR)
    assert all(len(row["query"].split()) >= 3 and len(row["pos"][0]) >= 40 for row in rows)
    assert all("\n" not in row["query"] for row in rows)


def test_texts_come_once_and_no_document_repeats_its_query(pairs):
    assert len({pair.query for pair in pairs}) == len(pairs)
    assert len({pair.document for pair in pairs}) == len(pairs)
    assert len({pair.name for pair in pairs}) == len(pairs)
    assert not any(pair.query in pair.document for pair in pairs)
    assert not any("0x7f" in pair.query + pair.document for pair in pairs)


def test_all_sources_contribute_c_functions_included(pairs):
    names = {pair.name for pair in pairs}
    assert {"torch.cat", "torch.nn.modules.linear.Linear", "json.dump"} <= names
    assert any(name.startswith("numpy._core.multiarray.ndarray.") for name in names)


def test_the_test_set_searches_the_documents_of_all_splits(harvested):
    out, _ = harvested
    corpus = {row["_id"]: row["text"] for row in lines(out / "test" / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in lines(out / "test" / "queries.jsonl")}
    trained = {row["pos"][0]: row["query"] for row in lines(out / "train.jsonl")}
    header, *qrels = (out / "test" / "qrels" / "test.tsv").read_text().splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    assert [row.split("\t")[0] for row in qrels] == list(queries)
    assert {row.split("\t")[2] for row in qrels} == {"1"}
    assert trained.keys() & set(corpus.values())
    assert not {corpus[row.split("\t")[1]] for row in qrels} & trained.keys()
    assert not set(queries.values()) & set(trained.values())


def test_a_module_is_in_one_split(pairs):
    splits = split_pairs(pairs)
    modules = {name: {pair.module for pair in found} for name, found in splits.items()}
    assert sum(map(len, modules.values())) == len(set.union(*modules.values()))
    assert sum(map(len, splits.values())) == len(pairs)
    assert splits == split_pairs(reversed(pairs))


def test_a_file_in_the_way_is_named(tmp_path):
    path, half = tmp_path / "taken", tmp_path / "half"
    path.write_text("")
    for out in (path, path / "below"):
        with pytest.raises(InputError, match="expected a folder to write to, found the file"):
            harvest(out)
    half.mkdir()
    (half / "test").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"half: .* found the link .*half/test, which leads"):
        harvest(half)
    assert not (half / "dev").exists()  # which would be taken for others' data


@pytest.mark.parametrize("name", ["train.jsonl", "dev/corpus.jsonl", "README.md"])
def test_others_data_are_not_written_over(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"my own caf\xe9")  # in whatever encoding
    with pytest.raises(InputError, match="expected a folder without other data, found"):
        harvest(tmp_path)
    assert files(tmp_path) == {name: b"my own caf\xe9"}


def test_what_is_written_is_whole_or_the_former(tmp_path, monkeypatch, pairs):
    monkeypatch.setattr(demo_data, "collect_pairs", lambda found: pairs)
    harvest(tmp_path)
    before = files(tmp_path)
    assert len(before) == 9

    def fail(part, path):
        raise OSError("killed")

    monkeypatch.setattr(demo_data, "collect_pairs", lambda found: pairs[::2])
    monkeypatch.setattr(whole_files, "put", fail)
    with pytest.raises(OSError, match="killed"):
        harvest(tmp_path)
    assert files(tmp_path) == before


# --- Parts ----------------------------------------------------------------------------------------


def test_large_modules_are_never_held_out():
    large = [Pair("large", f"large.{i}", f"query {i}", f"text {i}") for i in range(500)]
    small = [Pair(f"m{i}", f"m{i}.f", f"small {i}", f"its text {i}") for i in range(600)]
    splits = split_pairs([*large, *small])
    assert {name: len(found) for name, found in splits.items()} == {
        "train": 650,
        "dev": 200,
        "test": 250,
    }
    assert set(large) <= set(splits["train"])


@pytest.mark.parametrize(
    ("text", "query", "document"),
    [
        ("", "", ""),
        ("Only a summary.", "Only a summary.", ""),
        ("Two\n   lines.\n\n  The\n    rest.", "Two lines.", "The\nrest."),
        ("f(a,\n  b) -> c\n--\n\nA summary.\n\nRest.", "A summary.", "Rest."),
        ("f(a)\n\nf(a, b)\n\nA summary.\n\nRest.", "A summary.", "Rest."),
        ("See :meth:`~a.B.c` or\n:func:`d <e.d>`.\n\nRest.", "See a.B.c or d.", "Rest."),
        (".. versionadded:: 1.0\n\nA summary.\n\nRest.", "A summary.", "Rest."),
        ("A summary.\n\n.. deprecated:: 2\n\nRest.\n\n\n\n  End.", "A summary.", "Rest.\nEnd."),
        (
            "A sentence. " * 30 + "\n\nRest.",
            "A sentence.",
            "A sentence. " * 28 + "A sentence.\nRest.",
        ),
    ],
)
def test_a_docstring_is_cleaned_and_split(text, query, document):
    assert split_docstring(text) == (query, document)


def test_long_documents_end_at_a_word():
    _, document = split_docstring("A summary.\n\n" + "word " * 1000)
    assert MAX_DOCUMENT_CHARACTERS - 10 < len(document) <= MAX_DOCUMENT_CHARACTERS
    assert set(document.split()) == {"word"}


@pytest.mark.parametrize(
    "text",
    [
        "Return it.\n\n" + REST,  # too few words
        "Return the sorted array.\n\nShort.",
        "Return the sorted array.\n\n" + REST + "return the sorted array",
        "Return the sorted array.\n\n" + REST + "<object at 0x7f001234>",
        "Parameters are listed right here\n\n" + REST,
        "word " * 200 + "\n\n" + REST,
    ],
)
def test_docstrings_that_make_no_pair(text):
    assert list(collect_pairs([Docstring("m", "m.f", text)])) == []


def test_repeated_names_queries_and_documents_are_dropped():
    query, rest = "Return the sorted array.", f"\n\n{REST}"
    found = [
        Docstring("m", "m.f", query + rest),
        Docstring("m", "m.f", "Return another sorted array.\n\nOther: " + REST),
        Docstring("m", "m.g", query + "\n\nOther: " + REST),
        Docstring("m", "m.h", "Return another sorted array." + rest),
    ]
    assert [pair.name for pair in collect_pairs(found)] == ["m.f"]


def test_docstrings_are_found_in_syntax(tmp_path, monkeypatch):
    (tmp_path / "mod.py").write_text(
        "if True:\n"
        "    class A:\n"
        "        'a'\n"
        "        def f(self):\n            'f'\n"
        "        def _private(self): 'p'\n"
        "def outer():\n    'outer'\n    def inner(): 'inner'\n"
        "add_docstr(torch.x, 'x' + '{input} {{y}}'.format(**common))\n"
        "add_newdoc('numpy.core', 'nd', ('T', 'transposed'))\n"
        "_add_docstr(_C.z, 'z')\n"
        "add_docstr(torch.unknown, text)\n"
        "other('a', 'b')\n"
    )
    (tmp_path / "broken.py").write_text("def")
    names = [(name, tmp_path / f"{name}.py") for name in ("mod", "broken")]
    monkeypatch.setattr(docstrings, "source_files", lambda: iter(names))
    assert [tuple(found) for found in docstrings.docstrings()] == [
        ("mod", "mod.A", "a"),
        ("mod", "mod.A.f", "f"),
        ("mod", "mod.outer", "outer"),
        ("mod", "torch.x", "x {y}"),
        ("mod", "numpy.core.nd.T", "transposed"),
        ("mod", "mod._C.z", "z"),
        ("mod", "torch.unknown", ""),
    ]


def test_modules_with_side_effects_are_left_out():
    parts = {part for module, _ in docstrings.source_files() for part in module.split(".")}
    assert not parts & {
        "this",
        "antigravity",
        "idlelib",
        "test",
        "turtledemo",
        "lib2to3",
        "tkinter",
    }
