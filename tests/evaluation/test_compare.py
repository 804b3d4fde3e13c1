"""Evaluation of models, against independent loops over the same texts and encoding anew."""

import json
import logging
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import quantize_embeddings
from testset_files import WORDS, write_graded_beir
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from embedtune.cli import main
from embedtune.data.beir import read_beir
from embedtune.data.scored_pairs import ScoredPairs
from embedtune.errors import InputError
from embedtune.evaluation.compare import Result, evaluate_models
from embedtune.evaluation.metrics import RETRIEVAL_METRICS
from embedtune.evaluation.quantise import as_stored
from embedtune.reports.model_chart import write_results
from embedtune.reports.model_table import format_table

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_graded_beir(tmp_path_factory.mktemp("beir"))


@pytest.fixture(scope="module")
def data(folder):
    return read_beir(folder)


@pytest.fixture(scope="module")
def pairs(data):
    scores = [i % 4 / 4 for i in range(60)]
    return ScoredPairs(data.corpus[:60], data.corpus[40:100], scores)


# --- Measuring ------------------------------------------------------------------------------------


def embed(path, role, texts, width):
    model = SentenceTransformer(path, device="cpu")
    rows = model.encode([PROMPTS[role] + text for text in texts], prompt="")
    rows = rows[:, :width].astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_codes(documents, precision):
    """Return what the codes of sentence-transformers say of documents of length 1."""
    if precision == "float32":
        return documents
    if precision == "binary":
        values = np.unpackbits(quantize_embeddings(documents, "ubinary"), axis=1) * 2.0 - 1
    else:
        low, high = documents.min(axis=0), documents.max(axis=0)
        codes = quantize_embeddings(documents.astype(np.float32), "int8")
        values = low + (codes + 128.5) * (high - low) / 255
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def loop_metrics(path, data, width, precision="float32"):
    """Rank every document for every query in plain Python."""
    documents = in_codes(embed(path, "document", data.corpus, width), precision)
    queries = embed(path, "query", data.queries, width)
    sums = dict.fromkeys(RETRIEVAL_METRICS, 0.0)
    discounts = [1 / math.log2(i + 2) for i in range(10)]
    for query, grades in zip(queries, data.relevant, strict=True):
        scores = (documents @ query).round(7)  # equal codes must tie
        places = range(len(documents))
        ranking = sorted(
            places, key=lambda row: (scores[row], data.document_ids[row]), reverse=True
        )
        best = sorted(grades.values(), reverse=True)
        gain = sum(grades.get(row, 0) * d for row, d in zip(ranking, discounts, strict=False))
        sums["ndcg@10"] += gain / sum(g * d for g, d in zip(best, discounts, strict=False))
        ranks = sorted(ranking.index(row) + 1 for row in grades)
        reached = [(i + 1) / rank for i, rank in enumerate(ranks) if rank <= 100]
        sums["mrr@10"] += 1 / ranks[0] if ranks[0] <= 10 else 0
        sums["map@100"] += sum(reached) / len(ranks)
        sums["recall@100"] += len(reached) / len(ranks)
    return {metric: value / len(data.relevant) for metric, value in sums.items()}


def test_metrics_equal_a_loop_over_all_documents(model, data):
    results = evaluate_models([model], {"words": data}, WIDTHS)
    assert [(r.model, r.data, r.width) for r in results] == [(model, "words", w) for w in WIDTHS]
    assert {result.own_width for result in results} == {32}
    for result in results:
        expected = loop_metrics(model, data, result.width)
        for precision in ("int8", "binary"):
            stored = loop_metrics(model, data, result.width, precision)
            expected[f"ndcg@10/{precision}"] = stored["ndcg@10"]
        assert result.metrics == pytest.approx(expected)
    assert len({result.metrics["ndcg@10"] for result in results}) == 3


def test_metrics_equal_encoding_again_at_every_width(model, data):
    binary = data._replace(relevant=[dict.fromkeys(grades, 1) for grades in data.relevant])
    ids = [f"{row:03}" for row in range(len(data.corpus))]
    for result in evaluate_models([model], {"words": binary}, WIDTHS):
        reference = InformationRetrievalEvaluator(
            queries=dict(zip(data.query_ids, data.queries, strict=True)),
            corpus=dict(zip(ids, data.corpus, strict=True)),
            relevant_docs={
                query: {ids[row] for row in grades}
                for query, grades in zip(data.query_ids, data.relevant, strict=True)
            },
            precision_recall_at_k=[100],
            truncate_dim=result.width,
            write_csv=False,
        )
        found = reference(SentenceTransformer(model, device="cpu"))
        for metric in RETRIEVAL_METRICS:
            assert result.metrics[metric] == pytest.approx(found[f"cosine_{metric}"], abs=1e-6)


