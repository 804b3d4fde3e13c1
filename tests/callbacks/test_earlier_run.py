"""What an earlier run has left is renamed when a fit really trains, and never before."""

import json
import shutil
from pathlib import Path

import pytest
from sentence_transformers.sentence_transformer.modules import Pooling

from embedtune.callbacks.earlier_run import MetricsFile
from embedtune.checkpoints import last_checkpoint, read_facts
from embedtune.cli import main
from embedtune.reports.curves import read_rows

PAIRS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(8)]
WORK = "work"


@pytest.fixture(scope="module")
def used(tiny_bert, tmp_path_factory) -> Path:
    """Return a folder with rows and a run, whose validation has left its metrics."""
    folder = tmp_path_factory.mktemp("used") / WORK
    folder.mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in PAIRS)
    (folder / "train.jsonl").write_text(rows)
    (folder / "bad.jsonl").write_text(rows + '{"query": 1}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(tiny_bert, "--data.val_path=train.jsonl")
    (folder / "run/metrics.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _in_a_copy(used, tmp_path, monkeypatch):
    shutil.copytree(used, tmp_path / WORK, symlinks=True)
    monkeypatch.chdir(tmp_path / WORK)


def fit(model: Path, *flags: str) -> None:
    given = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--log_with=csv")
    given += ("--data.batch_size=4", "--trainer.max_epochs=1", "--data.train_path=train.jsonl")
    main(["fit", f"--model.model_name_or_path={model}", *given, *flags])


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def steps(folder: str) -> int:
    return read_facts(last_checkpoint(Path(folder)))["global_step"]


@pytest.mark.parametrize("reason", ["rows", "export", "checkpoint", "report"])
def test_a_fit_that_is_refused_leaves_the_run_folder_as_it_was(tiny_bert, monkeypatch, reason):
    flags: tuple[str, ...] = ("--data.val_path=train.jsonl", "--model.lr=1")
    if reason == "rows":
        flags += ("--data.train_path=bad.jsonl",)
    elif reason == "export":
        monkeypatch.setattr(Pooling, "get_config_dict", lambda self: {"embedding_dimension": 32})
        flags += ("--model.pooling=cls",)
    elif reason == "checkpoint":
        flags += ("--ckpt_path=train.jsonl",)
    else:
        Path("run/report.html").unlink()
        Path("run/report.html").mkdir()
        Path("run/report.html/notes.txt").touch()
    before = contents(Path("run"))
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, *flags)
    assert caught.value.code == 2
    assert contents(Path("run")) == before


def test_so_does_a_smoke_test(tiny_bert, used):
    smoke = ("--trainer.fast_dev_run=true", "--data.val_path=train.jsonl")
    fit(tiny_bert, *smoke, "--checkpoint.monitor=val/train/loss")
    assert contents(Path("run")) == contents(used / "run")
    fit(tiny_bert, *smoke, "--trainer.default_root_dir=new")
    assert not contents(Path("new"))


def test_a_fit_that_trains_renames_them(tiny_bert, used):
    fit(tiny_bert, "--trainer.max_steps=1")
    for now, name in (("metrics-1.csv", "metrics.csv"), ("metrics-1.json", "metrics.json")):
        assert Path("run", now).read_bytes() == (used / "run" / name).read_bytes()
    assert contents(Path("run/checkpoints-1")) == contents(used / "run/checkpoints")
    assert steps("run/checkpoints") == 1


@pytest.mark.parametrize("place", ["{}/run/checkpoints", "run/../run/checkpoints"])
def test_however_the_folder_of_checkpoints_is_written(tiny_bert, used, place):
    fit(tiny_bert, f"--checkpoint.dirpath={place.format(Path.cwd())}", "--trainer.max_steps=1")
    assert contents(Path("run/checkpoints-1")) == contents(used / "run/checkpoints")


def test_where_others_keep_files_checkpoints_alone_are_moved(tiny_bert, caplog):
    for number in (1, 2):
        fit(tiny_bert, "--checkpoint.dirpath=.", f"--trainer.max_steps={number}")
    assert {"train.jsonl", "bad.jsonl", "run"} <= {path.name for path in Path().iterdir()}
    assert (steps("checkpoints-1"), steps(".")) == (1, 2)
    assert f"{Path.cwd()}: an earlier run's checkpoints are now in" in caplog.text


def test_who_goes_on_where_nothing_is_hears_where_something_is(tiny_bert, caplog, capsys):
    Path("run/checkpoints").rename("run/checkpoints-1")
    where = "; those of earlier runs are in run/checkpoints-1"
    model = f"--model.model_name_or_path={tiny_bert}"
    with pytest.raises(SystemExit):
        main(["validate", model, "--data.val_path=train.jsonl", "--ckpt_path=last"])
    assert f"expected a checkpoint in run/checkpoints, found none{where}" in capsys.readouterr().err
    fit(tiny_bert, "--ckpt_path=last", "--trainer.max_steps=1")
    told = [record for record in caplog.records if "ckpt_path: last" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]
    assert told[0].getMessage() == f"ckpt_path: last: there is no checkpoint yet{where}"


def test_who_goes_on_in_a_run_has_all_of_its_metrics_in_one_file(tiny_bert, used):
    """Without what was logged after the checkpoint, of steps that are then trained anew."""
    logged = ("--trainer.log_every_n_steps=3", "--checkpoint.every_n_train_steps=1")
    fit(tiny_bert, "--trainer.max_epochs=2", *logged)
    shutil.copytree("run/checkpoints", "kept")
    fit(tiny_bert, "--trainer.max_epochs=8", *logged, "--ckpt_path=last")
    whole = read_rows(Path("run/metrics.csv"))
    assert [row.step for row in whole if "train/loss" in row.values] == [2, 5, 8, 11, 14]
    shutil.rmtree("run/checkpoints")
    Path("kept").rename("run/checkpoints")
    fit(tiny_bert, "--trainer.max_epochs=6", *logged, "--ckpt_path=last")
    again = read_rows(Path("run/metrics.csv"))
    assert [row.step for row in again if "train/loss" in row.values] == [2, 5, 8, 11]
    assert [row for row in again if row.step < 4] == [row for row in whole if row.step < 4]


def test_what_a_killed_run_had_measured_and_not_saved_is_told_once():
    """The base model's row is of that step, too."""
    killed = MetricsFile(Path("killed"))
    killed.start(0)
    measured = {"val/a": 0.5, "epoch": 0}
    for metrics in ({"val/a": 0.25}, {"train/loss": 2.0, "epoch": 0}, measured):
        killed.log_metrics(metrics, 0)
    killed.save()
    after = MetricsFile(Path("killed"))
    after.log_metrics(measured, 0)
    after.start(1)
    after.save()
    rows = read_rows(Path("killed/metrics.csv"))
    told = sorted(tuple(sorted(row.values.items())) for row in rows)
    assert told == [
        (("epoch", 0.0), ("train/loss", 2.0)),
        (("epoch", 0.0), ("val/a", 0.5)),
        (("val/a", 0.25),),
    ]


@pytest.mark.parametrize("epochs", [10, 12])
def test_who_goes_on_from_elsewhere_takes_nothing_of_the_run_that_is_here(tiny_bert, used, epochs):
    """Also where nothing is left to train."""
    fit(tiny_bert, "--trainer.max_epochs=10", "--trainer.default_root_dir=other")
    ends = f"--trainer.max_epochs={epochs}"
    fit(tiny_bert, ends, "--ckpt_path=other/checkpoints/last.ckpt")
    assert contents(Path("run/checkpoints-1")) == contents(used / "run/checkpoints")
    assert Path("run/model/modules.json").exists()
    if epochs > 10:
        assert steps("run/checkpoints") == 24
        assert {row.step for row in read_rows(Path("run/metrics.csv"))} == {20, 21, 22, 23}
        assert Path("run/metrics-1.csv").read_bytes() == (used / "run/metrics.csv").read_bytes()
