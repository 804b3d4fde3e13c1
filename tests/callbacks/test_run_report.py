"""report.html of real fits: what was measured, after which step, and why the fit ended."""

import re
import signal
from html import unescape
from pathlib import Path

import pytest
from testset_files import write_graded_beir, write_pairs_and_sts, write_plain_beir
from told_losses import told

from embedtune.callbacks import run_report
from embedtune.cli import main
from embedtune.evaluation.metrics import ndcg
from embedtune.reports.curves import read_curves

METRIC = "val/sts/spearman"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs_and_sts(20)


def fit(model, *more: str) -> None:
    """Run a fit of 10 batches an epoch."""
    given = {
        "model.model_name_or_path": model,
        "model.lr": 1e-2,
        "data.train_path": "train.jsonl",
        "data.val_path.sts": "sts.jsonl",
        "data.batch_size": 2,
        "trainer.default_root_dir": "run",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": False,
        "trainer.max_epochs": 1,
        "save_on_epoch_end": False,
        "log_with": "csv",
    }
    main(["fit", *(f"--{name}={value}" for name, value in given.items()), *more])


def report() -> str:
    """Return the words of the report, and what its charts tell those who do not see them."""
    html = Path("run/report.html").read_text("utf-8")
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def validated() -> list[int]:
    """Return after which steps the chart has points, but for the base model's."""
    return [step for step in read_curves(Path("run")).get(METRIC, {}) if step]


# --- A last step without a validation -------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "last"),
    [
        (("--trainer.max_epochs=-1", "--trainer.max_steps=14"), 10),
        (("--trainer.val_check_interval=4",), 8),
        (("--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=3"), 20),
    ],
)
def test_what_was_measured_stays_where_the_last_step_was_not(tiny_bert, more, last):
    fit(tiny_bert, *more)
    text = report()
    assert "No verdict: this model was not measured" in text
    assert "No set was evaluated" not in text
    assert f"This model was not measured: the last validation came after step {last}" in text
    assert re.search(r"sts Spearman not measured -?[.\d]+ → – –", text.replace("−", "-"))
    assert re.search(rf"at step 0 to \S+ at step {last}\b", text)


def test_without_any_validation_the_base_model_stands_alone(tiny_bert):
    fit(tiny_bert, "--trainer.max_steps=3")
    assert "This model was not measured: no validation came" in report()


# --- What rose and fell ---------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch) -> list[dict]:
    """Return what reports are written of."""
    calls: list[dict] = []
    monkeypatch.setattr(run_report, "write_report", lambda *args, **facts: calls.append(facts))
    return calls


def kept(mode: str, *more: str) -> tuple[str, ...]:
    """Return the flags of a fit whose first model is the best by ``max``, its last by ``min``."""
    write_plain_beir(Path("beir"))
    sets = ("--data.val_path.beir=beir", "--data.val_path.pairs=train.jsonl")
    by = ("--checkpoint.monitor=val/pairs/loss", f"--checkpoint.mode={mode}", "--model.lr=1e-3")
    return (*sets, *by, "--trainer.max_epochs=2", *more)


def test_the_queries_are_those_of_the_best_model_whatever_its_name(tiny_bert, written):
    fit(tiny_bert, *kept("min", "--checkpoint.filename=best"))
    first, last, end = (facts["comparisons"][0].trained for facts in written)
    assert end.equal(last)
    assert not end.equal(first)


def test_those_of_a_later_model_are_not_shown_of_it(tiny_bert, written):
    """A run that goes on does not know what the best one before it has found."""
    with pytest.raises(SystemExit):
        fit(tiny_bert, *kept("max"), *told(14, signal.SIGTERM), "--trainer.val_check_interval=5")
    fit(tiny_bert, *kept("max", "--ckpt_path=last", "--trainer.val_check_interval=5"))
    assert "is the model of step 5, the best" in written[-1]["model_note"]
    assert written[-2]["comparisons"]
    assert written[-1]["comparisons"] == []


# --- Steps of the chart ---------------------------------------------------------------------


def test_a_validation_lies_at_the_steps_that_were_done_before_it(tiny_bert):
    """Also in the middle of accumulated batches, where no step has just ended."""
    every = ("--trainer.val_check_interval=5", "--trainer.accumulate_grad_batches=3")
    fit(tiny_bert, *every, "--trainer.max_epochs=2")
    assert validated() == [1, 4, 5, 8]


