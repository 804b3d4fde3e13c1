"""When a fit ends, and which model it leaves: steps, epochs, metrics, and what contradicts them."""

import csv
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from forks import Ranks

from embedtune.checkpoints import last_checkpoint, read_facts
from embedtune.cli import main
from embedtune.cli.best_checkpoint import keep_the_best
from embedtune.whole_files import hold

PAIRS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(8)]
SCORED = [{"query": f"a {i}", "pos": [f"b {i}"], "scores": [i / 4]} for i in range(5)]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train.jsonl", PAIRS), ("sts.jsonl", SCORED)):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def fit(model, *flags: str, root: str = "run") -> int:
    """Train with 4 batches an epoch; return how many steps were logged."""
    given = {
        "model.model_name_or_path": model,
        "data.train_path": "train.jsonl",
        "data.batch_size": 2,
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "save_on_epoch_end": False,
        "log_with": "csv",
    }
    main(["fit", *(f"--{name}={value}" for name, value in given.items()), *flags])
    with Path(root, "metrics.csv").open() as lines:
        return sum(bool(row["train/loss"]) for row in csv.DictReader(lines))


def error(capsys, model, *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        fit(model, *flags)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ((), 8),
        (("--trainer.max_steps=11",), 11),
        (("--trainer.max_steps=3",), 3),
        (("--trainer.max_steps=11", "--trainer.max_epochs=1"), 4),
        (("--trainer.max_epochs=3",), 12),
    ],
)
def test_an_asked_number_of_steps_is_trained(tiny_bert, flags, steps):
    assert fit(tiny_bert, *flags) == steps


@pytest.mark.parametrize(
    "flag",
    ["--trainer.max_epochs=0", "--trainer.max_steps=0", "--trainer.limit_train_batches=0"],
)
def test_a_fit_that_trains_nothing_is_no_success(tiny_bert, capsys, flag):
    assert "expected a step to train, found none" in error(capsys, tiny_bert, flag)
    assert not Path("run/model").exists()


def test_a_fit_may_have_a_time_alone_with_a_constant_rate(tiny_bert, capsys):
    flags = ("--trainer.max_epochs=-1", "--trainer.max_time={seconds: 3}")
    said = error(capsys, tiny_bert, *flags)
    assert "model.lr_schedule: cosine falls to zero at the last step" in said
    assert fit(tiny_bert, *flags, "--model.lr_schedule=constant") > 0
    assert Path("run/model/modules.json").is_file()


def take(folder: Path) -> None:
    """Hold a folder, as a fit does, and leave a child behind that lives on."""
    assert hold(folder)
    if os.fork() == 0:
        time.sleep(60)
    (folder / "taken").touch()
    time.sleep(60)


def test_a_run_folder_is_of_one_fit_at_a_time(tiny_bert, tmp_path, capsys):
    """A fit that is killed gives it back at once, though its loaders live for a while."""
    Path("run").mkdir()
    other = Ranks(take, Path("run").resolve(), folder=tmp_path)
    while not Path("run/taken").exists():
        time.sleep(0.05)
    assert "expected a folder of its own, found a fit running in run" in error(capsys, tiny_bert)
    assert os.listdir("run") == ["taken"]
    assert fit(tiny_bert, "--trainer.max_steps=1", root="own") == 1
    assert other.kill()
    other.wait()
    assert fit(tiny_bert, "--trainer.max_steps=1") == 1
    assert fit(tiny_bert, "--trainer.max_steps=1") == 1


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--trainer.limit_val_batches=0",), "would never be measured, by trainer.limit_val"),
        (("--trainer.check_val_every_n_epoch=3",), "by trainer.check_val_every_n_epoch 3 of 2"),
        (("--trainer.enable_checkpointing=false",), "trainer.enable_checkpointing false"),
    ],
)
def test_a_best_that_nobody_would_find_is_refused(tiny_bert, capsys, flags, found):
    monitored = ("--data.val_path=sts.jsonl", "--checkpoint.monitor=val/sts/spearman")
    assert found in error(capsys, tiny_bert, *monitored, *flags)