def test_scored_pairs_are_compared_by_role_and_rank(model, pairs):
    for result in evaluate_models([model], {"sts": pairs}, WIDTHS):
        first = embed(model, "query", pairs.first, result.width)
        second = embed(model, "document", pairs.second, result.width)
        for precision in ("float32", "int8", "binary"):
            cosines = (first * in_codes(second, precision)).sum(axis=1)
            expected = spearmanr(cosines, pairs.scores).statistic
            assert result.quality(precision) == pytest.approx(expected, abs=1e-6)
        assert sorted(result.metrics) == ["spearman", "spearman/binary", "spearman/int8"]


def test_codes_are_those_of_sentence_transformers():
    documents = torch.randn(9000, 20) * torch.linspace(0.1, 3, 20)  # more than a block
    documents[:, 5] = 0
    unit = torch.nn.functional.normalize(documents, dim=-1).numpy()
    ranges = np.stack([unit.min(axis=0), unit.max(axis=0)])
    step = (ranges[1] - ranges[0]) / 255
    stored = as_stored(documents, "int8").numpy()
    inside = unit < ranges[1]  # the highest value has the code of a step of its own
    assert (np.abs(stored - unit) <= 0.501 * step + 1e-7)[inside].all()
    codes = quantize_embeddings(unit, "int8")
    np.testing.assert_allclose(stored, ranges[0] + (codes + 128.5) * step, atol=1e-6)
    signs = as_stored(documents, "binary").numpy()
    assert set(np.unique(signs)) == {-1, 1}
    packed = np.packbits(signs > 0, axis=1)
    np.testing.assert_array_equal(packed, quantize_embeddings(unit, "ubinary"))


def test_texts_are_encoded_once_for_all_widths(model, data, pairs, monkeypatch):
    encoded = []
    for role in ("encode_query", "encode_document"):
        original = getattr(SentenceTransformer, role)

        def counted(self, texts, *args, original=original, **kwargs):
            encoded.append(len(texts))
            return original(self, texts, *args, **kwargs)

        monkeypatch.setattr(SentenceTransformer, role, counted)
    doubled = pairs._replace(
        first=pairs.first * 2, second=pairs.second * 2, scores=pairs.scores * 2
    )
    sets = {"words": data, "sts": pairs, "doubled": doubled}
    results = evaluate_models([model, model], sets, WIDTHS)
    assert encoded == [10, 150, 60, 60, 60, 60]
    for once, twice in zip(results[3:6], results[6:], strict=True):
        assert once.metrics == pytest.approx(twice.metrics)


def test_widths_default_to_the_model_and_larger_ones_are_left_out(model, narrow, data, caplog):
    sets = {"words": data}
    own = evaluate_models([model, narrow], sets)
    assert [(result.model, result.width) for result in own] == [(model, 32), (narrow, 16)]
    with caplog.at_level(logging.WARNING, "embedtune"):
        results = evaluate_models([model, narrow], sets, [8, 32, 64, 8])
    assert [(r.model, r.width) for r in results] == [(model, 32), (model, 8), (narrow, 8)]
    assert [message.rpartition("/")[2] for message in caplog.messages] == [
        "model has width 32: left out at 64",
        "model has width 16: left out at 32, 64",
    ]


def test_others_are_compared_with_the_first_model_where_it_has_the_width(
    model, narrow, data, pairs, tmp_path
):
    twin = str(shutil.copytree(model, tmp_path / "twin"))
    results = evaluate_models([model, twin, narrow], {"words": data, "sts": pairs}, [32, 8])
    by_place = {(r.model, r.data, r.width): r for r in results}
    for result in results[:4]:
        assert result.intervals is None
    for place in (("words", 32), ("words", 8), ("sts", 32), ("sts", 8)):
        same = by_place[twin, *place]
        assert same.intervals == dict.fromkeys(same.metrics, (0.0, 0.0))
    for name in ("words", "sts"):
        first, other = by_place[model, name, 8], by_place[narrow, name, 8]
        assert other.intervals.keys() == other.metrics.keys()
        for metric, (low, high) in other.intervals.items():
            assert low <= other.metrics[metric] - first.metrics[metric] <= high
            assert low < high or first.metrics[metric] == other.metrics[metric]
    reverse = evaluate_models([narrow, model], {"words": data}, [32, 8])
    assert [r.intervals for r in reverse[:2]] == [None, {}]  # the first one has no width 32
    assert reverse[2].intervals.keys() == reverse[2].metrics.keys()


