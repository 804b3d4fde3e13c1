"""Exports of a fit: after its checkpoints, and at its end whatever happened before."""

import json
import re
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
from sentence_transformers.sentence_transformer.modules import Pooling

from embedtune import EmbeddingDataModule, EmbeddingModule, ExportModel, InputError
from embedtune.callbacks import export_model
from embedtune.checkpoints import last_checkpoint
from embedtune.cli import main
from embedtune.digests import DIGESTS
from embedtune.errors import ExportError
from embedtune.export.folder import UNVERIFIED, is_verified

PAIRS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(8)]
SCORED = [{"query": f"query {i}", "pos": [f"document {i}"], "scores": [i % 3]} for i in range(8)]
BEST = ("--data.val_path", "dev.jsonl", "--checkpoint.monitor", "val/dev/spearman")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", PAIRS), ("dev", SCORED)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fit(model: Path, *flags: str) -> None:
    main(
        [
            *("fit", "--model.model_name_or_path", str(model), "--data.train_path", "train.jsonl"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
            *("--data.batch_size", "4", "--log_with", "csv", *flags),
        ]
    )


@pytest.mark.parametrize("flags", [(), BEST, ("--checkpoint.monitor", "train/loss")])
def test_an_epoch_is_exported_after_its_checkpoint_and_costs_nothing_if_it_fails(
    tiny_bert, monkeypatch, caplog, flags
):
    saved: dict[str, set[str]] = {}
    export = export_model.export_encoder

    def fail_in_epochs(encoder, folder, *args, **kwargs):
        if not folder.name.startswith("epoch-"):
            return export(encoder, folder, *args, **kwargs)
        saved[folder.name] = {path.name for path in Path("run/checkpoints").glob("*step=*.ckpt")}
        raise ExportError(f"{folder}: cannot be written: No space left on device")

    monkeypatch.setattr(export_model, "export_encoder", fail_in_epochs)
    fit(tiny_bert, *flags)
    for number, name in ((1, "epoch-1"), (2, "epoch-2")):
        assert any(f"step={2 * number}" in path for path in saved[name]), saved
    assert list(saved) == ["epoch-1", "epoch-2"]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert re.match(r"epoch 1 is not exported: .*epoch-1: .* No space left", errors[0])
    assert is_verified(Path("run/model"))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_without_float32_weights_is_refused_before_anything_is_written(
    tiny_bert, capsys, precision
):
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, "--trainer.precision", precision)
    assert caught.value.code == 2
    (message,) = re.findall(r"^embedtune: error: .*$", capsys.readouterr().err, re.MULTILINE)
    assert "trainer.precision: expected 32-true, bf16-mixed or 16-mixed" in message
    assert precision in message
    assert not Path("run/metrics.csv").exists()


def test_a_model_that_exports_otherwise_is_refused_before_its_first_step(
    tiny_bert, capsys, monkeypatch
):
    """What is saved beside the weights decides: here a module that forgets a setting."""
    monkeypatch.setattr(Pooling, "get_config_dict", lambda self: {"embedding_dimension": 32})
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, "--model.pooling", "cls")
    assert caught.value.code == 2
    (message,) = re.findall(r"^embedtune: error: .*$", capsys.readouterr().err, re.MULTILINE)
    assert "cannot be exported as it is trained, hence nothing was trained: embeddings" in message
    assert "UNVERIFIED" not in message
    assert not last_checkpoint(Path("run/checkpoints"))
    assert not list(Path("run").glob("*trial*"))


