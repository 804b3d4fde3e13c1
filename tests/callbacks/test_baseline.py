"""A fit is measured on test sets: the base model first, then the trained one, at every width."""

import csv
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from testset_files import DOCUMENTS, lines, write_plain_beir

from embedtune.checkpoints import last_checkpoint, read_facts
from embedtune.cli import main
from embedtune.data.beir import read_beir
from embedtune.data.scored_pairs import read_scored
from embedtune.evaluation.compare import evaluate_models
from embedtune.evaluation.metrics import retrieval_metrics
from embedtune.reports.report import write_report

WIDTHS = (32, 16, 8)


@pytest.fixture
def data(tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path)


def write_data(folder: Path) -> dict[str, str]:
    """Write a retrieval set, scored pairs and training rows; return their paths."""
    pairs = [{"query": f"{d.split()[1]} {d.split()[0]}", "pos": [d]} for d in DOCUMENTS[1::4]]
    scored = [
        {"query": DOCUMENTS[i], "pos": [DOCUMENTS[3 * i]], "scores": [(i * 7 % 11) / 11]}
        for i in range(30)
    ]
    return {
        "docs": write_plain_beir(folder / "docs"),
        "sts": lines(folder / "sts.jsonl", scored),
        "train": lines(folder / "train.jsonl", pairs),
    }


def fit(model, data: dict[str, str], *flags: str) -> list[dict[str, str]]:
    """Run a fit of two epochs at three widths; return the rows of metrics.csv."""
    sets = {"docs": data["docs"], "sts": data["sts"], "pairs": data["train"]}
    main(
        [
            *("fit", "--model.model_name_or_path", str(model), "--trainer.accelerator", "cpu"),
            *("--data.train_path", data["train"], "--data.batch_size", "8", "--model.lr", "1e-3"),
            *("--model.use_mrl", "true", "--model.mrl_dims", ",".join(map(str, WIDTHS))),
            *("--data.val_path", json.dumps(sets), "--trainer.precision", "32-true", *flags),
        ]
    )
    return list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))


def curve(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def reference(model: str, data: dict[str, str], width: int | None) -> dict[str, float]:
    """Measure a model with sentence-transformers' own evaluators."""
    loaded = SentenceTransformer(str(model), device="cpu", truncate_dim=width)
    beir = read_beir(Path(data["docs"]), ("dev",))
    queries = dict(zip(beir.query_ids, beir.queries, strict=True))
    # It orders equal scores by the names of documents, the lowest first; trec_eval the highest.
    names = {row: f"{place:03}" for place, row in enumerate(beir.tie_order)}
    relevant = {
        query: {names[row] for row in rows}
        for query, rows in zip(beir.query_ids, beir.relevant, strict=True)
    }
    corpus = {names[row]: text for row, text in enumerate(beir.corpus)}
    found = InformationRetrievalEvaluator(queries, corpus, relevant)(loaded)
    pairs = read_scored(Path(data["sts"]))
    similar = EmbeddingSimilarityEvaluator(pairs.first, pairs.second, pairs.scores)(loaded)
    return {
        **{f"docs/{name}": found[f"cosine_{name}"] for name in ("ndcg@10", "mrr@10", "map@100")},
        "sts/spearman": similar["spearman_cosine"],
    }


def test_curves_are_what_sentence_transformers_measures_of_base_and_exports(
    tiny_bert, data, caplog
):
    with caplog.at_level(logging.INFO, logger="embedtune"):
        rows = fit(tiny_bert, data)
    models = [tiny_bert, "run/checkpoints/epoch-1", "run/checkpoints/epoch-2"]
    for width in (None, *WIDTHS):
        expected = [reference(model, data, width) for model in models]
        suffix = "" if width is None else f"/{width}"
        for name in expected[0]:
            found = curve(rows, f"val/{name}{suffix}")
            assert found == pytest.approx([metrics[name] for metrics in expected], abs=1e-6), name
        assert expected[0] != pytest.approx(expected[2], abs=0.01), "training must show"
    # The base is the first row, of a loss too.
    assert rows[0]["step"] == "0"
    assert float(rows[0]["val/docs/ndcg@10"]) > 0
    losses = curve(rows, "val/pairs/loss")
    assert len(losses) == 3
    assert losses[0] > losses[2]
    assert "model/ is the model of the last step, 8; checkpoint.monitor" in caplog.text


def test_a_base_that_compares_by_dot_product_is_measured_so(tiny_transformer, data):
    """And what becomes of it by cosine, as it is exported."""
    transformer = Transformer(str(tiny_transformer))
    with torch.no_grad():  # of lengths that make a difference
        for layer in transformer.auto_model.encoder.layer:
            layer.output.LayerNorm.weight[:4] *= 10
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean")]
    model = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="dot")
    model.save_pretrained("dot")
    rows = fit(Path("dot"), data, "--trainer.max_epochs", "1", "--save_on_epoch_end", "false")
    sets = {"docs": read_beir(Path(data["docs"]), ("dev",))}
    measured = [evaluate_models([name], sets)[0].metrics for name in ("dot", "run/model")]
    for name in ("ndcg@10", "map@100"):
        expected = [metrics[name] for metrics in measured]
        assert curve(rows, f"val/docs/{name}") == pytest.approx(expected, abs=1e-6)
    model.similarity_fn_name = "cosine"
    model.save_pretrained("cosine")
    by_cosine = evaluate_models(["cosine"], sets)[0].metrics["map@100"]
    assert by_cosine != pytest.approx(measured[0]["map@100"], abs=1e-4)