def test_one_query_or_pair_is_compared_without_a_verdict(model, narrow, data, pairs):
    one = data._replace(
        queries=data.queries[:1], relevant=data.relevant[:1], query_ids=data.query_ids[:1]
    )
    pair = ScoredPairs(pairs.first[:1], pairs.second[:1], pairs.scores[:1])
    results = evaluate_models([model, narrow], {"one": one, "pair": pair}, [8])
    table = format_table(results)
    assert "nan" not in table
    assert "better" not in table.partition("Changes are from")[0]
    assert "worse" not in table.partition("Changes are from")[0]


@pytest.mark.parametrize("dims", [[], [0, 8], [-1], [512]])
def test_impossible_widths(model, data, dims):
    with pytest.raises(InputError, match="dims: expected"):
        evaluate_models([model], {"words": data}, dims)


def test_a_model_that_is_not_there(data, tmp_path):
    with pytest.raises(InputError, match="found no folder"):
        evaluate_models([str(tmp_path / "none")], {"words": data})


def test_a_model_that_would_fail_on_a_text_is_refused(model, data, tmp_path):
    """Its tokenizer knows more tokens than the embedding table has rows."""
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["embedding"])
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="expected a tokenizer of at most"):
        evaluate_models([str(other)], {"words": data})


# --- Reporting ------------------------------------------------------------------------------------


def result(model, width, quality, data="sets/words", main="ndcg@10"):
    others = {"mrr@10": 0.5} if main == "ndcg@10" else {}
    quantised = {f"{main}/int8": quality - 0.01, f"{main}/binary": quality / 2}
    return Result(model, data, width, {main: quality} | others | quantised)


RESULTS = [
    result("/runs/one/model", 384, 0.5731),
    result("/runs/one/model", 32, 0.31),
    result("/runs/two/model", 32, 1.0),
]
PAIRS = [
    result("/runs/one/model", 32, 0.8, "sts/test.jsonl", "spearman"),
    result("/runs/two/model", 32, -0.05, "sts/test.jsonl", "spearman"),
]


def test_table_has_a_row_a_model_and_a_column_a_width():
    assert format_table(RESULTS).splitlines() == [
        "words, nDCG@10     384      32",
        "one/model        .5731   .3100",
        "two/model            -  1.0000",
    ]


def test_table_has_a_part_for_each_test_set():
    assert format_table(RESULTS[:1] + PAIRS).splitlines() == [
        "words, nDCG@10     384      32",
        "one/model        .5731       -",
        "two/model            -       -",
        "",
        "test, Spearman     384      32",
        "one/model            -   .8000",
        "two/model            -  -.0500",
    ]


def test_changes_stand_below_a_model_that_was_compared():
    first, second, other = RESULTS
    second = second._replace(metrics={"ndcg@10": math.nan})
    third = result("/runs/two/model", 384, 0.5)._replace(intervals={"ndcg@10": (-0.2, 0.0537)})
    results = [first, second, third, other._replace(intervals={})]
    table = format_table([*results, result("/runs/two/model", 8, 0.5)]).splitlines()
    assert [re.split("  +", row.strip()) for row in table[:5]] == [
        ["words, nDCG@10", "384", "32", "8"],
        ["one/model", ".5731", "nan", "-"],
        ["two/model", ".5000", "1.0000", ".5000"],
        ["change", "-.0731 unclear", "not compared", "-"],
        ["95% interval", "-.2000 to +.0537", "-", "-"],
    ]
    assert len({len(row) for row in table[:4]}) == 1  # columns are aligned
    assert table[6].startswith("Changes are from one/model. Intervals: paired bootstrap, 2,000")


def test_an_interval_that_leaves_out_0_does_not_look_as_if_it_ended_there():
    other = result("/runs/two/model", 384, 0.57314)._replace(intervals={"ndcg@10": (2e-5, 6e-5)})
    rows = format_table([RESULTS[0], other]).splitlines()
    assert rows[3].split() == ["change", "+.00004", "better"]
    assert rows[4].split()[2:] == ["+.00002", "to", "+.00006"]


