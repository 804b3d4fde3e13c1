"""What a user or a machine does wrong is one line and exit code 2; a defect keeps its traceback."""

import errno
import json
import re
import resource
import threading
from pathlib import Path

import pytest
import torch

from embedtune.callbacks import export_model
from embedtune.callbacks.export_model import try_export
from embedtune.cli import dispatch, main
from embedtune.cli.config_files import refuse_broken_configs
from embedtune.cli.mistakes import surroundings_said, tell_of_threads
from embedtune.errors import InputError
from embedtune.losses import Loss


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"query": f"query {i}", "pos": [f"document {i}"]}) for i in range(4)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def said(capsys, *argv: str) -> str:
    """Run a command that must end with code 2; return its one line."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (message,) = re.findall(r"^embedtune: error: (.*)$", stderr, re.MULTILINE)
    return message


def fit(model: object) -> tuple[str, ...]:
    return (
        *("fit", "--model.model_name_or_path", str(model), "--data.train_path", "rows.jsonl"),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--log_with", "csv"),
        *("--trainer.enable_progress_bar", "false"),
    )


def test_nothing_is_compiled_on_a_cpu(tiny_bert, capsys):
    message = said(capsys, *fit(tiny_bert), "--model.compile", "true")
    assert message.startswith("model.compile: expected false on a CPU")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
@pytest.mark.parametrize("path", ["/dev/full", "no/such/folder"])
@pytest.mark.parametrize("size", [10, 10**6])  # that fails at its end, or before
def test_torch_writes_a_checkpoint_to_a_full_disk(path, size):
    with pytest.raises(RuntimeError) as caught:
        torch.save({"weight": torch.zeros(size)}, path)
    assert str(surroundings_said(caught.value)).startswith("a checkpoint cannot be written")
    assert surroundings_said(RuntimeError("size mismatch")) is None


# --- YAML -----------------------------------------------------------------------------------------

LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data:\n  train_path: caf\xe9.jsonl\n", "expected YAML in UTF-8, found invalid"),
        (bytes(range(256)), "expected YAML in UTF-8"),
        ("data: {batch_size: 1}".encode("utf-16"), "expected YAML in UTF-8"),
        (b"data: [1, {\n x", r"expected YAML: .*line 2"),
        (b"data:\n\ttrain_path: x\n", r"expected YAML: .*line 2, column 1"),
        (b"data: a\0b\n", "expected YAML: .*#x0000"),
        (b"data: !!python/object:os.system x\n", "expected YAML: .*constructor for the tag"),
        (b"data: *nowhere\n", "expected YAML: .*undefined alias"),
        (b"[" * 5000, "nested too deep"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "nested too deep"),
        (b"data: &data\n  train_path: *data\n", "within themselves"),
        (b"data: &data [*data]\n", "within themselves"),
        (f"a0: &a0 [1]\n{LAUGHS}".encode(), r"found aliases of \d{9} values"),
        (b"data:\n  batch_size: " + b"9" * 5000, "expected YAML: .*4300 digits"),
        (b"data:\n  train_path: 2024-99-99\n", "expected YAML: .*month"),
        (b"[1, 2]\n", "expected keys and their values, found a list"),
        (b"hello\n", "expected keys and their values, found a str"),
        (b"", "found an empty file"),
        (b"# nothing but a comment\n", "found an empty file"),
        (b"trainer:\n  # max_steps: 1\ndata: {}\n", "trainer: expected keys .*, found nothing"),
        (b"checkpoint: [1]\n", "checkpoint: expected keys and their values, found a list"),
    ],
)
def test_broken_yaml_is_named(content, message):
    Path("run.yaml").write_bytes(content)
    for args in (["--config", "run.yaml"], ["--config=run.yaml"], ["-c", "run.yaml"]):
        with pytest.raises(InputError, match=rf"^run\.yaml: .*{message}") as caught:
            refuse_broken_configs(["fit", *args, "--seed_everything", "1"])
        assert "\n" not in str(caught.value)


def test_other_yaml_is_left_to_the_parser():
    Path("run.yaml").write_text("data: &data {batch_size: 2}\nmodel: *data\n3: null\n")
    refuse_broken_configs(["fit", "--config", "run.yaml", "--config", "none.yaml", "-c", "a: 1\n"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {}\ndata: {}\nmodel: {lr: 1}\n", "found the key model of line 1 again in line 3"),
        (
            "data:\n  batch_size: 1\n  'batch_size': 2",
            "the key batch_size of line 2 again in line 3",
        ),
        ("trainer: {callbacks: [{a: 1, a: 2}]}", "found the key a of line 1 again in line 1"),
        (
            "data.batch_size: 1\ndata: {batch_size: 2}",
            "each key once, found data.batch_size dotted",
        ),
        ("data: {seed: 3}", "expected seed_everything, .* found data.seed"),
        ("data.seed: 3", "expected seed_everything, .* found data.seed"),
        ("fit: {data: {seed: null}}", "expected seed_everything, .* found fit.data.seed"),
    ],
)
def test_a_key_that_would_be_ignored_is_named(content, message):
    Path("run.yaml").write_text(content)
    for args, place in (["--config", "run.yaml"], "run.yaml"), (["-c", content], "--config"):
        with pytest.raises(InputError, match=f"^{place}: .*{message}"):
            refuse_broken_configs(["fit", *args])


@pytest.mark.parametrize("form", ["-c{}", "-c={}", "--data {}", "--data={}"])
def test_no_form_of_a_flag_passes_by(form):
    Path("run.yaml").write_bytes(b"lr: caf\xe9")
    with pytest.raises(InputError, match=r"^run\.yaml: expected YAML in UTF-8"):
        refuse_broken_configs(["fit", *form.format("run.yaml").split()])


def test_so_is_one_of_a_file_of_its_own():
    Path("sub").mkdir()
    Path("sub/data.yaml").write_text("seed: 3")
    Path("sub/run.yaml").write_text("data: data.yaml")
    for args in ("--config=sub/run.yaml", "--data=sub/data.yaml"):
        with pytest.raises(InputError, match=r"^sub/data\.yaml: .* found data\.seed"):
            refuse_broken_configs([args])
    with pytest.raises(InputError, match=r"^--data: .* found data\.seed"):
        refuse_broken_configs(["--data", "{seed: 3}"])


def test_keys_are_merged_and_repeated_elsewhere():
    base = "a: {b: &a {<<: *base, lr: 2}}\nmodel: {<<: *a, lr: 3}\n"
    Path("run.yaml").write_text(f"base: &base {{lr: 1, seed: 2}}\n{base}data: {{<<: *a, lr: 4}}\n")
    with pytest.raises(InputError, match=r"found data\.seed"):  # it is merged
        refuse_broken_configs(["--config=run.yaml"])
    Path("run.yaml").write_text(f"base: &base {{lr: 1}}\n{base}")
    refuse_broken_configs(["--config=run.yaml", "--config=run.yaml"])


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (("fit", "--conf", "rows.jsonl"), "config"),
        (("fit", "--trainer.max_step", "3"), "trainer.max_steps"),
        (("fit", "--data.sed", "3"), "data.shuffle"),  # data.seed has no flag
        (("export", "last.ckpt", "out", "--trust_remote", "true"), "trust_remote_code"),
    ],
)
def test_a_part_of_a_key_is_none(capsys, argv, nearest):
    found = " ".join(argv[-2:])
    message = f"unrecognized arguments: {found}; the nearest valid key is {nearest}"
    assert said(capsys, *argv) == message


def test_broken_yaml_is_one_line(capsys):
    Path("run.yaml").write_text("data: &data [*data]\n")
    assert said(capsys, "fit", "--config", "run.yaml").startswith("run.yaml: expected YAML")


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("trainer.limit_train_batches", ".nan", "trainer: .*nan for limit_train_batches"),
        ("trainer.limit_train_batches", "1.5", "trainer: .*1.5 for limit_train_batches"),
        ("trainer.overfit_batches", "-.inf", "trainer: .*-inf for overfit_batches"),
        ("trainer.overfit_batches", "-3", "trainer: .*-3 for overfit_batches"),
        ("trainer.val_check_interval", ".nan", "trainer.val_check_interval: .*found nan"),
        ("trainer.accumulate_grad_batches", "0", "trainer.accumulate_grad_batches: .*found 0"),
        ("trainer.check_val_every_n_epoch", "0", "trainer.check_val_every_n_epoch: .*found 0"),
        ("trainer.gradient_clip_val", ".nan", "trainer.gradient_clip_val: .*found nan"),
        ("trainer.gradient_clip_val", "-1", "trainer.gradient_clip_val: .*found -1"),
        ("trainer.gradient_clip_algorithm", "half", "trainer: .*half is invalid"),
        ("trainer.accelerator", "gpuu", "trainer: .*gpuu"),
        pytest.param(
            *("trainer.accelerator", "gpu", "trainer: No supported gpu"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("trainer.devices", "0", "trainer: .*devices"),
        ("trainer.devices", "-5", "trainer: .*devices"),
        ("trainer.devices", "many", "trainer: .*devices"),
        ("trainer.num_nodes", "0", "trainer: .*num_nodes"),
        ("trainer.max_epochs", "-5", "trainer: .*max_epochs"),
        ("trainer.max_time", "soon", "trainer: .*soon"),
        ("trainer.default_root_dir", "/dev/null", "trainer.default_root_dir: .*/dev/null"),
        ("trainer.default_root_dir", "loop", "trainer.default_root_dir: .*the link loop, which"),
        ("trainer.default_root_dir", "loop/a", "trainer.default_root_dir: .*the link .*/loop, "),
        ("data.val_path", "{a: {b: beir}}", "data.val_path: a: expected a path or .*'b': 'beir'"),
        ("trainer.default_root_dir", "null", "trainer.default_root_dir: .*found null"),
        ("trainer.default_root_dir", "file:///a", "trainer.default_root_dir: .*URL file:///a"),
        ("checkpoint.dirpath", "rows.jsonl", "checkpoint.dirpath: .*the file rows.jsonl"),
        ("checkpoint.filename", "{epoch", "checkpoint.filename: .*'{epoch': expected '}'"),
        ("checkpoint.filename", "{0}", "checkpoint.filename: .*'{0}'"),
        ("checkpoint.filename", "{val/a:d}", "checkpoint.filename: .*format code 'd'"),
        ("checkpoint.filename", "/a/{epoch}", "checkpoint.filename: .*the path '/a/{epoch}'"),
        ("checkpoint.filename", "../a", "checkpoint.filename: .*the path '../a'"),
        ("trainer.val_check_interval", "0", "trainer.val_check_interval: .*found 0"),
        ("trainer.val_check_interval", "0.0", "trainer.val_check_interval: .*found 0.0"),
        ("trainer.val_check_interval", "-1", "trainer.val_check_interval: .*found -1"),
        ("trainer.limit_val_batches", "-1", "trainer: .*-1(.0)? for limit_val_batches"),
        ("trainer.log_every_n_steps", "-1", "trainer.log_every_n_steps: .*found -1"),
        ("trainer.min_epochs", "-1", "trainer.min_epochs: .*found -1"),
        ("ckpt_path", "best", "ckpt_path: best: .*checkpoint.monitor has kept in .*, found none"),
        ("ckpt_path", "registry", "ckpt_path: .*found nothing at registry"),
        ("ckpt_path", "rows.jsonl", "ckpt_path: rows.jsonl: .*that torch has not saved"),
        ("ckpt_path", ".", r"ckpt_path: \.: .*foreign folder"),
        ("num_max_checkpoints", "0", "num_max_checkpoints: .*found 0"),
        ("seed_everything", "-1", "seed_everything: .*found -1"),
        ("seed_everything", "4294967296", "seed_everything: .*found 4294967296"),
        ("checkpoint.save_top_k", "-5", ".*save_top_k=-5"),
        (
            "trainer.callbacks",
            '[{"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -5}}]',
            "Invalid value for save_top_k=-5",
        ),
        ("data.num_workers", "-1", "data.num_workers: .*found -1"),
        ("trainer.barebones", "true", "trainer.barebones: expected false"),
        ("trainer.plugins+", "AsyncCheckpointIO", "trainer.plugins: .*found AsyncCheckpointIO"),
        ("model", "my.Own", "--model: expected a YAML file, .*'my.Own'; a class .* from Python"),
        ("data", "nope.yaml", "--data: expected a YAML file, or keys .*, found 'nope.yaml'"),
        ("model", "{class_path: my.Own}", "--model: .* found model.class_path; .* from Python"),
        ("model.class_path", "my.Own", ".* found --model.class_path; .* from Python"),
        ("data.train_path", "a\0b", r"data\.train_path: .*a\\x00b"),
        ("data.train_path", "x" * 5000, "x+: File name too long"),
    ],
)
def test_a_value_that_does_not_do_is_one_line(tiny_bert, capsys, flag, value, message):
    Path("loop").symlink_to("loop")
    assert re.match(message, said(capsys, *fit(tiny_bert), f"--{flag}={value}"))


# --- The machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        *("model.weight_decay", "model.use_mrl", "data.batch_size", "data.shuffle"),
        *("rank_timeout", "skip_nonfinite", "num_max_checkpoints", "save_on_epoch_end"),
        *("trainer.max_steps", "trainer.accumulate_grad_batches", "trainer.detect_anomaly"),
        *("trainer.overfit_batches", "trainer.strategy", "checkpoint.save_top_k"),
    ],
)
def test_a_null_where_a_value_is_needed_is_one_line(tiny_bert, capsys, key):
    Path("null.yaml").write_text(f"log_with: csv\n{key}:\n")
    message = said(capsys, *fit(tiny_bert), "--config", "null.yaml")
    assert re.match(rf"{key}: expected .*, found null$", message), message


class Own(Loss):
    """A loss that takes null without saying so."""

    def __init__(self, margin=0.1):
        super().__init__()
        raise InputError(f"model.loss: expected another, found {margin}")


def test_so_is_one_among_the_arguments_of_a_loss(tiny_bert, capsys):
    info_nce = {"class_path": "InfoNCE", "init_args": {"temperature": None}}
    wrapped = {"class_path": "Matryoshka", "init_args": {"loss": info_nce, "dims": [8]}}
    own = {"class_path": f"{__name__}.Own", "init_args": {"margin": None}}
    expected = "expected a value such as 0.05, found null"
    for loss, message in (
        (info_nce, f"model.loss.init_args.temperature: {expected}"),
        (wrapped, f"model.loss.init_args.loss.init_args.temperature: {expected}"),
        (own, "model.loss: expected another, found None"),
    ):
        assert said(capsys, *fit(tiny_bert), "--model.loss", json.dumps(loss)) == message


@pytest.fixture
def _full_disk():
    """Let no file be as large as weights: a process learns of it as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def _disk_that_fills(monkeypatch):
    """Let the disk be full from the first step on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def try_and_fill(*args):
        try_export(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    monkeypatch.setattr(export_model, "try_export", try_and_fill)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_full_disk")
def test_a_disk_that_is_full_is_told_before_the_first_step(tiny_bert, capsys):
    with pytest.raises(SystemExit) as caught:
        main(fit(tiny_bert))
    stderr = capsys.readouterr().err
    assert (caught.value.code, "Traceback" in stderr) == (1, False)
    assert "embedtune: error: run/export-trial: cannot be written: File too large" in stderr
    assert [path for path in Path("run").iterdir() if path.is_dir()] in ([], [Path("run/logs")])


@pytest.mark.usefixtures("_disk_that_fills")
def test_a_full_disk_is_one_line_that_names_the_checkpoint(tiny_bert, capsys):
    message = said(capsys, *fit(tiny_bert), "--save_on_epoch_end", "false")
    assert re.fullmatch(r"run/checkpoints/epoch=0-step=1\.ckpt: File too large", message)
    assert not list(Path("run/checkpoints").glob("*.ckpt"))


@pytest.mark.usefixtures("_disk_that_fills")
def test_a_full_disk_is_one_line_for_each_export(tiny_bert, capsys, caplog):
    with pytest.raises(SystemExit) as caught:
        main([*fit(tiny_bert), "--trainer.enable_checkpointing", "false"])
    stderr = capsys.readouterr().err
    assert (caught.value.code, "Traceback" in stderr) == (1, False)
    assert "embedtune: error: run/model: cannot be written: File too large" in stderr
    epoch = "run/checkpoints/epoch-1"
    assert f"epoch 1 is not exported: {epoch}: cannot be written: File too large" in caplog.text
    assert not Path("run/model").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tiny_bert, capsys):
    teach = ("teach", "--model", str(tiny_bert), "--data", "rows.jsonl")
    message = said(capsys, *teach, "--out", "rows.jsonl/store")
    expected = "rows.jsonl/store: expected a folder to write to, found the file"
    assert message == f"{expected} {Path('rows.jsonl').absolute()}"
    Path("link").symlink_to("nowhere")
    evaluate = ("evaluate", "no_model", "--data", "no_data", "--out", "link")  # before all else
    assert "found the link link, which leads nowhere" in said(capsys, *evaluate)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "x", "run"), "run: Read-only file system"),
        (PermissionError(errno.EACCES, "x", "a\nb"), r"a\\nb: Permission denied"),
        (PermissionError(errno.EACCES, "x", b"run/caf\xc3\xa9"), "run/café: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "x", "run"), "run: Is a directory"),
    ],
)
def test_an_error_of_the_machine_is_one_line(monkeypatch, capsys, error, message):
    monkeypatch.setattr(dispatch, "import_module", lambda name: raises(error))
    assert re.fullmatch(message, said(capsys, "fit"))


def test_an_error_of_the_machine_in_a_thread_is_one_line(monkeypatch, caplog, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    tell_of_threads()
    for error in (OSError(errno.ENOSPC, "x", "run/events"), ValueError("a defect")):
        thread = threading.Thread(target=raises, args=(error,))
        thread.start()
        thread.join()
    assert [record.getMessage() for record in caplog.records] == [
        "run/events: No space left on device"
    ]
    stderr = capsys.readouterr().err
    assert stderr.count("Traceback") == 1
    assert "ValueError: a defect" in stderr


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        OSError("of no number"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        RuntimeError("a defect"),
        ValueError("a defect"),
        KeyError(28),
    ],
)
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(dispatch, "import_module", lambda name: raises(error))
    with pytest.raises(type(error)) as caught:
        main(["fit"])
    assert caught.value is error
    assert surroundings_said(error) is None


def raises(error: Exception) -> None:
    raise error