def test_overfitting_is_on_the_same_batches(tiny_bert):
    still = ("--model.lr=1e-12", "--model.dropout=0", "--trainer.precision=32-true")
    fit(tiny_bert, "--trainer.overfit_batches=2", "--trainer.max_epochs=4", *still)
    with Path("run/metrics.csv").open() as lines:
        losses = [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]
    assert losses[:2] * 4 == pytest.approx(losses, abs=1e-6)
    assert losses[0] != losses[1]


def test_a_monitored_fit_that_ends_before_it_is_measured_leaves_its_last_model(tiny_bert, caplog):
    monitored = ("--data.val_path=sts.jsonl", "--checkpoint.monitor=val/sts/spearman")
    with caplog.at_level("INFO", logger="embedtune"):
        fit(tiny_bert, *monitored, "--early_stopping_patience=2", "--trainer.max_steps=2")
    assert "the last step, 2: val/sts/spearman was not measured" in caplog.text
    assert "checkpoint.monitor makes it" not in caplog.text
    assert Path("run/model/modules.json").is_file()


def test_a_metric_that_is_measured_and_keeps_nothing_is_told_so(tiny_bert, caplog):
    monitored = ("--data.val_path=sts.jsonl", "--checkpoint.monitor=val/sts/spearman")
    with caplog.at_level("INFO", logger="embedtune"):
        fit(tiny_bert, *monitored, "--checkpoint.save_top_k=0", "--trainer.max_epochs=1")
    assert "the last step, 4: val/sts/spearman kept no checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [
        ("val/sts/spearman", None, "max"),
        ("val/sts/spearman", "min", "min"),
        ("val/pairs/loss", None, "min"),
        ("train/loss", "max", "max"),
    ],
)
def test_what_is_best_follows_from_the_metric_unless_given(tiny_bert, monitor, mode, expected):
    sets = "--data.val_path={sts: sts.jsonl, pairs: train.jsonl}"
    flags = () if mode is None else (f"--checkpoint.mode={mode}",)
    fit(tiny_bert, sets, f"--checkpoint.monitor={monitor}", "--trainer.max_steps=4", *flags)
    assert chooses(monitor, expected)


def chooses(monitor: str, mode: str) -> bool:
    """Tell whether the checkpoints of the last run are chosen so."""
    keepers = read_facts(last_checkpoint(Path("run/checkpoints")))["callbacks"]
    return any(f"{{'monitor': {monitor!r}, 'mode': {mode!r}," in keeper for keeper in keepers)


def callback(kind: str, **settings: object) -> list[str]:
    given = [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    return [f"--trainer.callbacks+=lightning.pytorch.callbacks.{kind}", *given]


BEST = ("--data.val_path=sts.jsonl", "--checkpoint.monitor=val/sts/spearman")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (callback("ModelCheckpoint"), "trainer.callbacks: expected one ModelCheckpoint of these"),
        ([*BEST, *callback("ModelCheckpoint", monitor="train/loss")], "{epoch}-{step} twice"),
        ([*BEST, "--checkpoint.filename={epoch}-{step}"], "{epoch}-{step} twice"),
        (callback("ModelCheckpoint", every_n_train_steps=2), "{epoch}-{step} twice"),
        (
            [
                *(*BEST, "--early_stopping_patience=3"),
                *callback("EarlyStopping", monitor="val/sts/spearman", mode="max"),
            ],
            "trainer.callbacks: expected one EarlyStopping of these settings",
        ),
    ],
)
def test_checkpoints_of_one_name_or_state_are_refused(tiny_bert, capsys, flags, said):
    assert said in error(capsys, tiny_bert, *flags)
    assert not list(Path().glob("run/checkpoints/*"))


def test_two_that_say_how_many_batches_accumulate_are_refused(tiny_bert, capsys):
    scheduled = callback("GradientAccumulationScheduler", scheduling='{"0": 2}')
    assert fit(tiny_bert, *scheduled) == 4
    said = error(capsys, tiny_bert, *scheduled, "--trainer.accumulate_grad_batches=2")
    assert "trainer.accumulate_grad_batches: expected 1 beside a Gradient" in said