def test_models_and_sets_are_named_by_what_tells_them_apart():
    names = ["/a/x/m/last", "/a/y/m/last", "org/name"]
    table = format_table([result(name, 8, 0.5) for name in names])
    assert [row.split()[0] for row in table.splitlines()[1:]] == [
        "x/m/last",
        "y/m/last",
        "org/name",
    ]
    splits = ["sets/words", "sets/words/qrels/dev.tsv"]
    table = format_table([result("m", 8, 0.5, data) for data in splits])
    assert [row.partition(",")[0] for row in table.splitlines()[::3]] == splits


def test_a_set_of_a_name_of_its_own_keeps_it():
    results = [result("m", 8, 0.5, name) for name in ("faq.tsv", "dev.jsonl", "a")]
    titles = [row.partition(",")[0] for row in format_table(results, False).splitlines()[::3]]
    assert titles == ["faq.tsv", "dev.jsonl", "a"]


def test_nothing_but_zeros_has_no_sign():
    assert format_table([result("m", 8, -1e-9)]).split()[-1] == ".0000"


def test_a_long_name_takes_lines_of_its_own():
    long = "sentence-transformers/paraphrase-multilingual-mpnet-base-v2"
    assert format_table([result(long, 8, 0.5), result("b", 8, 0.25)]).splitlines() == [
        "words, nDCG@10                         8",
        "sentence-transformers/paraphrase-",
        "multilingual-mpnet-base-v2         .5000",
        "b                                  .2500",
    ]


