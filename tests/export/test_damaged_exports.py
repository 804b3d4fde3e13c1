"""An exported folder whose weights are not those that were proven is named, wherever it is used."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from embedtune import Embedding, InputError
from embedtune.cli import main
from embedtune.digests import DIGESTS, written_names
from embedtune.export.folder import export_encoder
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec


@pytest.fixture
def exported(tiny_bert, tmp_path) -> Path:
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.append_projection(16)
    export_encoder(encoder, tmp_path / "model")
    return tmp_path / "model"


def flip_weight(folder: Path) -> Path:
    """Flip the lowest bit of a weight: a finite number that no other check can tell."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-400] ^= 1
    path.write_bytes(data)
    return path


def test_all_weights_have_a_digest(exported):
    lines = (exported / DIGESTS).read_text().splitlines()
    named = [line.partition("  ")[2] for line in lines if not line.startswith("# ")]
    assert named == ["2_Dense/model.safetensors", "model.safetensors"]
    assert all(load_file(exported / name) for name in named)
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*.*")}
    assert written_names(exported) == {name for name in files if (exported / name).is_file()}


def test_a_flipped_bit_is_told_wherever_the_folder_is_used(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = flip_weight(exported)
    rows = [{"query": f"q {i}", "pos": [f"p {i}"], "scores": [i]} for i in range(4)]
    Path("sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("train.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    for command in (
        ["fit", "--model.model_name_or_path", str(exported), "--data.train_path", "train.jsonl"],
        ["evaluate", str(exported), "--data", "sts.jsonl"],
        ["teach", "--model", str(exported), "--data", "train.jsonl", "--out", "store"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(command)
        said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert caught.value.code == 2
        assert len(said) == 1
        assert f"{path}: is damaged: expected the bytes that were written" in said[0]
    with pytest.raises(InputError, match="is damaged"):
        Embedding(exported)


def test_what_people_edit_is_theirs(exported):
    for name in ("README.md", "config.json", "config_sentence_transformers.json"):
        path = exported / name
        path.write_text(path.read_text().rstrip() + "\n\n")
    Embedding(exported)


def test_a_folder_may_be_copied_hold_more_and_have_no_digests(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copied")
    (tmp_path / "copied" / "more.safetensors").write_bytes(b"somebody else's")
    exported.rename(tmp_path / "moved")
    for name in ("copied", "moved"):
        Embedding(tmp_path / name)
        SentenceTransformer(str(tmp_path / name), device="cpu")
    flip_weight(tmp_path / "moved")
    (tmp_path / "moved" / DIGESTS).unlink()  # changed on purpose
    Embedding(tmp_path / "moved")


def test_a_folder_that_sentence_transformers_saves_anew_has_no_old_digests(exported, tmp_path):
    SentenceTransformer(str(exported), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert not (tmp_path / "again" / DIGESTS).exists()
    Embedding(tmp_path / "again")
