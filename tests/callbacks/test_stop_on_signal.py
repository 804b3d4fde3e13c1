"""A fit that is told to stop finishes its step, saves, and says how to go on."""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import pytest
from forks import Ranks, embedtune
from lightning.pytorch.callbacks import ModelCheckpoint
from told_losses import Told, told

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.callbacks.end_on_signal import EndOnSignal
from embedtune.callbacks.stop_on_signal import SIGNALS, StopOnSignal
from embedtune.checkpoints import last_checkpoint, read_facts
from embedtune.cli import main
from embedtune.losses import InfoNCE
from embedtune.reports.curves import read_curves

ROWS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(24)]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def flags(model, root: str, *more: str) -> list[str]:
    """Return those of a fit of 12 steps, 6 an epoch."""
    given = {
        "model.model_name_or_path": model,
        "data.train_path": "train.jsonl",
        "data.batch_size": 4,
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": False,
        "log_with": "csv",
    }
    return ["fit", *(f"--{name}={value}" for name, value in given.items()), *more]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_the_step_is_finished_and_saved_and_the_run_goes_on(tiny_bert, caplog, number, code):
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        main(flags(tiny_bert, "run", *told(4, number)))
    assert caught.value.code == code
    name = signal.Signals(number).name
    saved = "run/checkpoints/last.ckpt"
    assert (
        f"{name}: stopped after step 5: saved {saved}; go on with --ckpt_path last" in caplog.text
    )
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == 5
    assert signal.getsignal(number) == handler
    assert not Path("run/model").exists()
    same = f"--model.temperature={InfoNCE().temperature}"
    main(flags(tiny_bert, "run", "--ckpt_path=last", same))
    main(flags(tiny_bert, "whole", same))
    stopped, whole = (Path(root, "model/model.safetensors") for root in ("run", "whole"))
    assert stopped.read_bytes() == whole.read_bytes()
    curves = [read_curves(Path(root)) for root in ("run", "whole")]
    assert all(curves[0][name] == curves[1][name] for name in ("train/loss", "train/lr"))


def test_before_the_time_of_a_slurm_job_ends_it_is_the_same(tiny_bert, caplog, monkeypatch):
    """Lightning would save within the signal, in the middle of the step."""
    names = ("JOB_ID", "NTASKS", "NTASKS_PER_NODE", "NNODES")
    given = {f"SLURM_{name}": "1" for name in names} | {"SLURM_JOB_NAME": "fit"}
    for name, value in (given | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main(flags(tiny_bert, "run", *told(4, signal.SIGUSR1)))
    assert caught.value.code == 138
    assert "SIGUSR1: stopped after step 5: saved run/checkpoints/last.ckpt" in caplog.text
    assert not list(Path().rglob("hpc*"))
    main(flags(tiny_bert, "run", "--ckpt_path=last"))
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == 12


def test_what_last_is_a_link_to_is_not_written_over(tiny_bert):
    """Where nobody brings our way of writing checkpoints."""
    data = EmbeddingDataModule("train.jsonl", batch_size=4)
    module = EmbeddingModule(str(tiny_bert), loss=Told(4, signal.SIGTERM))
    keeper = ModelCheckpoint("kept", save_last="link", every_n_train_steps=3)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[keeper, StopOnSignal()],
    )
    with pytest.raises(SystemExit):
        trainer.fit(module, data)
    kept = {path.name: read_facts(path)["global_step"] for path in Path("kept").iterdir()}
    assert kept == {"epoch=0-step=3.ckpt": 3, "last.ckpt": 5}


def test_a_thread_takes_no_signals(tiny_bert):
    """As where a server or a notebook runs a fit beside itself."""
    data = EmbeddingDataModule("train.jsonl", val_path="train.jsonl", batch_size=4)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[StopOnSignal(), EndOnSignal()],
    )
    with ThreadPoolExecutor() as threads:
        module = EmbeddingModule(str(tiny_bert))
        threads.submit(trainer.fit, module, data).result()
        assert trainer.global_step == 6
        assert threads.submit(trainer.validate, module, data).result()