def test_the_base_has_its_own_prompt_width_and_longest_input(tiny_bert, data, tmp_path):
    """A fit changes all three before its first step."""
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model.max_seq_length, model.prompts["query"] = 5, "ask "
    base = tmp_path / "base"
    model.save_pretrained(str(base))
    rows = [json.loads(line) for line in Path(data["train"]).read_text().splitlines()]
    prompted = [{**row, "prompt_for_query": "find "} for row in rows]
    data = {**data, "train": lines(tmp_path / "prompted.jsonl", prompted)}
    widened = ("--model.mrl_dims", "48,16", "--model.projection_init", "random")
    found = fit(base, data, *widened)
    expected = [reference(path, data, None) for path in (base, "run/checkpoints/epoch-2")]
    for name in ("docs/ndcg@10", "docs/mrr@10", "docs/map@100"):
        values = curve(found, f"val/{name}")
        assert [values[0], values[2]] == pytest.approx([e[name] for e in expected], abs=1e-6)
    cut = reference(base, data, 16)["docs/ndcg@10"]
    assert curve(found, "val/docs/ndcg@10/16")[0] == pytest.approx(cut, abs=1e-6)
    assert len(curve(found, "val/docs/ndcg@10/48")) == 2  # the base is narrower


LATER_IS_WORSE = ("--model.lr", "0.05", "--model.lr_schedule", "constant")


