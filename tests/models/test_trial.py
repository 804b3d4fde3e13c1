"""What is tried before a fit: packing, padding, and which weights an embedding is computed from."""

import pytest
import torch
import transformers
import zoo_models
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from embedtune.errors import InputError
from embedtune.models.encoder import Encoder
from embedtune.models.packing import LONGEST_TRIAL
from embedtune.models.spec import EncoderSpec
from embedtune.models.trial import prepare_training

CPU = torch.device("cpu")


def load(build: zoo_models.Build, folder) -> Encoder:
    build(folder)
    return Encoder(EncoderSpec(str(folder)))


def scaled(kind: str, scaled_from: int, longest: int = 64) -> zoo_models.Build:
    factors = {"factor": 4.0} if kind == "dynamic" else {}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
        factors["original_max_position_embeddings"] = scaled_from
    positions = scaled_from if kind == "dynamic" else longest
    return zoo_models.decoder(
        "LlamaConfig",
        max_position_embeddings=positions,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **factors},
        tokens=lambda: zoo_models.decoder_tokenizer(model_max_length=longest),
    )


@pytest.mark.parametrize(
    ("kind", "scaled_from", "longest", "packs"),
    [
        ("longrope", 16, 64, False),
        ("longrope", 300, 600, False),
        ("longrope", LONGEST_TRIAL + 1, 4096, False),  # longer than what is tried
        ("longrope", 64, 64, True),  # no text is as long
        ("dynamic", 64, 64, True),
        ("yarn", 16, 64, True),  # the same for every text
    ],
)
def test_texts_are_not_packed_where_the_longest_scales_the_positions_of_all(
    tmp_path, kind, scaled_from, longest, packs
):
    build = scaled(kind, scaled_from, longest)
    if kind == "yarn":
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
        rope["original_max_position_embeddings"] = 16
        build = zoo_models.decoder("LlamaConfig", rope_parameters=rope)
    encoder = load(build, tmp_path)
    encoder.pack(CPU)
    assert encoder.packs == packs


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": 20,
}


def sees_images(folder) -> None:
    """Write a model of texts and images, whose configuration has one of texts in it."""
    text = zoo_models.configured(
        transformers.LlamaConfig, zoo_models.DECODER, rope_parameters=LONGROPE
    )
    images = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=images, image_token_id=4)
    zoo_models.enlarge(transformers.LlavaModel(config)).save_pretrained(folder / "bare")
    tokenizer = zoo_models.decoder_tokenizer()
    transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tokenizer).save_pretrained(
        folder / "bare"
    )
    zoo_models.save([zoo_models.Transformer(str(folder / "bare")), Pooling(16)], folder)


def test_so_it_is_where_the_model_also_sees_images(tmp_path):
    encoder = load(sees_images, tmp_path)
    encoder.pack(CPU)
    assert not encoder.packs


@pytest.mark.parametrize(("name", "packs"), [("MistralConfig", True), ("PhimoeConfig", False)])
def test_a_window_that_attention_is_not_told_of_needs_padding(tmp_path, name, packs):
    # Wider than the texts that are tried. Of Phimoe it is in the mask alone.
    sizes = {**zoo_models.DECODER, "sliding_window": 40}
    encoder = load(zoo_models.decoder(name, sizes=sizes), tmp_path)
    encoder.pack(CPU)
    assert encoder.packs == packs


def test_a_limit_beyond_the_positions_scales_them_too(tmp_path):
    scaled("dynamic", 32)(tmp_path)
    zoo_models.edit(tmp_path, "sentence_bert_config.json", max_seq_length=64)
    encoder = Encoder(EncoderSpec(str(tmp_path)))
    encoder.pack(CPU)
    assert (encoder.max_seq_length, encoder.packs) == (64, False)