def test_results_are_written(tmp_path):
    compared = PAIRS[1]._replace(intervals={"spearman": (-0.9, -0.8)})
    write_results([*RESULTS, PAIRS[0], compared], tmp_path / "new" / "folder")
    rows = json.loads((tmp_path / "new" / "folder" / "evaluation.json").read_text())
    assert rows[0] == {
        "model": "/runs/one/model",
        "data": "sets/words",
        "width": 384,
        "ndcg@10": 0.5731,
        "mrr@10": 0.5,
        "ndcg@10/int8": pytest.approx(0.5631),
        "ndcg@10/binary": 0.5731 / 2,
        "mb_per_million": {"float32": 1536, "int8": 384, "binary": 48},
    }
    assert len(rows) == 5
    assert {key: rows[4][key] for key in ("against", "intervals", "outcomes")} == {
        "against": "/runs/one/model",
        "intervals": {"spearman": [-0.9, -0.8]},
        "outcomes": {"spearman": "worse"},
    }
    assert (tmp_path / "new" / "folder" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_that_cannot_be_drawn_leaves_the_former(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    write_results(RESULTS, tmp_path)
    before = (tmp_path / "quality.png").read_bytes()

    def fill_the_disk(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        write_results(RESULTS, tmp_path)
    assert (tmp_path / "quality.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "quality.png"]


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"embedtune\[plots\]"):
        write_results(RESULTS, tmp_path)
    assert (tmp_path / "evaluation.json").is_file()


def test_it_does_so_before_anything_is_measured(model, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        main(["evaluate", model, "--data", str(folder), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "quality.png needs pip install 'embedtune[plots]'" in said.err
    assert said.out == ""


def test_what_is_no_number_is_null(tmp_path):
    nowhere = dict.fromkeys(PAIRS[0].metrics, math.nan)
    write_results([RESULTS[0], PAIRS[0]._replace(metrics=nowhere)], tmp_path)
    rows = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert {name: rows[1][name] for name in nowhere} == dict.fromkeys(nowhere)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="expected a folder to write to, found the file"):
        write_results(RESULTS, tmp_path / "taken")


def test_the_command_compares_several_models_and_sets(model, narrow, folder, tmp_path, capsys):
    rows = [{"query": f"cat {word}", "pos": [word], "scores": [len(word)]} for word in WORDS]
    pairs = tmp_path / "sts.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [str(folder), str(folder / "qrels" / "test.tsv"), str(pairs)]
    out = tmp_path / "out"
    main(["evaluate", model, narrow, "--data", *sets, "--dims", "16,8", "--out", str(out)])
    table = capsys.readouterr().out
    assert table.count(", nDCG@10") == 2
    assert table.count(f"{pairs}, Spearman") == 1
    found = json.loads((out / "evaluation.json").read_text())
    keys = [(row["model"], row["data"], row["width"]) for row in found]
    assert keys == [(m, d, w) for m in (model, narrow) for d in sets for w in (16, 8)]
    assert found[0]["ndcg@10"] == found[2]["ndcg@10"]  # the same test set, named in two ways
    assert [row.get("against") for row in found] == [None] * 6 + [model] * 6


def test_what_was_measured_before_a_model_that_fails_is_kept(model, folder, tmp_path, capsys):
    missing, out = str(tmp_path / "missing"), tmp_path / "out"
    given = ("--data", str(folder), "--dims", "16", "--out", str(out))
    with pytest.raises(SystemExit):
        main(["evaluate", model, missing, *given])
    assert [row["model"] for row in json.loads((out / "evaluation.json").read_text())] == [model]
    said = capsys.readouterr()
    assert re.search(r"nDCG@10 +16\n\S+ +\.\d{4}\n$", said.out)
    assert f"found no folder {missing}" in said.err


def test_a_model_that_brings_code_along_is_evaluated_where_that_is_trusted(
    model, folder, tmp_path, capsys
):
    own = Path(shutil.copytree(model, tmp_path / "own"))
    (own / "own_pooling.py").write_text(
        "from sentence_transformers.sentence_transformer.modules import Pooling\n"
        "class OwnPooling(Pooling):\n    pass\n"
    )
    modules = json.loads((own / "modules.json").read_text())
    modules[1]["type"] = "own_pooling.OwnPooling"
    (own / "modules.json").write_text(json.dumps(modules))
    asked = ["evaluate", model, str(own), "--data", str(folder)]
    with pytest.raises(SystemExit):
        main(asked)
    assert "cannot load" in capsys.readouterr().err
    main([*asked, "--trust_remote_code", "true"])
    assert "+.0000 equal" in capsys.readouterr().out


def changes(model: str, told: dict[int, tuple[float, str]], data: str = "docs") -> list[Result]:
    """Return results of a model of width 64: by width its quality, and what follows from it."""
    ends = {"better": (0.1, 0.2), "worse": (-0.2, -0.1), "unclear": (-0.1, 0.1)}
    return [
        Result(
            *(model, data, width, {"ndcg@10": quality}),
            intervals={"ndcg@10": ends[said]} if said else None,
            own_width=64,
        )
        for width, (quality, said) in told.items()
    ]


def told_of_widths(*results: list[Result]) -> str:
    table = format_table([result for several in results for result in several])
    return " ".join(table.split()).partition("There is none of fewer than 6.")[2].strip()


def test_widths_that_fell_alone_are_told():
    base = changes("base", dict.fromkeys((64, 16, 8), (0.5, "")))
    whole = changes("whole", {64: (0.4, "worse"), 16: (0.3, "worse"), 8: (0.3, "worse")})
    fallen = changes("fallen", {64: (0.51, "unclear"), 16: (0.4, "worse"), 8: (0.3, "worse")})
    good = changes("good", {64: (0.6, "better"), 8: (0.6, "better")})
    assert told_of_widths(base, whole, good) == ""
    assert told_of_widths(base, whole, fallen) == (
        "fallen is worse on docs at 16, 8 alone: widths that a fit does not train may fall as the "
        "full one rises; model.use_mrl trains those of model.mrl_dims."
    )


def test_a_width_that_fell_is_told_of_the_set_where_the_full_one_rose():
    base = [
        result
        for data in ("a", "b")
        for result in changes("base", {64: (0.5, ""), 16: (0.5, "")}, data)
    ]
    worse = changes("tuned", {64: (0.4, "worse"), 16: (0.3, "worse")}, "a")
    better = changes("tuned", {64: (0.6, "better"), 16: (0.5, "unclear")}, "b")
    assert told_of_widths(base, worse, better) == ""
    fell = changes("tuned", {64: (0.6, "better"), 16: (0.4, "worse")}, "b")
    assert told_of_widths(base, worse, fell).startswith("tuned is worse on b at 16 alone: widths")
    both = changes("tuned", {64: (0.6, "better"), 16: (0.4, "worse")}, "a")
    assert "worse on a at 16, on b at 16 alone" in told_of_widths(base, both, fell)


def test_nothing_is_told_of_widths_where_the_full_one_fell_or_was_not_measured():
    base = changes("base", {64: (0.5, ""), 32: (0.5, ""), 16: (0.5, "")})
    cut = changes("tuned", {32: (0.6, "better"), 16: (0.4, "worse")})
    assert told_of_widths(base, cut) == ""
    fell = changes("tuned", {64: (0.49, "unclear"), 16: (0.4, "worse")})
    assert told_of_widths(base, fell) == ""
