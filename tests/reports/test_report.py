"""report.html: what it says of a run, from what is there, and that it is safe to open."""

import re
from html.parser import HTMLParser

import pytest
import torch

from embedtune.data.beir import RetrievalSet
from embedtune.reports.changes import Change, Comparison, compare_queries
from embedtune.reports.curves import arrange, read_curves
from embedtune.reports.headline import Monitored, headline
from embedtune.reports.panels import training_panels
from embedtune.reports.report import write_report

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "link", "br", "hr", "img", "input"}


def retrieval_set(queries: int = 2, documents: int = 120) -> RetrievalSet:
    """Return a set whose query i has the one relevant document i."""
    return RetrievalSet(
        queries=[f"query {i}" for i in range(queries)],
        corpus=[f"document {i}" for i in range(documents)],
        relevant=[{i: 1} for i in range(queries)],
        query_ids=[f"q{i}" for i in range(queries)],
        document_ids=[f"d{i}" for i in range(documents)],
        split="test",
    )


def found(*ranks: int | None) -> torch.Tensor:
    """Return for query i a ranking with document i at ``ranks[i]``, or without it."""
    rows = []
    for row, rank in enumerate(ranks):
        others = [document for document in range(120) if document != row][:100]
        rows.append(others if rank is None else [*others[: rank - 1], row, *others[rank - 1 : 99]])
    return torch.tensor(rows)


def write(folder, **changes) -> str:
    given = {
        "facts": {"format": "pair, 8 rows"},
        "base": {"val/scifact/ndcg@10": 0.645, "val/scifact/ndcg@10/32": 0.5},
        "trained": {"val/scifact/ndcg@10": 0.7, "val/scifact/ndcg@10/32": 0.62},
        "width": 384,
        "model_note": "model/ is step 4, the last one.",
        "comparisons": [],
        "intervals": {
            "val/scifact/ndcg@10": (0.012, 0.098),
            "val/scifact/ndcg@10/32": (0.08, 0.16),
        },
    }
    return write_report(folder, **(given | changes)).read_text("utf-8")


