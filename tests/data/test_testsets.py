"""Test sets: what is read, and what is said of those that cannot be."""

import json
import logging
import re

import pytest
from testset_files import HEADER, write_graded_beir, write_plain_beir

from embedtune.data.beir import is_beir, read_beir
from embedtune.data.scored_pairs import read_scored
from embedtune.data.testsets import name_sets, open_testset, set_name
from embedtune.errors import InputError

ROW = '{"_id": "d1", "text": "cat"}\n'


# --- BEIR -----------------------------------------------------------------------------------------


def test_beir_folder_is_read(tmp_path):
    data = read_beir(write_graded_beir(tmp_path))
    assert data.query_ids == [f"q{i}" for i in range(10)]  # q10 and q11 are not judged
    assert data.document_ids == [f"d{i}" for i in range(150)]
    assert len(data.queries) == len(data.relevant) == 10
    assert data.corpus[3].startswith("big dog ")
    assert data.corpus[4] == data.corpus[4].strip()
    assert data.relevant[:3] == [{0: 1}, {1: 1, 51: 2}, {2: 1, 52: 2, 102: 3}]
    assert data.split == "test"


def test_grades_headers_and_line_ends(tmp_path):
    write_graded_beir(tmp_path)
    dev, bare = tmp_path / "qrels" / "dev.tsv", tmp_path / "qrels" / "bare.tsv"
    rows = "q_id\td_id\trelevance\r\nq1\td1\t2\r\n\r\nq1\td2\t0\r\nq2\td3\t-1\r\nq1\td1\t2\r\n"
    dev.write_text(rows, newline="")
    data = read_beir(dev)
    assert (data.query_ids, data.relevant, data.split) == (["q1", "q2"], [{1: 2}, {}], "dev")
    bare.write_text("q1\td1\t1\n")
    assert read_beir(bare).relevant == [{1: 1}]


def test_only_what_judges_nothing_known_is_a_header(tmp_path):
    for score in ("yes", "", "N/A"):
        write_graded_beir(tmp_path, qrels=f"q1\td1\t{score}\nq2\td1\t1\n")
        with pytest.raises(InputError, match=r"test\.tsv:1: expected a whole score, found"):
            read_beir(tmp_path)


def test_a_query_is_its_text_alone(tmp_path):
    write_graded_beir(tmp_path)
    queries = [json.loads(line) for line in (tmp_path / "queries.jsonl").open()]
    plain = read_beir(tmp_path).queries
    lines = (json.dumps(query | {"title": "other words"}) + "\n" for query in queries)
    (tmp_path / "queries.jsonl").write_text("".join(lines))
    assert read_beir(tmp_path).queries == plain


def test_scores_may_be_written_as_decimals(tmp_path):
    rows = "q1\td1\t1.0\nq1\td2\t2.\nq2\td1\t-1.00\nq2\td3\t+3.000\n"
    assert read_beir(write_graded_beir(tmp_path, qrels=rows)).relevant == [{1: 1, 2: 2}, {3: 3}]


def test_what_is_judged_and_missing_is_counted_in_one_line(tmp_path, caplog):
    judged = "q1\td1\t1\nq1\tlost\t2\nq2\tlost\t1\nq2\tgone\t0\nno\td1\t1\nq3\td1\t0\nq4\tx\t3\n"
    with caplog.at_level(logging.INFO, "embedtune"):
        data = read_beir(write_graded_beir(tmp_path, qrels=judged))
    assert data.query_ids == ["q1", "q2", "q3", "q4"]
    assert data.relevant == [{1: 1, 150: 2}, {150: 1}, {}, {151: 3}]
    assert data.document_ids[149:] == ["d149", "lost", "x"]
    assert len(data.corpus) == 150
    (line,) = caplog.messages
    assert "4 of 7 judgements are of documents that corpus.jsonl lacks (such as 'lost')" in line
    assert "3 of them relevant" in line
    assert "1 of 5 judged queries are not in queries.jsonl (such as 'no')" in line


def test_queries_that_are_documents_are_counted(tmp_path, caplog):
    texts = [{"_id": f"d{i}", "text": "cat"} for i in (3, 200, 5)]
    queries = "".join(json.dumps(row) + "\n" for row in texts)
    judged = "d3\td3\t1\nd3\td4\t1\nd200\td1\t1\nd5\td1\t1\nd5\td200\t1\n"
    with caplog.at_level(logging.INFO, "embedtune"):
        data = read_beir(write_graded_beir(tmp_path, queries=queries, qrels=judged))
    assert data.own_documents == [3, -1, 5]  # d200 is judged, but no document
    assert "2 of 3 queries have the _id of a document" in caplog.messages[-1]
    assert "1 of these documents" in caplog.messages[-1]