def test_a_signal_in_the_last_step_of_an_epoch_costs_no_exported_folder(tiny_bert):
    with pytest.raises(SystemExit):
        main(flags(tiny_bert, "run", *told(5, signal.SIGTERM)))
    assert not Path("run/checkpoints/epoch-1").exists()
    main(flags(tiny_bert, "run", "--ckpt_path=last"))
    for number in (1, 2):
        folder = Path(f"run/checkpoints/epoch-{number}")
        assert f"after step {6 * number}, in epoch {number}" in (folder / "README.md").read_text()
    weights = "model.safetensors"
    last = Path("run/checkpoints/epoch-2", weights).read_bytes()
    assert last == Path("run/model", weights).read_bytes()
    assert last != Path("run/checkpoints/epoch-1", weights).read_bytes()


@pytest.mark.parametrize("end", ["--trainer.max_epochs=2", "--trainer.max_steps=12"])
def test_in_the_last_step_of_all_it_stops_nothing(tiny_bert, caplog, end):
    """A run that goes on would train nothing, and never measure what may be the best."""
    validated = ("--data.val_path=train.jsonl", "--checkpoint.monitor=val/train/loss", end)
    main(flags(tiny_bert, "run", *told(11, signal.SIGTERM), *validated))
    said = r"SIGTERM: step 12 was the last: saved \S*run/checkpoints/last.ckpt; the fit ends as"
    assert re.search(said, caplog.text)
    assert list(read_curves(Path("run"))["val/train/loss"]) == [0, 6, 12]
    assert "model of step 12, the best by val/train/loss" in caplog.text
    assert Path("run/model/README.md").exists()


def test_without_checkpoints_nothing_is_said_to_be_saved(tiny_bert, caplog):
    no = "--trainer.enable_checkpointing=false"
    with pytest.raises(SystemExit):
        main(flags(tiny_bert, "run", *told(1, signal.SIGTERM), no))
    assert "SIGTERM: stopped after step 2: nothing is saved" in caplog.text


def run(model, *more: str, ranks: int = 1) -> tuple[set[int | None], str]:
    """Return the exit codes of processes of their own, and what they have written."""
    started = Ranks(embedtune, flags(model, "run", *more), folder=Path.cwd(), ranks=ranks)
    return set(started.wait()), started.output()


def test_a_second_signal_ends_it_at_once(tiny_bert):
    codes, output = run(tiny_bert, *told(1, signal.SIGTERM, times=2))
    assert codes == {-signal.SIGTERM}
    assert "stopped after" not in output
    assert not Path("run/checkpoints/last.ckpt").exists()


def test_so_does_one_after_one_in_the_last_step(tiny_bert):
    """To whichever rank."""
    codes, output = run(tiny_bert, *told(11, signal.SIGTERM, times=2))
    assert codes == {-signal.SIGTERM}, output


def test_a_signal_to_one_rank_stops_all(tiny_bert):
    two = ("--trainer.devices=2", "--data.batch_size=2")
    codes, output = run(tiny_bert, *told(2, signal.SIGTERM, rank=1), *two, ranks=2)
    assert codes == {143}, output
    assert output.count("SIGTERM: stopped after step 3: saved") == 1
    assert "Traceback" not in output
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == 3


def test_the_signals_are_given_back_in_python(tiny_bert):
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[StopOnSignal()],
    )
    trainer.fit(EmbeddingModule(str(tiny_bert)), EmbeddingDataModule("train.jsonl"))
    assert {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS} == before


@pytest.mark.parametrize("kept", [-1, 1])
def test_a_checkpoint_that_was_due_is_kept_as_ever(tiny_bert, kept):
    often = ("--checkpoint.every_n_train_steps=2", f"--checkpoint.save_top_k={kept}")
    with pytest.raises(SystemExit):
        main(flags(tiny_bert, "run", *told(3, signal.SIGTERM), *often))
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == 4
    main(flags(tiny_bert, "run", "--ckpt_path=last", *often))
    main(flags(tiny_bert, "whole", *often))
    names = [
        sorted(path.name for path in Path(root, "checkpoints").glob("*.ckpt"))
        for root in ("run", "whole")
    ]
    assert names[0] == names[1]
    assert len(names[0]) == (7 if kept == -1 else 2)