# --- Which weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "frozen"),
    [
        (zoo_models.encoder("BertConfig"), "pooler"),
        (
            zoo_models.encoder(
                "LongformerConfig",
                sizes={**zoo_models.SIZES, "max_position_embeddings": 66},
                attention_window=8,
            ),
            "global|pooler",
        ),
        (
            zoo_models.encoder(
                "XLNetConfig", sizes={"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
            ),
            "mask_emb",
        ),
        (zoo_models.decoder("Qwen3Config"), None),
        (
            zoo_models.decoder(
                "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
            ),
            None,
        ),
    ],
)
def test_weights_that_an_embedding_does_not_come_from_are_frozen(tmp_path, build, frozen):
    encoder = load(build, tmp_path).train()
    for _ in range(2):  # as for a second fit
        prepare_training(encoder)
    assert encoder.training
    found = {name for name, weight in encoder.named_parameters() if not weight.requires_grad}
    parts = frozen.split("|") if frozen else []
    named = {n for n, _ in encoder.named_parameters() if any(part in n for part in parts)}
    assert found == named


class Expert(nn.Linear):
    pass


def test_experts_that_a_few_tokens_do_not_reach_are_not(tmp_path):
    encoder = load(zoo_models.encoder("BertConfig"), tmp_path)
    encoder.model[0].auto_model.experts = nn.ModuleList([Expert(2, 2)])
    prepare_training(encoder)
    assert encoder.model[0].auto_model.experts[0].weight.requires_grad


def test_what_was_frozen_stays_so(tmp_path):
    encoder = load(zoo_models.encoder("BertConfig"), tmp_path)
    embeddings = encoder.model[0].auto_model.embeddings.requires_grad_(False)
    prepare_training(encoder)
    assert not any(weight.requires_grad for weight in embeddings.parameters())


def test_every_tower_is_tried(tmp_path):
    small, left = tmp_path / "small", tmp_path / "left"
    zoo_models.encoder("BertConfig")(small)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    zoo_models.decoder("GPT2Config", sizes=sizes, tokens=zoo_models.left_tokenizer)(left)
    towers = [[zoo_models.Transformer(str(path / "bare")), Pooling(16)] for path in (small, left)]
    zoo_models.save([Router.for_query_document(*towers)], tmp_path / "model")
    encoder = Encoder(EncoderSpec(str(tmp_path / "model")))
    with pytest.raises(InputError, match="do not depend on padding"):
        prepare_training(encoder)


def test_a_model_whose_modules_do_not_fit_is_one_line(tmp_path):
    bert = zoo_models.small_bert(tmp_path)
    modules = [bert, Pooling(16, ("cls", "mean")), Dense(32, 8)]
    zoo_models.save(modules, tmp_path / "model")
    encoder = Encoder(EncoderSpec(str(tmp_path / "model"), pooling="mean"))
    expected = "expected a model that embeds a query, found RuntimeError: mat1 and mat2 shapes"
    with pytest.raises(InputError, match=expected) as caught:
        prepare_training(encoder)
    assert "\n" not in str(caught.value)


def test_an_embedding_of_another_width_than_the_model_tells_is_refused(tmp_path):
    sizes = {**zoo_models.SIZES, "ffn_dim": 32, "word_embed_proj_dim": 12}
    zoo_models.decoder("OPTConfig", sizes=sizes)(tmp_path)  # its states go through a projection
    encoder = Encoder(EncoderSpec(str(tmp_path / "bare"), "lasttoken"))
    with pytest.raises(InputError, match=r"expected embeddings of 16 numbers, .* found 12"):
        prepare_training(encoder)


@pytest.mark.parametrize("given", ["eager", "sdpa"])
def test_a_given_attention_is_left_as_it_is(tmp_path, given):
    zoo_models.encoder("BertConfig")(tmp_path)
    encoder = Encoder(EncoderSpec(str(tmp_path)), attn_implementation=given)
    prepare_training(encoder)
    assert encoder.model[0].auto_model.config._attn_implementation == given


def test_after_packing_it_is_the_same(tmp_path):
    encoder = load(zoo_models.encoder("BertConfig"), tmp_path)
    encoder.pack(CPU)
    prepare_training(encoder)
    assert encoder.packs