def write_csv(path, *rows: dict) -> None:
    names = list(dict.fromkeys(["epoch", "step", *(name for row in rows for name in row)]))
    lines = [",".join(names), *(",".join(str(row.get(n, "")) for n in names) for row in rows)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def steps(start: int, stop: int, loss: float) -> list[dict]:
    return [{"epoch": 0, "step": step, "train/loss": loss} for step in range(start, stop)]


class Page(HTMLParser):
    """Tags, attributes and text of a page; a tag that does not close is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += f"{data} "


def words(html: str) -> str:
    return " ".join(Page(html).text.split())


# --- What was logged ------------------------------------------------------------------------


def test_steps_are_counted_when_they_are_done_and_the_base_model_is_step_0(tmp_path):
    write_csv(
        tmp_path / "metrics.csv",
        {"step": 0, "val/a/ndcg@10": 0.5},
        {"epoch": 0, "step": 0, "train/loss": 2.0},
        {"epoch": 0, "step": 1, "train/loss": 1.0},
        {"epoch": 0, "step": 1, "val/a/ndcg@10": 0.6},
    )
    assert read_curves(tmp_path) == {
        "val/a/ndcg@10": {0: 0.5, 2: 0.6},
        "train/loss": {1: 2.0, 2: 1.0},
    }


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,1.5\n0,1,1.2")
    assert read_curves(tmp_path) == {"train/loss": {1: 1.5}}


# --- Metrics by set, name and width ---------------------------------------------------------


def test_metrics_are_sorted_by_what_matters():
    names = ["loss", "recall@100", "ndcg@10", "ndcg@10/32", "ndcg@10/128", "ndcg@10/384", "odd"]
    sets = arrange({f"val/a/{name}": i for i, name in enumerate(names)} | {"train/loss": 1}, 384)
    assert list(sets) == ["a"]
    assert list(sets["a"]) == ["ndcg@10", "recall@100", "loss", "odd"]
    assert list(sets["a"]["ndcg@10"].items()) == [(384, 2), (128, 4), (32, 3)]


def test_a_loss_over_several_widths_has_a_row_of_its_own():
    sets = arrange({"val/a/loss": 1.5, "val/a/loss/64": 1.0, "val/a/loss/32": 2.0}, 64)
    assert sets["a"]["loss"] == {64: 1.0, 32: 2.0, 0: 1.5}
    assert arrange({"val/a/loss": 1.5}, 64)["a"]["loss"] == {64: 1.5}


# --- Did it get better? ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (Change(0.6, 0.7, True), "unclear"),
        (Change(0.6, 0.7, True, (-0.01, 0.21)), "unclear"),
        (Change(0.6, 0.7, True, (0.0, 0.21)), "unclear"),
        (Change(0.6, 0.7, True, (0.01, 0.19)), "better"),
        (Change(0.6, 0.6001, True, (1e-5, 2e-4)), "better"),
        (Change(0.7, 0.6, True, (-0.19, -0.01)), "worse"),
        (Change(0.6, 0.6, True, (0.0, 0.0)), "equal"),
        (Change(0.7, 0.6, False), "no verdict"),
        (Change(0.7, 0.7, False), "no verdict"),
        (Change(None, 0.7, True), "not compared"),
        (Change(None, 0.7, False), "not compared"),
        (Change(0.6, float("nan"), True), "not compared"),
    ],
)
def test_an_outcome_follows_from_the_interval(change, outcome):
    assert change.outcome == outcome


def spread(name: str, *outcomes: str) -> dict[str, dict[int, str]]:
    widths = [384, 128, 32][: len(outcomes)]
    return {name: dict(zip(widths, outcomes, strict=True))}


@pytest.mark.parametrize(
    ("outcomes", "monitored", "text"),
    [
        (spread("a", "better"), None, "Better on a"),
        (spread("a", "better", "better"), None, "Better on a at every width"),
        (spread("a", "worse") | spread("b", "worse"), None, "Worse on a and b"),
        (
            spread("a", "unclear", "better", "better")
            | spread("b", "equal")
            | spread("c", "worse"),
            None,
            "Better on a at 128 and 32 dimensions, worse on c, unclear on a at 384 dimensions, "
            "equal on b",
        ),
        (
            spread("a", "better", "worse") | spread("b", "worse", "worse"),
            None,
            "Better on a at 384 dimensions, worse on a at 128 dimensions and on b at every width",
        ),
        (spread("a", "not compared") | spread("b", "not compared"), None, "Not compared with"),
        (spread("a", "not compared", "better"), None, "Better on a at 128 dimensions, not comp"),
        ({}, None, "No verdict: only losses were measured"),
        (
            spread("a", "unclear", "better", "better"),
            Monitored("val/a/ndcg@10", "unclear", ("a", 384)),
            "Unclear by val/a/ndcg@10, the monitored metric; better on a at 128 and 32 dimensions",
        ),
        (
            spread("a", "worse", "worse"),
            Monitored("val/a/ndcg@10/128", "worse", ("a", 128)),
            "Worse on a at every width",
        ),
        (
            spread("a", "worse") | spread("b", "better"),
            Monitored("val/a/ndcg@10", "worse", ("a", 384)),
            "Worse by val/a/ndcg@10, the monitored metric; better on b",
        ),
        (
            spread("a", "better"),
            Monitored("val/a/mrr@10", "better", None),
            "Better by val/a/mrr@10, the monitored metric; by main metric better on a",
        ),
        (
            {k: v for i in range(40) for k, v in spread(f"set{i}", "worse", "better").items()},
            None,
            "Better at 40, worse at 40 of the 80 widths of 40 sets",
        ),
    ],
)
def test_a_headline_tells_every_place(outcomes, monitored, text):
    found = headline(outcomes, monitored)
    assert found.startswith(text)
    if not text.endswith(("with", "comp")):
        assert found == text


def test_queries_are_those_that_rose_and_fell_most():
    base = [1, 1, 5, 2, 3, 4, 5, 6, None, 9, 1]
    trained = [1, 2, None, 1, 1, 1, 1, 1, 1, 1, 3]
    comparison = Comparison("a", retrieval_set(11), found(*base), found(*trained))
    queries = compare_queries(comparison)
    assert queries.counts == {"rose": 7, "fell": 3, "stayed": 1}
    assert [change.query for change in queries.rose] == [f"query {i}" for i in (8, 9, 7, 6, 5, 4)]
    assert [change.query for change in queries.fell] == [f"query {i}" for i in (10, 2, 1)]
    assert queries.rose[0].scores == [0.0, 1.0]
    assert queries.rose[0].ranks == [("d8", [None, 1])]
    assert queries.rose[0].tops == [("document 0", False), ("document 8", True)]


def test_relevant_documents_come_with_the_best_rank_first():
    data = retrieval_set(1)._replace(relevant=[{5: 1, 110: 2, 7: 1}])
    base = torch.arange(100)[None]
    trained = torch.cat([torch.tensor([7, 110]), torch.arange(98)])[None]
    (change,) = compare_queries(Comparison("a", data, base, trained)).rose
    assert change.ranks == [("d7", [8, 1]), ("d110", [None, 2]), ("d5", [6, 8])]


def test_a_query_without_any_document_is_described():
    nothing = torch.full((1, 100), -1)
    (change,) = compare_queries(Comparison("a", retrieval_set(1), nothing, found(1))).rose
    assert change.ranks == [("d0", [None, 1])]
    assert change.tops == [("", False), ("document 0", True)]


# --- The page -------------------------------------------------------------------------------


def test_the_page_says_at_the_top_what_became_of_each_set(tmp_path):
    text = words(write(tmp_path))
    assert "Better on scifact at every width model/ is step 4, the last one." in text
    assert "scifact nDCG@10 better .645 → .700 +.055 95% interval +.012 to +.098" in text
    assert "At 32 dimensions .500 → .620, better" in text
    assert "384 .645 .700 +.055 +.012 to +.098 32 .500 .620 +.120 +.080 to +.160" in text
    assert "a paired bootstrap of 2,000 resamples of the queries" in text
    assert "format pair, 8 rows" in text


def test_an_interval_that_leaves_out_0_does_not_look_as_if_it_ended_there(tmp_path):
    given = {"val/scifact/ndcg@10": (0.0002, 0.0041), "val/scifact/ndcg@10/32": (-0.0002, 0.0041)}
    trained = {"val/scifact/ndcg@10": 0.64541, "val/scifact/ndcg@10/32": 0.5021}
    text = words(write(tmp_path, trained=trained, intervals=given))
    assert "better .645 → .645 +.0004 95% interval +.0002 to +.0041" in text
    assert "32 .500 .502 +.002 .000 to +.004" in text  # unclear


@pytest.mark.parametrize(
    ("monitor", "text"),
    [
        (None, "Better on scifact at 32 dimensions, unclear on scifact at 384 dimensions"),
        ("val/scifact/ndcg@10", "Unclear by val/scifact/ndcg@10, the monitored metric; better on"),
        ("val/scifact/ndcg@10/384", "Unclear by val/scifact/ndcg@10/384, the monitored metric; b"),
        ("val/scifact/ndcg@10/32", "Better by val/scifact/ndcg@10/32, the monitored metric; unc"),
        ("val/pairs/loss", "Better on scifact at 32 dimensions, unclear on scifact at 384"),
        ("train/loss", "Better on scifact at 32 dimensions, unclear on scifact at 384"),
        ("val/gone/ndcg@10", "Better on scifact at 32 dimensions, unclear on scifact at 384"),
    ],
)
def test_the_monitored_metric_comes_first_where_it_gives_a_verdict(tmp_path, monitor, text):
    intervals = {"val/scifact/ndcg@10": (-0.01, 0.1), "val/scifact/ndcg@10/32": (0.1, 0.14)}
    html = write(
        tmp_path,
        base={"val/scifact/ndcg@10": 0.645, "val/scifact/ndcg@10/32": 0.5, "val/pairs/loss": 1.0},
        trained={"val/scifact/ndcg@10": 0.7, "val/scifact/ndcg@10/32": 0.62, "val/pairs/loss": 2.0},
        intervals=intervals,
        monitor=monitor,
    )
    assert f"<h1>{text}" in html
    assert "no verdict" in words(html)  # of the loss, which doubled


def test_of_losses_alone_no_verdict_is_made(tmp_path):
    losses = {"val/pairs/loss": 1.0, "val/pairs/loss/32": 1.0, "val/pairs/loss/64": 1.0}
    html = write(tmp_path, base=losses, trained=dict.fromkeys(losses, 0.5), intervals={})
    assert "<h1>No verdict: only losses were measured</h1>" in html
    assert 'class="better"' not in html


def test_every_metric_is_shown_at_every_width_widest_first(tmp_path):
    names = ["ndcg@10", "mrr@10", "map@100", "recall@100", "loss"]
    trained = {f"val/a/{n}/{w}": i + w / 1e4 for i, n in enumerate(names) for w in (32, 384, 64)}
    trained |= {f"val/a/{n}": i + 0.0384 for i, n in enumerate(names[:4])}
    base = {name: value - 0.001 for name, value in trained.items()}
    html = write(tmp_path, base=base, trained=trained)
    table = html[html.index('id="metrics"') : html.index('id="training"')]
    assert re.findall(r'class="group">(.*?@.*?|loss)<', table) == [
        *("nDCG@10", "MRR@10", "MAP@100", "Recall@100", "loss"),
    ]
    assert re.findall(r'<th scope="row">(\d+)', table) == ["384", "64", "32"]
    for value in trained.values():
        assert f"{value:.3f}".removeprefix("0") in table
        assert f"{value - 0.001:.3f}".removeprefix("0") in table


def test_rises_and_falls_are_shown_with_their_ranks(tmp_path):
    comparison = Comparison("scifact", retrieval_set(2), found(None, 1), found(1, 4))
    text = words(write(tmp_path, comparisons=[comparison]))
    assert "Queries: 1 rose, 1 fell, 0 stayed" in text
    assert "query 0 nDCG@10 from .00 to 1.00 d0 from beyond 100 to 1" in text
    assert "query 1 nDCG@10 from 1.00 to .43 d1 from 1 to 4" in text
    assert "base document 1 trained relevant document 0" in text


def test_curves_start_at_the_base_model(tmp_path):
    write_csv(
        tmp_path / "metrics.csv",
        *steps(0, 4, 1.0),
        {"epoch": 0, "step": 3, "val/scifact/ndcg@10": 0.7, "val/scifact/ndcg@10/32": 0.62},
    )
    html = write(tmp_path)
    assert "384: .645 at step 0 to .7 at step 4; 32: .5 at step 0 to .62 at step 4" in html
    assert "loss: 1 at step 1 to 1 at step 4" in html


def test_they_start_there_whatever_the_file_has_at_step_0(tmp_path):
    write_csv(
        tmp_path / "metrics.csv",
        {"step": 0, "val/scifact/ndcg@10": 0.1},
        {"epoch": 0, "step": 3, "val/scifact/ndcg@10": 0.7},
    )
    assert "384: .645 at step 0 to .7 at step 4" in write(tmp_path)


def test_all_that_is_logged_of_training_is_drawn(tmp_path):
    parts = ["loss", "loss/384", "loss/64", "cosine", "lr"]
    speed = ["examples_per_s", "padding_efficiency", "input_wait"]
    row = {f"train/{name}": 0.25 for name in (*parts, *speed)}
    write_csv(tmp_path / "metrics.csv", *({"epoch": 0, "step": s, **row} for s in range(3)))
    assert [panel.title for panel in training_panels(read_curves(tmp_path))] == [
        *("loss", "loss by width", "cosine", "learning rate"),
    ]
    html = write(tmp_path)
    for title in ("examples a second", "padding efficiency", "input wait"):
        assert f"<figcaption>{title}</figcaption>" in html
    assert Page(html).tags.count("svg") == 4 + 3 + 1  # and quality by width
    assert "padding efficiency: 25 at step 1" in html
    assert "384: .25 at step 1 to .25 at step 3; 64: .25" in html


def test_what_is_missing_is_said(tmp_path):
    text = words(write(tmp_path, base={}))
    assert "Not compared with the base model" in text
    assert "– → .700 –" in text
    assert "metrics.csv has no values of this set" in text
    assert "There is no loss to draw" in text
    assert "config.yaml is not in the run folder" in text
    assert "No set was evaluated" in words(write(tmp_path, base={}, trained={}))


def test_a_base_model_is_not_called_missing_where_a_metric_is_no_number(tmp_path):
    given = {"base": {"val/sts/spearman": 0.3}, "trained": {"val/sts/spearman": float("nan")}}
    html = write(tmp_path, **given, intervals={})
    assert "<h1>Not compared with the base model</h1>" in html
    assert ".300 → nan nan" in words(html)


def test_a_model_that_was_not_measured_leaves_the_base_model_and_the_curves(tmp_path):
    write_csv(
        tmp_path / "metrics.csv",
        {"epoch": 0, "step": 3, "val/scifact/ndcg@10": 0.9, "val/pairs/loss": 1.5},
    )
    comparison = Comparison("scifact", retrieval_set(2), found(None, 1), found(1, 4))
    given = {"trained": {}, "intervals": {}, "monitor": "val/scifact/ndcg@10"}
    html = write(tmp_path, **given)
    text = words(html)
    assert "<h1>No verdict: this model was not measured</h1>" in html
    assert "scifact nDCG@10 not measured .645 → – –" in text
    assert "pairs loss not measured – → –" in text
    assert "384: .645 at step 0 to .9 at step 4" in html
    assert "base: .5 at dimensions 32 to .645 at dimensions 384" in html
    assert "trained: " not in html
    assert "Rose most" not in text
    assert "Rose most" in words(write(tmp_path, comparisons=[comparison]))


def test_a_set_that_the_best_model_was_not_measured_on_is_shown(tmp_path):
    base = {"val/scifact/ndcg@10": 0.645, "val/b/ndcg@10": 0.3}
    text = words(write(tmp_path, base=base, trained={"val/scifact/ndcg@10": 0.7}))
    assert "Better on scifact, not measured on b" in text
    assert "b nDCG@10 not measured .300 → – –" in text


def test_a_base_model_without_the_wide_widths_leaves_them_open(tmp_path):
    trained = {"val/a/ndcg@10": 0.7, "val/a/ndcg@10/512": 0.6, "val/a/ndcg@10/128": 0.5}
    base = {"val/a/ndcg@10": 0.6, "val/a/ndcg@10/128": 0.4}
    text = words(write(tmp_path, base=base, trained=trained, width=1024))
    assert "1024 .600 .700 +.100 512 – .600 – 128 .400 .500 +.100" in text
    assert "Unclear on a at 1024 and 128 dimensions, not compared on a at 512 dimensions" in text


def test_a_wider_base_model_is_compared_as_a_whole_and_at_each_width(tmp_path):
    trained = {"val/a/ndcg@10": 0.7, "val/a/ndcg@10/256": 0.7, "val/a/ndcg@10/128": 0.5}
    base = {"val/a/ndcg@10": 0.72, "val/a/ndcg@10/256": 0.6, "val/a/ndcg@10/128": 0.4}
    intervals = {name: (v - base[name],) * 2 for name, v in trained.items()}
    write_csv(tmp_path / "metrics.csv", {"step": 0, **base}, {"epoch": 0, "step": 3, **trained})
    given = {"base": base, "trained": trained, "intervals": intervals, "width": 256}
    html = write(tmp_path, **given, base_width=1024, monitor="val/a/ndcg@10/256")
    text = words(html)
    assert "Better by val/a/ndcg@10/256, the monitored metric; better on a at 128 dimen" in text
    assert "worse on a at full width" in text
    assert "full .720 .700 −.020" in text
    assert "256 .600 .700 +.100" in text
    assert "full: .72 at step 0 to .7 at step 4; 256: .6 at step 0 to .7 at step 4" in html
    assert "base: .4 at dimensions 128 to .72 at dimensions 1,024" in html
    assert "trained: .5 at dimensions 128 to .7 at dimensions 256" in html
    assert "--dims 256,128" in text


def test_a_narrower_base_model_is_drawn_at_its_own_width(tmp_path):
    trained = {"val/a/ndcg@10": 0.7, "val/a/ndcg@10/128": 0.5}
    base = {"val/a/ndcg@10": 0.6, "val/a/ndcg@10/128": 0.4}
    html = write(tmp_path, base=base, trained=trained, width=768, base_width=384)
    assert "768 .600 .700 +.100" in words(html)
    assert "base: .4 at dimensions 128 to .6 at dimensions 384" in html
    assert "trained: .5 at dimensions 128 to .7 at dimensions 768" in html


def test_the_commands_name_the_run_and_its_widths(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    text = words(write(folder))
    assert f'SentenceTransformer("{folder}/model", truncate_dim=32)' in text
    assert f"embedtune evaluate '{folder}/model' --data TEST_SET --dims 384,32" in text
    assert f"embedtune fit --config '{folder}/config.yaml' --ckpt_path last" in text
    text = words(write(folder, base={}, trained={"val/a/ndcg@10": 0.7}))
    assert "truncate_dim" not in text
    assert "--dims" not in text


def test_everything_from_data_is_escaped(tmp_path):
    (tmp_path / "config.yaml").write_text(f"model: {EVIL}\n")
    name = f"{EVIL.replace('/', '')}"
    metrics = {f"val/{name}/ndcg@10": 0.5, f"val/{name}/ndcg@10/32": 0.5, f"val/{name}/{name}": 0.1}
    write_csv(
        tmp_path / "metrics.csv",
        {"epoch": 0, "step": 0, f"val/{name}/ndcg@10": 0.5, f"train/{name}": 1.0},
    )
    data = RetrievalSet([EVIL] * 2, [EVIL] * 120, [{0: 1}, {1: 1}], ["q"] * 2, [EVIL] * 120, "test")
    html = write(
        tmp_path,
        facts={EVIL: EVIL},
        base=metrics,
        trained=metrics,
        model_note=EVIL,
        comparisons=[Comparison(name, data, found(None, 1), found(1, None))],
    )
    page = Page(html)
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 8
    assert not [value for _, key, value in page.attributes if key.startswith("on")]


def test_the_page_loads_nothing(tmp_path):
    write_csv(tmp_path / "metrics.csv", *steps(0, 3, 1.0))
    data = retrieval_set(2)._replace(queries=["see https://example.org", "url(http://x)"])
    comparison = Comparison("scifact", data, found(None, 1), found(1, 2))
    html = write(tmp_path, comparisons=[comparison])
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    links = [value for _, key, value in page.attributes if key in ("href", "src", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"@import|url\(|https?:", style)
    assert "default-src 'none'; style-src 'unsafe-inline'" in html


def test_every_link_has_its_target(tmp_path):
    comparison = Comparison("scifact", retrieval_set(2), found(None, 1), found(1, 2))
    several = {"val/scifact/ndcg@10": 0.7, "val/scifact/mrr@10": 0.6}
    for changes in ({"comparisons": [comparison]}, {"trained": several}, {"trained": {}}):
        page = Page(write(tmp_path, **changes))
        targets = {value for _, key, value in page.attributes if key == "id"}
        assert {v[1:] for _, key, v in page.attributes if key == "href"} == targets


def test_a_long_run_and_long_texts_stay_small(tmp_path):
    row = {f"train/{name}": 1.23456789 for name in ("loss", "lr", "examples_per_s", "input_wait")}
    write_csv(tmp_path / "metrics.csv", *({"epoch": 0, "step": s, **row} for s in range(5000)))
    data = retrieval_set(60)._replace(corpus=["many words " * 1000] * 120)
    base, trained = found(*[None, 1] * 30), found(*[1, None] * 30)
    comparisons = [Comparison("scifact", data, base, trained)]
    assert len(write(tmp_path, comparisons=comparisons).encode()) < 200_000