def test_documents_with_equal_scores_come_in_the_order_of_trec_eval(tmp_path):
    names = ["d1", "d10", "é", "D2", "\U0001f600", "d1a", "\uff5e"]
    corpus = "".join(json.dumps({"_id": name, "text": "cat"}) + "\n" for name in names)
    data = read_beir(write_graded_beir(tmp_path, corpus=corpus, qrels="q1\td1\t1\nq1\tz\t1\n"))
    by_bytes = sorted(names, key=str.encode, reverse=True)  # strcmp, the highest first
    assert [names[row] for row in data.tie_order] == by_bytes


def test_the_split_is_the_first_that_is_there_or_the_only_one(tmp_path):
    qrels = write_graded_beir(tmp_path) / "qrels"
    assert read_beir(tmp_path, ("dev", "test")).split == "test"
    assert read_beir(tmp_path, ("dev",)).split == "test"
    (qrels / "dev.tsv").write_text("q1\td1\t1\n")
    assert read_beir(tmp_path, ("dev", "test")).split == "dev"
    assert read_beir(tmp_path).split == "test"
    with pytest.raises(InputError, match=r"qrels: expected a\.tsv or b\.tsv.* dev\.tsv, test\.tsv"):
        read_beir(tmp_path, ("a", "b"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus": ROW + "{"}, r"corpus\.jsonl:2: "),
        ({"corpus": ROW + "[1]"}, r"corpus\.jsonl:2: "),
        ({"corpus": ""}, r"corpus\.jsonl: .*empty"),
        ({"corpus": ROW + '{"text": "a"}'}, r"corpus\.jsonl:2: _id: .*string.*no such field"),
        ({"corpus": ROW + '{"_id": 7, "text": "a"}'}, r"corpus\.jsonl:2: _id: .*string.*number 7"),
        ({"corpus": '{"_id": "a", "text": null}'}, r"corpus\.jsonl:1: text: .*string.*found null"),
        ({"corpus": '{"_id": "a", "text": "b", "title": 3}'}, r":1: title: .*string.*number 3"),
        ({"corpus": ROW + ROW}, r"corpus\.jsonl:2: _id: .*once.*'d1' of line 1"),
        ({"queries": '{"_id": "q1"}'}, r"queries\.jsonl:1: text: .*no such field"),
        ({"queries": ""}, r"queries\.jsonl: .*empty"),
        (
            {"qrels": HEADER + "q1\tno\t1\nq2\td1\t0"},
            r"test\.tsv:2: .*corpus\.jsonl.*'q1' and 'no'",
        ),
        ({"qrels": HEADER + "no\td1\t1"}, r"test\.tsv:2: .*queries\.jsonl.*'no' and 'd1'"),
        ({"qrels": HEADER + "q1 d1 1"}, r"test\.tsv:2: .*tabs, found 1 column"),
        ({"qrels": "q1\t0\td1\t1"}, r"test\.tsv:1: .*query-id, .*tabs, found 4 columns.*TREC"),
        ({"qrels": HEADER + "q1 0 d1 1"}, r"test\.tsv:2: .*tabs, found 4 columns.*TREC"),
        ({"qrels": HEADER + "q1\td1\t0.5"}, r"test\.tsv:2: .*whole score, found '0\.5'"),
        ({"qrels": "q1\td1\t" + "9" * 5000}, r"test\.tsv:1: .*whole score, found '9{60}'$"),
        ({"qrels": HEADER + "q1\td1\t1" + "0" * 30}, r"test\.tsv:2: .*whole score"),
        ({"qrels": "q1\td1\t0.5\n"}, r"test\.tsv:1: .*whole score, found '0\.5'"),
        ({"qrels": HEADER + "q1\td1\t1.5"}, r"test\.tsv:2: .*whole score, found '1\.5'"),
        ({"qrels": HEADER + "q1\td1\tnan"}, r"test\.tsv:2: .*whole score, found 'nan'"),
        ({"qrels": HEADER + "q1\td1\t1_0"}, r"test\.tsv:2: .*whole score, found '1_0'"),
        ({"qrels": HEADER + "q1\td1\thigh"}, r"test\.tsv:2: .*whole score, found 'high'"),
        (
            {"qrels": HEADER + "q1\td1\t1\nq1\td1\t0"},
            r"test\.tsv:3: expected one score of 'q1' and 'd1', found 0 after 1 in line 2",
        ),
        ({"qrels": HEADER}, r"test\.tsv: expected relevant documents .* found none"),
        ({"qrels": ""}, r"test\.tsv: expected relevant documents .* found none"),
        ({"qrels": HEADER + "q1\td1\t0"}, r"test\.tsv: expected relevant documents .* found none"),
    ],
)
def test_bad_input_is_named(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        read_beir(write_graded_beir(tmp_path, **files))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_graded_beir(tmp_path) / name).unlink()
    for path in (tmp_path, tmp_path / "qrels" / "test.tsv"):
        with pytest.raises(InputError, match=f"{name}: expected a file of a BEIR test set"):
            open_testset(path)


def test_qrels_that_are_not_text(tmp_path):
    (write_graded_beir(tmp_path) / "qrels" / "test.tsv").write_bytes(b"q1\td1\xff\t1\n")
    with pytest.raises(InputError, match=r"test\.tsv: expected UTF-8"):
        read_beir(tmp_path)


# --- Scored pairs ---------------------------------------------------------------------------------


def test_each_positive_of_a_scored_row_is_a_pair(tmp_path, caplog):
    path = tmp_path / "sts.jsonl"
    rows = [
        {"query": "a", "pos": ["b", "c"], "scores": [1, 0.5], "neg": ["ignored"]},
        {"query": "d", "pos": ["e"], "scores": [-2]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO, "embedtune"):
        assert open_testset(path) == (["a", "a", "d"], ["b", "c", "e"], [1.0, 0.5, -2.0])
    assert caplog.messages == []
    path.write_text(json.dumps(rows[1] | {"prompt_for_query": "query: "}))
    with caplog.at_level(logging.INFO, "embedtune"):
        assert read_scored(path).first == ["d"]
    assert "prompt_for_query is ignored" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query": "a", "pos": ["b"]}', r"sts\.jsonl:1: field 'scores' is missing"),
        ('{"query": "a", "pos": ["b"], "scores": [1, 2]}', r":1: field 'scores': .*found 2"),
        ('{"query": "a", "pos": ["b"], "scores": ["x"]}', r":1: field 'scores': .*numbers"),
        ("", r"sts\.jsonl: .*empty"),
    ],
)
def test_bad_pairs_are_named(tmp_path, text, message):
    (tmp_path / "sts.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        open_testset(tmp_path / "sts.jsonl")


# --- Either ---------------------------------------------------------------------------------------


def test_which_paths_are_beir(tmp_path):
    folder = write_graded_beir(tmp_path / "set")
    assert is_beir(folder)
    assert is_beir(folder / "qrels" / "test.tsv")
    for path in (folder / "qrels" / "none.tsv", folder / "corpus.jsonl", tmp_path):
        assert not is_beir(path)
    stray = tmp_path / "qrels" / "stray.tsv"
    stray.parent.mkdir()
    stray.write_text("")
    assert is_beir(stray)  # and what it lacks is named
    with pytest.raises(InputError, match=r"corpus\.jsonl: expected a file of a BEIR test set"):
        read_beir(stray)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"none: expected a BEIR folder, .* found nothing"):
        open_testset(tmp_path / "none")


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(write_graded_beir(tmp_path / "set.v2"))
    paths = [tmp_path / "set.v2", tmp_path / "set.v2" / "qrels" / "dev.tsv"]
    relative = [path.relative_to(tmp_path / "set.v2") for path in paths]
    assert {set_name(path) for path in paths + relative} == {"set.v2"}
    assert set_name(tmp_path / "sts" / "dev.jsonl.zst") == "dev"


