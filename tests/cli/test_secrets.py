"""A run uses its secrets, and what it leaves holds none of them."""

import json
from pathlib import Path

import pytest
import yaml

from embedtune.cli import main
from embedtune.secrets import is_secret, withheld_keys, withhold

SERVICE = """
from pathlib import Path
from lightning.pytorch.loggers import CSVLogger
from embedtune.losses import InfoNCE


class Service(CSVLogger):
    def __init__(self, save_dir: str, url: str, options: dict):
        super().__init__(save_dir, name="", version="")
        Path("received.txt").write_text(f"{url} {options}")


class Judged(InfoNCE):
    def __init__(self, judge_token: str, temperature: float = 0.02):
        super().__init__(temperature)
        self.judge_token = judge_token
"""
SECRETS = ("s3cr3t-key", "s3cr3t-user:s3cr3t-word", "s3cr3t-sig", "s3cr3t-nested", "s3cr3t-judge")
CONFIG = {
    "data": {"train_path": "train.jsonl", "batch_size": 4},
    "model": {
        "loss": {"class_path": "service.Judged", "init_args": {"judge_token": "s3cr3t-judge"}}
    },
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "logger": {
            "class_path": "service.Service",
            "init_args": {
                "save_dir": "run",
                "url": "https://s3cr3t-user:s3cr3t-word@host/log?project=p&token=s3cr3t-sig",
                "options": {
                    "api_key": "s3cr3t-key",
                    "credentials": {"client": {"id": "s3cr3t-nested"}},
                    "tokens_per_chunk": 7,
                },
            },
        },
    },
    "save_on_epoch_end": False,
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("service.py").write_text(SERVICE)
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(12)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_uses_its_secrets_and_leaves_none(tiny_bert, capsys):
    config = CONFIG | {"model": CONFIG["model"] | {"model_name_or_path": str(tiny_bert)}}
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "mine.yaml"])
    received = Path("received.txt").read_text()
    assert all(secret in received for secret in SECRETS[:-1])
    written = [path for path in Path("run").rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "README.md"} <= {path.name for path in written}
    for path in written:
        assert b"s3cr3t" not in path.read_bytes(), path
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    options = saved["trainer"]["logger"]["init_args"]["options"]
    assert options["tokens_per_chunk"] == 7

    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "run/config.yaml", "--ckpt_path", "last"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "error: trainer.logger.init_args.url: expected a value, found (withheld)" in said
    again = {"model": config["model"], "trainer": config["trainer"] | {"max_steps": 3}}
    Path("again.yaml").write_text(yaml.safe_dump(again))
    flags = ("--config", "run/config.yaml", "--config", "again.yaml", "--ckpt_path", "last")
    main(["fit", *flags])
    assert all(secret in Path("received.txt").read_text() for secret in SECRETS[:-1])


def test_a_configuration_without_secrets_is_kept_as_it_is(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert withhold(config) == config
    assert list(withheld_keys(config)) == []


@pytest.mark.parametrize("key", ["wandb_api_key", "HF_TOKEN", "accessToken", "x-auth", "AWSSecret"])
def test_a_name_says_that_it_is_a_secret(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key", ["mask_token", "num_tokens", "key", "keys", "monitor", "author", "compass", "tokenizer"]
)
def test_or_that_it_is_none(key):
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [{"password": 7}, {"b": 7}]}, {"a": [{"password": "(withheld)"}, {"b": 7}]}),
        ({"token": None, "secret": "", "auth": True}, {"token": None, "secret": "", "auth": True}),
        ("s3://id:key@bucket/rows.jsonl", "s3://(withheld)@bucket/rows.jsonl"),
        ("https://me:p@ss@host/a@b", "https://(withheld)@host/a@b"),
        ("https://h/a?sp=r&sig=k", "https://h/a?sp=r&sig=(withheld)"),
        ("https://h/a?X-Amz-Signature=k", "https://h/a?X-Amz-Signature=(withheld)"),
        ("https://host/a?x=1&api_key=k#f", "https://host/a?x=1&api_key=(withheld)#f"),
        ("me@host: no://address", "me@host: no://address"),
        ("rows.jsonl", "rows.jsonl"),
    ],
)
def test_values_are_withheld_in_any_nesting(value, expected):
    assert withhold(value) == expected
