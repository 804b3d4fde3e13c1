"""A model on disk that is broken is one line that names it and the reason."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import BertModel

from embedtune.errors import InputError
from embedtune.models.loading import load_sentence_transformer

GARBAGE = b"\x00\xff\x13garbage" * 50


def load(folder):
    return load_sentence_transformer(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("model.safetensors", lambda data: data[: len(data) // 2]),
        ("model.safetensors", lambda data: data[:-1]),
        ("model.safetensors", lambda data: b"\xff" * 8 + data[8:]),
        ("model.safetensors", lambda data: GARBAGE),
        ("model.safetensors", lambda data: b""),
        ("modules.json", lambda data: data[: len(data) // 2]),
        ("modules.json", lambda data: b"[1]"),
        ("modules.json", lambda data: b"null"),
        ("modules.json", lambda data: b"[" * 10**5),
        ("config.json", lambda data: data[:-5]),
        ("config.json", lambda data: b"null"),
        ("config.json", lambda data: GARBAGE),
        ("config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": 48')),
        ("config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": "32"')),
        ("tokenizer.json", lambda data: data[:-5]),
        ("tokenizer.json", lambda data: b"{}"),
        ("tokenizer_config.json", lambda data: b"[]"),
        ("1_Pooling/config.json", lambda data: data[:-5]),
        ("1_Pooling/config.json", lambda data: b"{}"),
        ("1_Pooling/config.json", lambda data: b"[1]"),
        ("config_sentence_transformers.json", lambda data: b"[1]"),
        ("sentence_bert_config.json", lambda data: b"[1]"),
        ("sentence_bert_config.json", lambda data: b"\xff"),
    ],
)
def test_a_broken_file_is_one_line_that_names_the_model(tiny_bert, tmp_path, name, broken):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    data = (folder / name).read_bytes()
    assert broken(data) != data
    (folder / name).write_bytes(broken(data))
    with pytest.raises(InputError, match=rf"cannot load '{folder}': .*\w") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    if name.endswith("json"):
        try:
            json.loads(broken(data))
        except (ValueError, RecursionError):
            assert f"'{folder}': {name}: " in str(caught.value)
    else:
        assert f"'{folder}': {name}: " in str(caught.value)


@pytest.mark.parametrize(
    "broken", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: GARBAGE]
)
def test_so_are_broken_weights_of_torch(tiny_transformer, tmp_path, broken):
    folder = shutil.copytree(tiny_transformer, tmp_path / "model")
    weights = BertModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load(folder)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(broken(data))
    with pytest.raises(InputError, match=rf"cannot load '{folder}': .*\w"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_bert, tmp_path, value):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    weights[name][3, 4] = value
    weights["pooler.dense.bias"][0] = value  # which comes later
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"'{folder}': expected finite weights.* in \S*{name}$"):
        load(folder)


def test_a_model_that_pools_nothing_is_named(tiny_bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooling_mode": []}))
    with pytest.raises(InputError, match=r"model_name_or_path: .*expected a pooling mode"):
        load(folder)


def test_documents_get_the_prompt_that_is_theirs_whatever_its_name(tiny_bert, tmp_path, caplog):
    """Wherever a model is measured: the empty prompt of every model would win over it."""
    prompted = SentenceTransformer(str(tiny_bert), device="cpu")
    prompted.prompts = {"query": "q: ", "passage": "p: "}
    prompted.save_pretrained(str(tmp_path / "prompted"))
    with caplog.at_level("INFO", logger="embedtune"):
        model = load(tmp_path / "prompted")
    assert "documents get its 'passage' prompt" in caplog.text
    expected = prompted.encode("text", prompt="p: ")
    assert np.array_equal(model.encode_document("text"), expected)
    assert not np.array_equal(model.encode_document("text"), prompted.encode("text"))