def test_sets_are_named_after_folders_and_files(tmp_path):
    beir = write_plain_beir(tmp_path / "beir")
    files = [str(tmp_path / name) for name in ("dev.jsonl.gz", "more.jsonl")]
    assert name_sets([beir, *files], "k") == {"beir": [beir], "dev": files}
    assert name_sets(f"{beir}/qrels/dev.tsv", "k") == {"beir": [f"{beir}/qrels/dev.tsv"]}
    assert name_sets({"a": beir, "b": files}, "k") == {"a": [beir], "b": files}
    assert name_sets(None, "k") == {}
    assert name_sets(str(tmp_path / "b*r"), "k") == {"beir": [beir]}
    assert name_sets({"a": str(tmp_path / "b*r")}, "k") == {"a": [beir]}
    assert name_sets({2026: beir}, "k") == {"2026": [beir]}
    with pytest.raises(InputError, match="k: dev: expected a path, found an empty list"):
        name_sets({"dev": []}, "k")
    with pytest.raises(InputError, match="found 'beir' twice"):
        name_sets([beir, f"{beir}/qrels/dev.tsv"], "k")


@pytest.mark.parametrize("paths", [{"b": "beir"}, [["beir"]], 3, None, [3]])
def test_what_is_no_path_is_named(paths):
    expected = "expected a path or a list of paths, found"
    with pytest.raises(InputError, match=f"k: a: {expected} {re.escape(str(paths))}$"):
        name_sets({"a": paths}, "k")
    with pytest.raises(InputError, match=f"k: {expected}"):
        name_sets([paths], "k")