def test_the_model_is_the_best_checkpoint_and_says_so(tiny_bert, data, caplog, monkeypatch):
    written = []

    def write(*args, **given):
        written.append(given)
        return write_report(*args, **given)

    monkeypatch.setattr("embedtune.callbacks.run_report.write_report", write)
    metric = "val/docs/ndcg@10/16"
    flags = ("--trainer.max_epochs", "4", *LATER_IS_WORSE, "--checkpoint.monitor", metric)
    with caplog.at_level(logging.INFO, logger="embedtune"):
        rows = fit(tiny_bert, data, *flags)
    trained = curve(rows, metric)[1:]
    best = max(range(4), key=lambda epoch: trained[epoch])
    assert best < 3, "the last epoch must not be the best, or the test shows nothing"
    probes = ["red house", "small river of stone"]
    models = ["run/model", f"run/checkpoints/epoch-{best + 1}", "run/checkpoints/epoch-4"]
    found, expected, last = (
        torch.as_tensor(SentenceTransformer(path, device="cpu").encode(probes)) for path in models
    )
    torch.testing.assert_close(found, expected)
    assert (found - last).abs().max() > 0.01
    told = f"the model of step {4 * (best + 1)}, the best by {metric} ({trained[best]:.4f})"
    base = curve(rows, metric)[0]
    assert trained[best] < base, "no checkpoint must be as good as the base model"
    told += f", which is below the base model's {base:.4f}"
    (record,) = [record for record in caplog.records if told in record.getMessage()]
    assert record.levelname == "WARNING"
    state = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 16, "a run goes on from the last"
    # The report and the card are of the same model.
    report, card = (Path("run", name).read_text() for name in ("report.html", "model/README.md"))
    assert told.replace("'", "&#39;") in report
    assert "<h1>Worse by val/docs/ndcg@10/16, the monitored metric; " in report
    below = f"by `{metric}`, by which the best of its run is chosen: {trained[best]:.4f} against"
    assert f"**This model is below the base model** {below} {base:.4f}" in card
    for text, digits in ((report, 3), (card, 4)):
        for value in (curve(rows, metric)[0], trained[best]):
            assert f"{value:.{digits}f}".removeprefix("0") in text
    assert f"{trained[-1]:.4f}" not in card
    *_, last_validation, end = written
    mrr = [curve(rows, "val/docs/mrr@10")[i] for i in (0, best + 1, 4)]
    relevant = read_beir(Path(data["docs"]), ("dev",)).relevant
    rankings = [end["comparisons"][0].base, end["comparisons"][0].trained]
    rankings.append(last_validation["comparisons"][0].trained)
    for ranking, value in zip(rankings, mrr, strict=True):
        assert retrieval_metrics(ranking, relevant)["mrr@10"] == pytest.approx(value)
    assert last_validation["model_note"] == "The fit is running: step 16 of 16"
    # Every metric and width has its interval, of the model that it is about.
    for given, number in ((end, best + 1), (last_validation, 4)):
        intervals = given["intervals"]
        assert intervals.keys() == {name for name in given["trained"] if "/loss" not in name}
        low, high = intervals[metric]
        assert low <= curve(rows, metric)[number] - base <= high
    assert end["intervals"] != last_validation["intervals"]
    (row,) = [row for row in card.splitlines() if row.startswith("| `docs` | nDCG@10 | 16 |")]
    low, high = end["intervals"][metric]
    assert row.endswith(f" {trained[best] - base:+.4f} ({low:+.4f} to {high:+.4f}), worse |")

    # A fit that goes on from the best does what this one did.
    again = fit(tiny_bert, data, *flags, "--ckpt_path", "best")
    assert curve(again, metric) == curve(rows, metric)


def test_the_best_checkpoint_is_found_by_its_name(tiny_bert, data, capsys):
    rows = fit(tiny_bert, data, "--checkpoint.monitor", "val/sts/spearman")
    best = max(curve(rows, "val/sts/spearman")[1:])
    Path("run").rename("moved")
    capsys.readouterr()
    main(
        [
            *("validate", "--model.model_name_or_path", str(tiny_bert), "--ckpt_path", "best"),
            *("--data.val_path", data["sts"], "--trainer.default_root_dir", "moved"),
            *("--trainer.accelerator", "cpu", "--checkpoint.monitor", "val/sts/spearman"),
        ]
    )
    (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("checkpoints/best")]
    assert float(row.split()[-1]) == pytest.approx(best, abs=1e-4)
    measured = json.loads(Path("moved/metrics.json").read_text())
    assert measured["metrics"]["val/sts/spearman"] == pytest.approx(best, abs=1e-5)
    assert measured["checkpoint"].startswith("moved/checkpoints/best")


