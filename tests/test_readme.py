"""What the README says about keys, files and Python is true."""

import inspect
import json
import re
from pathlib import Path

import pytest
from testset_files import write_plain_beir

from embedtune import EmbeddingDataModule, EmbeddingModule, losses
from embedtune.cli import main
from embedtune.cli.dispatch import TOOL_COMMANDS, TRAINER_COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_block(marker: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (found,) = (block for block in blocks if marker in block)
    return found


def write_rows() -> None:
    """Write the quick start's rows to train.jsonl."""
    Path("train.jsonl").write_text(re.search(r"<<'ROWS'\n(.*?)ROWS", README, re.DOTALL)[1])


@pytest.mark.parametrize(
    ("section", "kind"), [("model", EmbeddingModule), ("data", EmbeddingDataModule)]
)
def test_every_parameter_is_in_the_table(section, kind):
    parameters = set(inspect.signature(kind).parameters) - {"seed"}  # linked to seed_everything
    named = set(re.findall(rf"`{section}\.(\w+)`", README))
    named |= set(re.findall(r"`(\w+_teacher_path)`", README))
    assert parameters <= named
    table = {
        name
        for row in README.splitlines()
        if row.startswith(f"| `{section}.")
        for name in re.findall(rf"`{section}\.(\w+)`", row.split("|")[1])
    }
    assert table <= parameters


def test_the_defaults_in_the_table_are_those_of_the_code():
    for section, kind in (("model", EmbeddingModule), ("data", EmbeddingDataModule)):
        for name, parameter in inspect.signature(kind).parameters.items():
            row = re.search(rf"^\| `{section}\.{name}` \| (.*?) \|", README, re.MULTILINE)
            value = parameter.default
            if row and isinstance(value, bool | int | float):
                shown = row[1].strip("`")
                assert shown in (str(value), str(value).lower(), f"{value:g}".replace("e-0", "e-"))


def test_every_command_and_loss_is_described():
    for command in (*TRAINER_COMMANDS, *TOOL_COMMANDS):
        assert re.search(rf"`(embedtune )?{command}\b", README), command
    for name, kind in vars(losses).items():
        is_loss = inspect.isclass(kind) and issubclass(kind, losses.Loss)
        if is_loss and name not in ("Loss", "Matryoshka"):
            assert f"`embedtune.losses.{name}`" in README


def test_files_that_are_named_exist():
    for path in re.findall(r"\]\(((?:src|docs|configs)/[^)#]+)\)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / path).is_file(), path


def test_the_readmes_sets_are_measured(tiny_bert, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_rows()
    write_plain_beir(Path("data/search"))
    rows = [{"query": f"a {i}", "pos": [f"b {i}"], "scores": [i / 4]} for i in range(5)]
    Path("data/sts-dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("data/dev.jsonl").write_text(Path("train.jsonl").read_text())
    section = README[README.index("## Did it get better?") :]
    Path("run.yaml").write_text(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    with caplog.at_level("INFO", logger="embedtune"):
        main(
            [
                *("fit", "--config", "run.yaml", "--model.model_name_or_path", str(tiny_bert)),
                *("--data.train_path", "train.jsonl", "--trainer.accelerator", "cpu"),
                *("--model.use_mrl", "true", "--model.mrl_dims", "32,128"),
            ]
        )
    assert "the best by val/search/ndcg@10/128" in caplog.text
    report = Path("run/report.html").read_text()
    assert all(name in report for name in ("search", "sts", "pairs"))


def test_the_readmes_own_loss_trains_by_its_import_path(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(python_block("Loss)"))
    write_rows()
    main(
        [
            *(
                "fit",
                "--model.model_name_or_path",
                str(tiny_bert),
                "--data.train_path",
                "train.jsonl",
            ),
            *("--model.loss", "my_losses.Triplet", "--model.loss.margin", "0.5"),
            *(
                "--model.use_mrl",
                "true",
                "--model.mrl_dims",
                "8,16",
                "--trainer.accelerator",
                "cpu",
            ),
        ]
    )
    assert "my_losses.Triplet" in Path("run/config.yaml").read_text()
    assert Path("run/model/modules.json").exists()


def test_the_readmes_python_example_trains(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (
        b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "pl.Trainer" in b
    )
    Path("train.jsonl").write_text(re.search(r"<<'ROWS'\n(.*?)ROWS", README, re.DOTALL)[1])
    code = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_bert))
    exec(compile(code, "README.md", "exec"), {})
    assert Path("run/model/modules.json").exists()