def test_the_model_is_the_best_by_the_configuration_whatever_else_is_kept(tiny_bert, caplog):
    all_steps = callback("ModelCheckpoint", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    worst = callback("ModelCheckpoint", monitor="train/loss", mode="max", filename="worst")
    fit(tiny_bert, *BEST, *all_steps, *worst)
    assert "the best by val/sts/spearman" in caplog.text
    kept = {path.name for path in Path("run/checkpoints").glob("step=*.ckpt")}
    assert kept == {f"step={step}.ckpt" for step in range(1, 9)}


def test_a_progress_bar_of_ones_own_takes_the_place_of_ours(tiny_bert):
    assert fit(tiny_bert, *callback("RichProgressBar"), "--trainer.enable_progress_bar=true") == 8


def test_a_single_callback_needs_no_list(tiny_bert):
    """As Lightning's own Trainer takes one."""
    own = "--trainer.callbacks=lightning.pytorch.callbacks.LearningRateMonitor"
    assert fit(tiny_bert, own) == 8


def test_a_saved_configuration_decides_nothing_that_follows_from_its_keys(tiny_bert):
    """What followed from them is no value of theirs: with another metric the most is best."""
    fit(tiny_bert, "--data.val_path=sts.jsonl")
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    keys = ("mode", "filename", "save_on_train_epoch_end")
    assert {key: saved["checkpoint"][key] for key in keys} == dict.fromkeys(keys)
    assert saved["trainer"]["max_epochs"] is None
    other = ("--checkpoint.monitor=val/sts/spearman", "--trainer.max_steps=9")  # of 4 an epoch
    main(["fit", "--config=run/config.yaml", *other])
    assert chooses("val/sts/spearman", "max")
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == 9


def test_a_run_folder_may_move_and_be_seen_from_elsewhere(tiny_bert, tmp_path, monkeypatch):
    monitored = ("--data.val_path=sts.jsonl", "--checkpoint.monitor=val/sts/spearman")
    fit(tiny_bert, *monitored, "--trainer.max_epochs=1", "--model.lr=1e-5")
    before = read_facts(last_checkpoint(Path("run/checkpoints")))["callbacks"]
    shutil.move("run", "moved")
    fit(tiny_bert, *monitored, "--trainer.max_epochs=2", "--ckpt_path=last", root="moved")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for name in ("train.jsonl", "sts.jsonl"):
        Path(name).symlink_to(tmp_path / name)
    root = str(tmp_path / "moved")
    fit(tiny_bert, *monitored, "--trainer.max_epochs=3", "--ckpt_path=last", root=root)
    after = read_facts(last_checkpoint(tmp_path / "moved" / "checkpoints"))["callbacks"]
    key = next(key for key, state in before.items() if state.get("monitor"))
    scores = [states[key]["best_model_score"] for states in (before, after)]
    assert scores[1] >= scores[0]
    best = Path(after[key]["best_model_path"])
    assert best.is_file()
    assert best.parent == tmp_path / "moved" / "checkpoints"


def test_a_checkpoint_of_another_folder_brings_no_best_of_its_own(tiny_bert, caplog):
    monitored = ("--data.val_path=sts.jsonl", "--checkpoint.monitor=val/sts/spearman")
    fit(tiny_bert, *monitored, "--trainer.max_epochs=1")
    last = "--ckpt_path=run/checkpoints/last.ckpt"
    fit(tiny_bert, *monitored, "--trainer.max_epochs=2", last, root="second")
    (state, *_) = [
        state
        for state in read_facts(last_checkpoint(Path("second/checkpoints")))["callbacks"].values()
        if state.get("monitor")
    ]
    assert "second" in state["best_model_path"]
    assert Path("run/checkpoints/last.ckpt").exists()


def test_a_checkpoint_of_an_older_version_is_named(tiny_bert, capsys):
    fit(tiny_bert, "--trainer.max_epochs=1")
    path = last_checkpoint(Path("run/checkpoints"))
    old = torch.load(path, weights_only=True)
    del old["place"]
    torch.save(old, "old.ckpt")
    said = error(capsys, tiny_bert, "--ckpt_path=old.ckpt", "--trainer.max_epochs=2")
    assert "ckpt_path: expected a checkpoint that tells its place in the data" in said


def test_a_second_run_in_a_folder_keeps_its_files_apart(tiny_bert, caplog):
    epochs = ("--save_on_epoch_end=true",)
    fit(tiny_bert, *epochs, "--trainer.max_epochs=3")
    with caplog.at_level("WARNING", logger="embedtune"):
        fit(tiny_bert, *epochs, "--trainer.max_epochs=1")
    assert "run: an earlier run's checkpoints are now in run/checkpoints-1" in caplog.text
    now, before = (
        {path.name for path in Path("run", name).iterdir()}
        for name in ("checkpoints", "checkpoints-1")
    )
    assert {"epoch-1", "epoch-2", "epoch-3", "last.ckpt"} <= before
    assert "epoch-2" not in now
    fit(tiny_bert, *epochs, "--trainer.max_epochs=2", "--ckpt_path=last")  # the second run's
    assert not Path("run/checkpoints-2").exists()
    assert read_facts(last_checkpoint(Path("run/checkpoints")))["global_step"] == 8


def test_a_run_does_not_replace_its_own_base(tiny_bert, capsys):
    fit(tiny_bert, "--trainer.max_steps=1")
    before = Path("run/model/model.safetensors").read_bytes()
    said = error(capsys, "run/model", "--trainer.max_steps=1")
    assert "model.model_name_or_path: expected a model outside of what this run writes" in said
    assert Path("run/model/model.safetensors").read_bytes() == before
    fit("run/model", "--trainer.max_steps=1", root="second")


def test_an_interval_of_validation_beyond_an_epoch_is_named(tiny_bert, capsys):
    said = error(capsys, tiny_bert, "--data.val_path=sts.jsonl", "--trainer.val_check_interval=9")
    assert "trainer.val_check_interval: expected at most the 4 batches of an epoch, found 9" in said


def test_an_interval_of_validation_may_be_a_time(tiny_bert):
    every = "--trainer.val_check_interval=00:00:01:00"
    fit(tiny_bert, "--data.val_path=sts.jsonl", every, "--trainer.max_steps=2")


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/sts/spearman", "max"),
        ("val/dev/ndcg@10/128", "max"),
        ("val/train/loss", "min"),
        ("val/spearman/loss", "min"),  # of a set that is called so
        ("train/rank_hinge", "min"),
        ("val/own/distance", "min"),
    ],
)
def test_the_best_is_the_most_of_metrics_and_the_least_of_losses(monitor, mode):
    settings = {"monitor": monitor, "mode": None, "save_on_train_epoch_end": None, "filename": None}
    checkpoint = SimpleNamespace(**settings)
    keep_the_best(checkpoint)
    assert checkpoint.mode == mode