def test_a_fit_ends_when_it_gets_no_better(tiny_bert, data):
    flags = ("--trainer.max_epochs", "9", *LATER_IS_WORSE)
    stopping = ("--checkpoint.monitor", "val/docs/mrr@10", "--early_stopping_patience", "1")
    values = curve(fit(tiny_bert, data, *flags, *stopping), "val/docs/mrr@10")[1:]
    assert len(values) < 9
    assert values[-1] <= max(values[:-1])
    assert values[-2] == max(values)


def test_an_anchor_that_falls_at_any_width_is_told(tiny_bert, data, caplog):
    with caplog.at_level(logging.INFO, logger="embedtune"):
        rows = fit(tiny_bert, data, "--model.lr", "0.05", "--anchors", '{"docs": 0.01, "sts": 2}')
    for metric in ("val/docs/ndcg@10", "val/docs/ndcg@10/16", "val/docs/ndcg@10/8"):
        values = curve(rows, metric)
        fell = values[0] - values[2]
        assert fell > 0.01, "or the test shows nothing"
        told = f"anchor docs: {metric} fell to {values[2]:.4f}, {fell:.4f} below the base"
        assert told in caplog.text
    assert "ndcg@10/32 fell" not in caplog.text  # which is the full width, told already
    assert "anchor sts" not in caplog.text


def test_a_model_that_is_left_as_it_was_is_equal(tiny_bert, data):
    still = ("--model.lr", "1e-12", "--model.dropout", "0", "--model.projection_init", "none")
    rows = fit(tiny_bert, data, *still, "--checkpoint.monitor", "val/docs/ndcg@10")
    values = curve(rows, "val/docs/ndcg@10")
    assert values == pytest.approx([values[0]] * 3)
    report, card = (Path("run", name).read_text() for name in ("report.html", "model/README.md"))
    assert "<h1>Equal on docs and sts at every width</h1>" in report
    assert "below the base model" not in report + card
    assert "+0.0000 (+0.0000 to +0.0000), equal |" in card


def test_a_run_that_goes_on_knows_how_its_best_checkpoint_compared(tiny_bert, data):
    """Which another process may have measured."""
    flags = ("--checkpoint.monitor", "val/docs/ndcg@10", *LATER_IS_WORSE)
    fit(tiny_bert, data, *flags, "--trainer.max_epochs", "1")
    headline = re.search("<h1>(.*)</h1>", Path("run/report.html").read_text())[1]
    assert "Worse by val/docs/ndcg@10" in headline
    fit(tiny_bert, data, *flags, "--trainer.max_epochs", "3", "--ckpt_path", "last")
    after = Path("run/report.html").read_text()
    assert "model of step 4, the best" in after, "the first epoch must be the best"
    assert re.search("<h1>(.*)</h1>", after)[1] == headline


def test_a_set_of_which_texts_are_left_out_is_not_measured(tiny_bert, data, monkeypatch, caplog):
    monkeypatch.setattr("embedtune.data.datamodule.TEXTS_PER_BATCH", 25)
    rows = fit(tiny_bert, data, "--trainer.limit_val_batches", "2")
    assert "val/docs: not measured" in caplog.text
    assert len(curve(rows, "val/docs/ndcg@10")) == 1  # the base, which is measured whole
    assert len(curve(rows, "val/sts/spearman")) == 1


def test_resuming_keeps_the_base_for_comparison(tiny_bert, data, caplog):
    fit(tiny_bert, data, "--trainer.max_epochs", "1")
    with caplog.at_level(logging.INFO, logger="embedtune"):
        rows = fit(tiny_bert, data, "--ckpt_path", "last")
    base = reference(tiny_bert, data, None)["docs/ndcg@10"]
    first, _, value = curve(rows, "val/docs/ndcg@10")
    assert first == pytest.approx(base)
    assert f"step 8: val/docs/ndcg@10 {value:.4f} ({value - base:+.4f})" in caplog.text
    first, _, value = curve(rows, "val/pairs/loss")  # measured before the first step alone
    assert f"step 8: val/pairs/loss {value:.4f} ({value - first:+.4f})" in caplog.text
    kept = read_facts(last_checkpoint(Path("run/checkpoints")))["training_facts"]["base_metrics"]
    assert kept["val/pairs/loss"] == pytest.approx(first)