def test_a_place_that_is_anothers_is_refused_before_the_first_step(tiny_bert, capsys):
    fit(tiny_bert, "--trainer.max_steps", "1")
    shutil.rmtree("run/checkpoints")
    model = Path("run/model")
    for change, found in (
        (lambda: (model / "notes.txt").touch(), "found notes.txt, which embedtune has not written"),
        (lambda: (model / DIGESTS).unlink(), "found something else: it has no digests"),
        (lambda: (shutil.rmtree(model), model.touch()), "found the file run/model"),
    ):
        change()
        with pytest.raises(SystemExit) as caught:
            fit(tiny_bert, "--trainer.max_steps", "1")
        assert caught.value.code == 2
        (message,) = re.findall(r"^embedtune: error: .*$", capsys.readouterr().err, re.MULTILINE)
        assert message.startswith("embedtune: error: run/model: expected no folder or an exported")
        assert found in message
        assert not last_checkpoint(Path("run/checkpoints"))


@pytest.mark.parametrize("name", ["model", "checkpoints/epoch-1"])
def test_a_base_that_the_run_would_replace_is_refused(tiny_bert, name):
    """Also by a Trainer of one's own."""
    shutil.copytree(tiny_bert, Path("run", name))
    module = EmbeddingModule(f"run/{name}")
    data = EmbeddingDataModule("train.jsonl", batch_size=4)
    settings = {"accelerator": "cpu", "logger": False, "use_distributed_sampler": False}
    trainer = pl.Trainer(**settings, default_root_dir="run", callbacks=[ExportModel()])
    with pytest.raises(InputError, match="expected a model outside of what this run writes, found"):
        trainer.fit(module, datamodule=data)
    assert (Path("run", name) / "modules.json").exists()


@pytest.mark.parametrize("flags", [(), BEST])
@pytest.mark.parametrize("left", ["nothing", "unverified"])
def test_a_fit_with_nothing_left_to_train_leaves_a_model_and_a_report(tiny_bert, left, flags):
    fit(tiny_bert, *flags)
    model, report = Path("run/model"), Path("run/report.html")
    card, weights = ((model / name).read_bytes() for name in ("README.md", "model.safetensors"))
    report.unlink()
    if left == "nothing":
        model.rename("moved")
    else:
        (model / UNVERIFIED).touch()
        (model / "model.safetensors").write_bytes(b"half")
    fit(tiny_bert, "--ckpt_path", "last", *flags)
    assert is_verified(model)
    assert (model / "model.safetensors").read_bytes() == weights
    assert (model / "README.md").read_bytes() == card
    text = report.read_text()
    assert "The fit is running" not in text
    assert "global batch" in text


@pytest.mark.parametrize("epochs", ["2", "4"])
def test_an_epoch_that_a_kill_left_without_its_export_gets_one(tiny_bert, epochs):
    """Whether nothing is left to train or more is; one too many goes, were it half there."""
    kept = ("--num_max_checkpoints", "2")
    fit(tiny_bert, *kept)
    epoch = Path("run/checkpoints/epoch-2")
    written = {path.name: path.read_bytes() for path in epoch.iterdir() if path.is_file()}
    shutil.rmtree(epoch)
    shutil.rmtree("run/checkpoints/epoch-1/1_Pooling")
    fit(tiny_bert, *kept, "--ckpt_path", "last", "--trainer.max_epochs", epochs)
    found = sorted(path.name for path in Path("run/checkpoints").glob("epoch-*"))
    assert found == (["epoch-1", "epoch-2"] if epochs == "2" else ["epoch-3", "epoch-4"])
    if epochs == "2":
        assert {name: (epoch / name).read_bytes() for name in written} == written


def test_such_a_fit_fails_if_its_model_cannot_be_exported(tiny_bert, monkeypatch, capsys):
    fit(tiny_bert)

    def fail(*args, **kwargs):
        raise ExportError("run/model: cannot be written: No space left on device")

    monkeypatch.setattr(export_model, "export_checkpoint", fail)
    with pytest.raises(SystemExit) as caught:
        fit(tiny_bert, "--ckpt_path", "last")
    assert caught.value.code == 1
    assert "run/model: cannot be written" in capsys.readouterr().err
    assert is_verified(Path("run/model"))
