"""Evaluation on a retrieval test set, against an independent loop over the same texts."""

import json
import logging
import math
import random
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from embedtune.errors import InputError
from embedtune.evaluate import (
    METRICS,
    Result,
    evaluate_models,
    format_table,
    read_beir,
    write_results,
)

VERBS = ["sees", "hears", "eats", "finds", "likes"]
WORDS = ["red", "green", "blue", "cat", "dog", "bird", "a", "the", "and", "big", "old", *VERBS]
PROMPTS = {"query": "the big ", "document": "a red old "}
WIDTHS = [32, 16, 8]


def save_model(folder, width, prompts):
    (folder / "bert").mkdir(parents=True)
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast.from_pretrained(str(folder)).save_pretrained(folder / "bert")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        initializer_range=0.5,  # the default would embed all texts nearly alike
    )
    BertModel(config).save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(width, pooling_mode="mean")]
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    model.save_pretrained(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("wide"), 32, PROMPTS)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("narrow"), 16, {})


def write_beir(folder, corpus=None, queries=None, qrels=None):
    """Write a test set of random words; any file may be given as its text instead."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=6)) for _ in range(150)]
    documents = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    documents[3]["title"] = "big dog"
    asked = [{"_id": f"q{i}", "text": texts[i][: 12 + i]} for i in range(12)]
    judged = [(f"q{i}", f"d{i + 50 * j}") for i in range(10) for j in range(i % 3 + 1)]
    rows = "".join(f"{query}\t{document}\t1\n" for query, document in judged)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    defaults = {
        "corpus.jsonl": (corpus, "".join(json.dumps(row) + "\n" for row in documents)),
        "queries.jsonl": (queries, "".join(json.dumps(row) + "\n" for row in asked)),
        "qrels/test.tsv": (qrels, "query-id\tcorpus-id\tscore\n" + rows),
    }
    for name, (given, default) in defaults.items():
        (folder / name).write_text(default if given is None else given, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read_beir(write_beir(tmp_path_factory.mktemp("beir")))


# --- Reading --------------------------------------------------------------------------------------


def test_beir_folder_is_read(data):
    assert list(data.queries) == [f"q{i}" for i in range(10)]  # q10 and q11 are not judged
    assert len(data.corpus) == 150
    assert data.corpus["d3"].startswith("big dog ")
    assert data.corpus["d4"] == data.corpus["d4"].strip()
    assert [len(documents) for documents in data.relevant.values()] == [1, 2, 3] * 3 + [1]


def test_grades_headers_line_ends_and_splits(tmp_path):
    write_beir(tmp_path)
    rows = "q_id\td_id\trelevance\r\nq1\td1\t2\r\n\r\nq1\td2\t0\r\nq2\td3\t0\r\n"
    (tmp_path / "qrels" / "dev.tsv").write_text(rows, newline="")
    data = read_beir(tmp_path, "dev")
    assert data.relevant == {"q1": {"d1": 2}}
    assert list(data.queries) == ["q1"]
    (tmp_path / "qrels" / "bare.tsv").write_text("q1\td1\t1\n")
    assert read_beir(tmp_path, "bare").relevant == {"q1": {"d1": 1}}


HEADER = "query-id\tcorpus-id\tscore\n"
ROW = '{"_id": "d1", "text": "cat"}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus": ROW + "{"}, r"corpus\.jsonl:2: "),
        ({"corpus": ROW + "[1]"}, r"corpus\.jsonl:2: "),
        ({"corpus": ""}, r"corpus\.jsonl: .*empty"),
        ({"corpus": ROW + '{"text": "a"}'}, r"corpus\.jsonl:2: _id: .*string.*no such field"),
        ({"corpus": ROW + '{"_id": 7, "text": "a"}'}, r"corpus\.jsonl:2: _id: .*string.*found 7"),
        ({"corpus": '{"_id": "a", "text": null}'}, r"corpus\.jsonl:1: text: .*string.*found null"),
        ({"corpus": '{"_id": "a", "text": "b", "title": 3}'}, r":1: title: .*string.*found 3"),
        ({"corpus": ROW + ROW}, r"corpus\.jsonl:2: _id: .*once.*'d1' of line 1"),
        ({"queries": '{"_id": "q1"}'}, r"queries\.jsonl:1: text: .*no such field"),
        ({"qrels": HEADER + "q1\td1\t1\nq1\tno\t1"}, r"test\.tsv:3: .*corpus\.jsonl, found 'no'"),
        ({"qrels": HEADER + "no\td1\t1"}, r"test\.tsv:2: .*queries\.jsonl, found 'no'"),
        ({"qrels": HEADER + "q1 d1 1"}, r"test\.tsv:2: .*tabs, found 1 column"),
        ({"qrels": "q1\t0\td1\t1"}, r"test\.tsv:1: .*tabs, found 4 column"),
        ({"qrels": HEADER + "q1\td1\t0.5"}, r"test\.tsv:2: .*whole score, found '0\.5'"),
        ({"qrels": HEADER}, r"test\.tsv: expected relevant documents .* found none"),
        ({"qrels": ""}, r"test\.tsv: expected relevant documents .* found none"),
        ({"qrels": HEADER + "q1\td1\t0"}, r"test\.tsv: expected relevant documents .* found none"),
    ],
)
def test_bad_input_is_named(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        read_beir(write_beir(tmp_path, **files))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_beir(tmp_path) / name).unlink()
    with pytest.raises(InputError, match=f"{name}: expected a file of a BEIR test set"):
        read_beir(tmp_path)


def test_qrels_that_are_not_text(tmp_path):
    (write_beir(tmp_path) / "qrels" / "test.tsv").write_bytes(b"q1\td1\xff\t1\n")
    with pytest.raises(InputError, match=r"test\.tsv: expected UTF-8"):
        read_beir(tmp_path)


# --- Measuring ------------------------------------------------------------------------------------


def loop_metrics(path, data, width):
    """Rank every document for every query in plain Python."""
    model = SentenceTransformer(path, device="cpu")

    def embed(role, texts):
        rows = model.encode([PROMPTS[role] + text for text in texts.values()], prompt="")
        return dict(zip(texts, rows[:, :width].astype(np.float64), strict=True))

    documents, queries = embed("document", data.corpus), embed("query", data.queries)
    sums = dict.fromkeys(METRICS, 0.0)
    for name, relevant in data.relevant.items():
        query = queries[name]
        score = {
            key: query @ value / np.linalg.norm(query) / np.linalg.norm(value)
            for key, value in documents.items()
        }
        ranking = sorted(documents, key=lambda key: (-score[key], key))
        gains = [1 / math.log2(i + 2) for i, key in enumerate(ranking[:10]) if key in relevant]
        sums["ndcg@10"] += sum(gains) / sum(1 / math.log2(i + 2) for i in range(len(relevant)))
        first = min(ranking.index(key) for key in relevant)
        sums["mrr@10"] += 1 / (first + 1) if first < 10 else 0
        sums["recall@100"] += sum(key in relevant for key in ranking[:100]) / len(relevant)
    return {metric: value / len(data.relevant) for metric, value in sums.items()}


def test_metrics_equal_a_loop_over_all_documents(model, data):
    results = evaluate_models([model], data, WIDTHS)
    assert [(result.model, result.width) for result in results] == [(model, w) for w in WIDTHS]
    for result in results:
        assert result.metrics == pytest.approx(loop_metrics(model, data, result.width))
    assert len({result.metrics["ndcg@10"] for result in results}) == 3


def test_metrics_equal_encoding_again_at_every_width(model, data):
    for result in evaluate_models([model], data, WIDTHS):
        reference = InformationRetrievalEvaluator(
            queries=data.queries,
            corpus=data.corpus,
            relevant_docs={query: set(found) for query, found in data.relevant.items()},
            precision_recall_at_k=[100],
            truncate_dim=result.width,
            write_csv=False,
        )
        found = reference(SentenceTransformer(model, device="cpu"))
        assert result.metrics == pytest.approx({key: found[f"cosine_{key}"] for key in METRICS})


def test_texts_are_encoded_once_for_all_widths(model, data, monkeypatch):
    encoded = []
    for role in ("encode_query", "encode_document"):
        original = getattr(SentenceTransformer, role)

        def counted(self, texts, *args, original=original, **kwargs):
            encoded.append(len(texts))
            return original(self, texts, *args, **kwargs)

        monkeypatch.setattr(SentenceTransformer, role, counted)
    evaluate_models([model, model], data, WIDTHS)
    assert encoded == [10, 150]


def test_widths_default_to_the_model_and_larger_ones_are_left_out(model, narrow, data, caplog):
    own = evaluate_models([model, narrow], data)
    assert [(result.model, result.width) for result in own] == [(model, 32), (narrow, 16)]
    with caplog.at_level(logging.WARNING, "embedtune"):
        results = evaluate_models([model, narrow], data, [8, 32, 64, 8])
    assert [(r.model, r.width) for r in results] == [(model, 32), (model, 8), (narrow, 8)]
    assert [message.rpartition("/")[2] for message in caplog.messages] == [
        "model has width 32: left out at 64",
        "model has width 16: left out at 32, 64",
    ]


@pytest.mark.parametrize("dims", [[], [0, 8], [-1], [512]])
def test_impossible_widths(model, data, dims):
    with pytest.raises(InputError, match="dims: expected"):
        evaluate_models([model], data, dims)


def test_a_model_that_is_not_there(data, tmp_path):
    with pytest.raises(InputError, match="found no folder"):
        evaluate_models([str(tmp_path / "none")], data)


# --- Reporting ------------------------------------------------------------------------------------


def result(model, width, ndcg):
    return Result(model, width, {"ndcg@10": ndcg, "mrr@10": 0.5, "recall@100": 1.0})


RESULTS = [
    result("/runs/one/model", 384, 0.5731),
    result("/runs/one/model", 32, 0.31),
    result("/runs/two/model", 32, 1.0),
]


def test_table_has_a_row_a_model_and_a_column_a_width():
    assert format_table(RESULTS).splitlines() == [
        "nDCG@10      384      32",
        "one/model  .5731   .3100",
        "two/model      -  1.0000",
    ]


def test_models_are_named_by_what_tells_them_apart():
    names = ["/a/x/m/last", "/a/y/m/last", "org/name"]
    table = format_table([result(name, 8, 0.5) for name in names])
    assert [row.split()[0] for row in table.splitlines()[1:]] == [
        "x/m/last",
        "y/m/last",
        "org/name",
    ]


def test_results_are_written(tmp_path):
    write_results(RESULTS, tmp_path / "new" / "folder")
    rows = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    assert rows[0] == {
        "model": "/runs/one/model",
        "width": 384,
        "ndcg@10": 0.5731,
        "mrr@10": 0.5,
        "recall@100": 1.0,
    }
    assert len(rows) == 3
    assert (tmp_path / "new" / "folder" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"embedtune\[plots\]"):
        write_results(RESULTS, tmp_path)
    assert (tmp_path / "evaluation.json").is_file()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="expected a folder to write to, found a file"):
        write_results(RESULTS, tmp_path / "taken")