def test_a_limit_of_batches_holds_for_the_base_too(tiny_bert, data):
    still = ("--data.batch_size", "2", "--model.lr", "1e-12")
    limited = curve(fit(tiny_bert, data, *still, "--trainer.limit_val_batches", "2"), LOSS)
    assert len(limited) > 1
    assert limited == pytest.approx([limited[0]] * len(limited), abs=1e-6)
    assert abs(curve(fit(tiny_bert, data, *still), LOSS)[0] - limited[0]) > 1e-3


LOSS = "val/pairs/loss"
OWN_LOSS = """
from embedtune.losses import InfoNCE


class Own(InfoNCE):
    def forward(self, embeddings, target):
        return {**super().forward(embeddings, target), "calm": embeddings.query.norm()}
"""


def test_a_part_of_a_loss_is_monitored_and_a_misspelt_one_refused(
    tiny_bert, data, capsys, monkeypatch
):
    Path("own.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(".")
    own = ("--model.loss", "own.Own", "--model.use_mrl", "false", "--checkpoint.monitor")
    assert curve(fit(tiny_bert, data, *own, "val/pairs/calm"), "val/pairs/calm")
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, data, *own, "val/pairs/clam")
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "expected a metric of data.val_path (val/pairs/loss, val/pairs/calm, val/docs" in told
    assert "found 'val/pairs/clam'" in told


# --- Bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--checkpoint.monitor", "val/docs/ndcg@5"),
            "checkpoint.monitor: expected a metric of data.val_path (val/pairs/loss, "
            "val/docs/ndcg@10, val/docs/mrr@10, ",
        ),
        (("--checkpoint.monitor", "docs/ndcg@10"), "(val/pairs/loss, val/docs/ndcg"),
        (("--checkpoint.monitor", "pairs/loss"), "(val/pairs/loss, val/docs/ndcg"),
        (("--checkpoint.monitor=",), "found ''"),
        (("--early_stopping_patience", "2"), "expected checkpoint.monitor to name the metric"),
        (
            ("--early_stopping_patience", "0", "--checkpoint.monitor", "val/sts/spearman"),
            "early_stopping_patience: expected a positive number, found 0",
        ),
        (("--anchors", '{"dosc": 0.1}'), "(docs, sts), found 'dosc'"),
        (("--anchors", '{"docs": -0.1}'), "anchors: docs: expected a fall of 0 or more"),
        (("--anchors", '{"pairs": 0.1}'), "retrieval sets or scored sets of data.val_path"),
        (("--data.val_path", '{"a/b": "train.jsonl"}'), "names without '/', found 'a/b'"),
        (("--data.val_path", '{"a": ["docs", "docs"]}'), "expected one BEIR folder or files"),
        (("--data.val_path", "neg.jsonl"), "expected pair rows as those of training, scored rows"),
        (("--data.val_path", "nowhere"), "found nothing at nowhere"),
        (("--data.val_path", "empty"), "expected a jsonl file or a BEIR folder, found the folder"),
    ],
)
def test_mistakes_are_one_message(tiny_bert, data, capsys, flags, message):
    lines(Path("neg.jsonl"), [{"query": "a", "pos": ["b"], "neg": ["c"]}])
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, data, *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_qrels_stop_a_fit_before_its_first_step(tiny_bert, data, capsys):
    Path("docs/qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tdX\t1\n")
    with pytest.raises(SystemExit):
        fit(tiny_bert, data)
    assert "docs/qrels/dev.tsv:2: " in capsys.readouterr().err
    assert not Path("run/metrics.csv").exists()