def test_so_does_one_before_the_first_step_of_a_run_that_goes_on(tiny_bert):
    with pytest.raises(SystemExit):
        fit(tiny_bert, *told(9, signal.SIGTERM), "--trainer.max_epochs=2")
    fit(tiny_bert, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert validated() == [10, 20]


# --- Other data than before -----------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "expected"), [(2, [10, 15, 20]), (1, [])])
def test_the_chart_has_no_values_of_old_data(tiny_bert, epochs, expected):
    """Also where nothing is left to train; where there is, the place gone on from is measured."""
    every = "--trainer.val_check_interval=5"
    fit(tiny_bert, every, "--data.val_path.old=train.jsonl")
    assert validated() == [5, 10]
    rows = Path("sts.jsonl").read_text().splitlines(keepends=True)
    Path("sts.jsonl").write_text("".join(rows[:9]))
    more = ("--data.val_path.old=train.jsonl", "--ckpt_path=last")
    fit(tiny_bert, every, f"--trainer.max_epochs={epochs}", *more)
    assert validated() == expected
    curves = read_curves(Path("run"))
    assert list(curves["val/old/loss"]) == [0, 5, *(expected or [10])]
    assert len(curves["train/loss"]) == 10 * epochs
    if expected:
        text = report().replace("−", "-")
        base, start = re.search(r"sts Spearman .*? (\S+) → .*? (\S+) at step 0 to", text).groups()
        assert float(base) == pytest.approx(float(start), abs=1e-3)


def test_the_best_model_of_an_earlier_run_is_compared_on_the_sets_that_it_had(tiny_bert, written):
    """Its metrics and intervals are of them, whatever data the base model is measured on now."""
    rows = Path("sts.jsonl").read_text().splitlines(keepends=True)
    more = ("--data.val_path.other=other.jsonl", f"--checkpoint.monitor={METRIC}")
    for data, ckpt in ((rows[:12], ()), (rows[12:], ("--ckpt_path=last",))):
        Path("other.jsonl").write_text("".join(data))
        fit(tiny_bert, *more, *ckpt)
    before, after = (given["base"] for given in (written[-2], written[-1]))
    assert before["val/other/spearman"] == after["val/other/spearman"]
    assert written[-2]["trained"] == written[-1]["trained"]


# --- Queries of the best model --------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen",
    [
        ("--checkpoint.monitor=val/docs/ndcg@10", "--checkpoint.filename=best"),  # a path recurs
        ("--checkpoint.monitor=train/loss", "--checkpoint.mode=max"),  # saved after a validation
        ("--checkpoint.monitor=train/loss", "--checkpoint.every_n_train_steps=10"),  # and before it
    ],
)
def test_queries_are_those_that_the_best_model_found(tiny_bert, monkeypatch, chosen):
    write_graded_beir(Path("docs"))
    given = {}
    monkeypatch.setattr(run_report, "write_report", lambda *_, **about: given.update(about))
    fit(tiny_bert, "--data.val_path.docs=docs", "--trainer.max_epochs=3", *chosen)
    measured = given["trained"].get("val/docs/ndcg@10")
    assert len(given["comparisons"]) == (measured is not None)
    for one in given["comparisons"]:
        assert ndcg(one.trained, one.data.relevant).mean().item() == pytest.approx(measured)


# --- Ends before the last step --------------------------------------------------------------


def test_early_stopping_says_when_and_why_it_ends_a_fit(tiny_bert, caplog):
    patient = (f"--checkpoint.monitor={METRIC}", "--early_stopping_patience=1", "--model.lr=1e-12")
    with caplog.at_level("INFO", logger="embedtune"):
        fit(tiny_bert, *patient, "--trainer.max_epochs=6")
    why = "early stopping has ended this fit after step 20 of 60: 1 validation without a better"
    assert caplog.text.count(f"{why} {METRIC} than ") == 1
    assert why.capitalize() in report()
    fit(tiny_bert, *patient, "--trainer.max_epochs=6", "--ckpt_path=last")
    assert why.capitalize() in report()


def test_a_fit_that_trained_all_its_steps_was_not_ended_by_it(tiny_bert, caplog):
    patient = (f"--checkpoint.monitor={METRIC}", "--early_stopping_patience=1", "--model.lr=1e-12")
    fit(tiny_bert, *patient, "--trainer.max_epochs=2")
    assert "arly stopping" not in caplog.text + report()


@pytest.mark.parametrize(
    ("at", "measured"),
    [(7, "What is shown was measured after step 5"), (2, "was not measured: no validation came")],
)
def test_a_fit_that_a_signal_has_stopped_is_not_called_running(tiny_bert, at, measured):
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, *told(at, signal.SIGTERM), "--trainer.val_check_interval=5")
    assert caught.value.code == 143
    text = report()
    stopped = f"SIGTERM: stopped after step {at + 1}: saved run/checkpoints/last.ckpt; go on with"
    assert f"{stopped} --ckpt_path last. " in text
    assert measured in text
    assert "is running" not in text
