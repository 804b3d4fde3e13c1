"""A base model that is an adapter is merged into the model below it."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from embedtune.errors import InputError
from embedtune.export.folder import TOLERANCE, export_encoder
from embedtune.models.encoder import Encoder
from embedtune.models.loading import load_sentence_transformer
from embedtune.models.spec import EncoderSpec

peft = pytest.importorskip("peft")

TEXTS = ["a", "the second text"]
KINDS = {
    "lora": peft.LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=False),
    "saved": peft.LoraConfig(
        target_modules=["key"], modules_to_save=["LayerNorm"], init_lora_weights=False
    ),
    "ia3": peft.IA3Config(target_modules=["value"], feedforward_modules=[]),
}


def adapted(model, config, folder) -> None:
    torch.manual_seed(3)
    adapter = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in (weight for weight in adapter.parameters() if weight.requires_grad):
            weight.add_(torch.randn_like(weight) / 2)
    adapter.save_pretrained(folder)


def write(tiny_transformer, config, folder) -> None:
    adapted(AutoModel.from_pretrained(tiny_transformer), config, folder)
    AutoTokenizer.from_pretrained(tiny_transformer).save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_and_all_of_it_trains(kind, tiny_transformer, tmp_path, caplog):
    write(tiny_transformer, KINDS[kind], tmp_path / "adapter")
    expected = SentenceTransformer(str(tmp_path / "adapter"), device="cpu").encode(TEXTS)
    base = SentenceTransformer(str(tiny_transformer), device="cpu").encode(TEXTS)
    assert abs(expected - base).max() > 0.01
    with caplog.at_level("INFO"):
        encoder = Encoder(EncoderSpec(str(tmp_path / "adapter")))
    assert f"{tmp_path / 'adapter'}: merged its adapter" in caplog.text
    plain = Encoder(EncoderSpec(str(tiny_transformer)))
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert export_encoder(encoder, tmp_path / "model") <= TOLERANCE
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    exported = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS)
    assert abs(exported - expected).max() < 1e-5
    caplog.clear()
    load_sentence_transformer(str(tmp_path / "model"))
    assert "merged" not in caplog.text


def test_so_is_one_that_sentence_transformers_wrote(tiny_bert, tmp_path):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    torch.manual_seed(3)
    model.add_adapter(KINDS["lora"])
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    encoder = Encoder(EncoderSpec(str(tmp_path / "adapter")))
    assert encoder.normalizes
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    export_encoder(encoder, tmp_path / "model")
    exported = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS)
    assert abs(exported - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.LoraConfig(target_modules=["query"], use_dora=True),
            "an adapter that can be merged into its model, such as LoRA, found DORA",
        ),
        (
            peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2),
            "cannot load",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(tiny_transformer, tmp_path, config, message):
    write(tiny_transformer, config, tmp_path)
    with pytest.raises(InputError, match=f"model_name_or_path: .*{message}") as caught:
        Encoder(EncoderSpec(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_model_that_is_gone_is_one_line(tiny_transformer, tmp_path):
    write(tiny_transformer, KINDS["lora"], tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(str(tiny_transformer), "/nowhere/model"))
    with pytest.raises(InputError, match=r"cannot load .*nowhere") as caught:
        Encoder(EncoderSpec(str(tmp_path)))
    assert "\n" not in str(caught.value)