def refusals(other: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """Yield what is said where another model is given for a checkpoint's: to go on, to export."""
    for command in (
        lambda: fit(other, "--trainer.max_epochs=2", "--ckpt_path=last"),
        lambda: main(
            ["export", "run/checkpoints/last.ckpt", "exported", f"--model_name_or_path={other}"]
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            command()
        assert caught.value.code == 2
        yield capsys.readouterr().err


def test_another_base_model_is_not_gone_on_with(tiny_bert, tmp_path, capsys):
    """Whose weights would fit, and whose words are others."""
    fit(tiny_bert, "--trainer.max_epochs=1")
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    last, same = "run/checkpoints/last.ckpt", str(shutil.copytree(tiny_bert, tmp_path / "same"))
    main(["export", last, "exported", "--model_name_or_path", same])
    for told in refusals(other, capsys):
        assert "model_name_or_path: expected the base model of the checkpoint, found" in told


def test_a_run_goes_on_with_the_prompt_it_was_trained_with(tiny_bert):
    """Also where all texts were tokenised before the checkpoint brought it."""
    prompt = "--data.query_prompt=please look for: "
    fit(tiny_bert, prompt, "--trainer.max_epochs=1")
    for copy in ("same", "other"):
        shutil.copytree("run", copy)
    go_on = ("--ckpt_path=last", "--trainer.max_epochs=2")
    fit(tiny_bert, *go_on)
    fit(tiny_bert, *go_on, prompt, root="same")
    fit(tiny_bert, *go_on, "--data.query_prompt=", root="other")
    weights = {
        root: Path(root, "model/model.safetensors").read_bytes()
        for root in ("run", "same", "other")
    }
    assert weights["run"] == weights["same"] != weights["other"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--seed_everything=1", "the order of data.seed 666 and data.shuffle True, found 1 and T"),
        ("--data.shuffle=false", "the order of data.seed 666 and data.shuffle True, found 666 and"),
        ("--data.train_path=other.jsonl", "the same data, found other rows, or others in their"),
        (
            "--trainer.accumulate_grad_batches=2",
            "trainer.accumulate_grad_batches to divide the 3 b",
        ),
    ],
)
def test_the_middle_of_an_epoch_is_gone_on_with_in_its_order(tiny_bert, capsys, caplog, flag, said):
    fit(tiny_bert, "--trainer.max_epochs=1", "--checkpoint.every_n_train_steps=3")
    rows = "".join(json.dumps(row) + "\n" for row in reversed(PAIRS))
    Path("other.jsonl").write_text(rows)
    (within,) = Path("run/checkpoints").glob("*step=3.ckpt")
    told = error(capsys, tiny_bert, flag, f"--ckpt_path={within}")
    assert f"ckpt_path: it was saved in the middle of an epoch: expected {said}" in told
    fit(tiny_bert, "--trainer.max_epochs=1", root="ended")
    go_on = ("--ckpt_path=last", "--trainer.max_epochs=2")
    assert fit(tiny_bert, *go_on, flag, root="ended") in (4 + 2, 4 + 4)
    assert ("are others than those of the epochs before" in caplog.text) == ("other" in flag)


def test_a_checkpoint_of_another_model_is_one_line(tiny_bert, capsys):
    fit(tiny_bert, "--trainer.max_steps=1")
    mrl = ("--ckpt_path=last", "--trainer.max_steps=2", "--model.use_mrl=true")
    said = error(capsys, tiny_bert, *mrl, "--model.mrl_dims=16,8")
    assert "ckpt_path: expected the weights of this model: encoder.model." in said
    assert "found none; give model.model_name_or_path, model.use_mrl, model.mrl_dims" in said


def test_no_fit_goes_on_with_weights_alone(tiny_bert, capsys):
    fit(tiny_bert, "--trainer.max_steps=1", "--checkpoint.save_weights_only=true")
    said = error(capsys, tiny_bert, "--trainer.max_steps=2", "--ckpt_path=last")
    assert "ckpt_path: expected a checkpoint with the optimiser's states, found weights" in said


@pytest.mark.parametrize("shared", ["look for: ", None])
def test_texts_are_tokenised_once(tiny_bert, caplog, shared):
    """Also where the rows bring the prompt that becomes the model's own."""
    rows = [row | {"prompt": shared} for row in PAIRS]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", "embedtune"):
        fit(tiny_bert, "--trainer.max_epochs=1", f"--data.passage_max_len={29 if shared else 30}")
    assert caplog.text.count("tokenising") == 1


@pytest.mark.parametrize(
    ("file", "settings", "told"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "cls"}, "pooling_mode cls"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"document": "say: "}},
            "document prompt 'say: '",
        ),
    ],
)
def test_a_base_model_of_another_structure_is_refused(
    tiny_bert, tmp_path, capsys, file, settings, told
):
    """Whose weights would fit, and whose embeddings are others."""
    fit(tiny_bert, "--trainer.max_epochs=1")
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    known = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(known | settings))
    for said in refusals(other, capsys):
        assert "expected the base model of the checkpoint (Transformer, Pooling" in said
        assert told in said.partition("found another")[2]


def test_a_checkpoint_brings_its_pooling(tiny_bert):
    """Where no flag names one: of other embeddings were measured, predicted and exported."""
    fit(tiny_bert, "--trainer.max_epochs=1", "--model.pooling=cls")
    flags = ["--model.model_name_or_path", str(tiny_bert), "--data.val_path", "sts.jsonl"]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    found = []
    for given in ([], ["--model.pooling=cls"]):
        main(["validate", *flags, "--ckpt_path=run/checkpoints/last.ckpt", *given])
        found.append(json.loads(Path("run/metrics.json").read_text())["metrics"])
    assert found[0] == found[1]
    fit(tiny_bert, "--trainer.max_epochs=2", "--ckpt_path=last")
    pooling = json.loads(Path("run/model/1_Pooling/config.json").read_text())
    assert pooling["pooling_mode"] == "cls"
