"""The encoder computes what sentence-transformers computes, from features it made itself."""

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

from embedtune.data.chunks import Text, make_chunks
from embedtune.errors import InputError
from embedtune.models.encoder import Encoder
from embedtune.models.loading import load_sentence_transformer
from embedtune.models.projection import (
    init_projection,
    map_to_teacher,
    parse_dims,
    principal_axes,
    projection_dim,
)
from embedtune.models.spec import EncoderSpec
from embedtune.models.trial import prepare_training

TEXTS = ["a", "the second text", "one two three four five six seven", "中文 x", "b c", "b c d e"]


def encode(encoder: Encoder, texts: list[str], tokens_per_chunk: int = 24, **text) -> torch.Tensor:
    defaults = {"role": "query", "prompt": None, "max_len": 64, **text}
    chunks, order = make_chunks(encoder, [Text(t, **defaults) for t in texts], tokens_per_chunk)
    with torch.no_grad():
        return torch.cat([encoder(features) for features in chunks])[order]


@pytest.mark.parametrize("tokens_per_chunk", [1, 24, 10_000])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_transformer", "tiny_qwen"])
def test_chunks_encode_as_sentence_transformers_does(model, tokens_per_chunk, request):
    path = str(request.getfixturevalue(model))
    encoder = Encoder(EncoderSpec(path)).eval()
    found = encode(encoder, TEXTS, tokens_per_chunk)
    if encoder.normalizes:
        found = torch.nn.functional.normalize(found, dim=-1)
    expected = torch.as_tensor(SentenceTransformer(path, device="cpu").encode(TEXTS))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_prompt_is_prepended(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert))).eval()
    prompted = encode(encoder, ["text"], prompt="query: ")
    torch.testing.assert_close(prompted, encode(encoder, ["query: text"]))
    assert not torch.allclose(prompted, encode(encoder, ["text"]))


def test_max_len_truncates_and_is_capped_by_the_positions(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    assert (encoder.cap(10, "document"), encoder.cap(1000, "document")) == (10, 64)
    features = encoder.tokenize(["word " * 100], "document", None, 10)
    assert features["input_ids"].shape == (1, 10)


def test_a_tokenizer_without_a_limit_gets_that_of_the_positions(tiny_bert, tmp_path):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model.max_seq_length = int(1e30)
    model.save_pretrained(str(tmp_path))
    assert Encoder(EncoderSpec(str(tmp_path))).max_seq_length == 64


def test_the_models_own_prompts_depend_on_the_role(tiny_bert, tmp_path):
    model = SentenceTransformer(
        str(tiny_bert), device="cpu", prompts={"query": "q: ", "passage": "p: "}
    )
    model.save_pretrained(str(tmp_path))
    encoder = Encoder(EncoderSpec(str(tmp_path)))
    assert (encoder.default_prompt("query"), encoder.default_prompt("document")) == ("q: ", "p: ")
    assert Encoder(EncoderSpec(str(tiny_bert))).default_prompt("query") is None


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken", "weightedmean"])
def test_pooling_can_be_chosen(tiny_transformer, pooling):
    encoder = Encoder(EncoderSpec(str(tiny_transformer), pooling=pooling))
    assert encoder.model[1].pooling_mode == pooling
    assert encode(encoder.eval(), TEXTS).shape == (6, 32)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "not-on-this-machine"])
def test_a_model_that_is_not_there_is_one_clear_error(name):
    with pytest.raises(InputError, match="model_name_or_path"):
        load_sentence_transformer(name)


def test_a_checkpoints_spec_rebuilds_the_structure(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.append_projection(48)
    encoder.raise_max_seq_length(32)
    encoder.set_prompt("query", "find: ")
    again = Encoder(EncoderSpec(**encoder.spec._asdict()))
    assert again.width == 48
    assert again.max_seq_length == encoder.max_seq_length == 64
    assert again.default_prompt("query") == "find: "
    again.load_state_dict(encoder.state_dict())


# --- Projection -------------------------------------------------------------------------


def test_a_model_that_ends_in_a_dense_keeps_it(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.append_projection(24)
    assert isinstance(encoder.dense, Dense)
    assert projection_dim(encoder, "pca", [8, 24], None) is None
    with pytest.raises(InputError, match=r"up to the model's 24 \(it ends in a Dense\), found 32"):
        projection_dim(encoder, "pca", [8, 32], None)


@pytest.mark.parametrize(
    ("init", "mrl_dims", "teacher_dim", "expected"),
    [
        ("pca", None, None, None),
        ("pca", [8, 16], None, 16),
        ("pca", [8, 1792], None, 1792),
        ("none", [8, 32], None, None),
        ("pca", None, 48, 48),
        ("pca", [8, 40], 48, 48),
        ("pca", [8], 32, None),
        ("teacher", [8], 32, 32),
        ("teacher", None, 48, 48),
        ("teacher", None, 24, 24),
    ],
)
def test_the_width_follows_the_widths_or_the_teacher(
    tiny_bert, init, mrl_dims, teacher_dim, expected
):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    assert projection_dim(encoder, init, mrl_dims, teacher_dim) == expected


@pytest.mark.parametrize(
    ("init", "mrl_dims", "teacher_dim", "message"),
    [
        ("none", [64], None, "projection_init is none"),
        ("none", None, 48, "the teacher's is 48"),
        ("pca", [64], 48, "up to the teacher's 48, found 64"),
        ("teacher", [8], None, "teacher needs rows with a teacher's embeddings"),
    ],
)
def test_widths_that_cannot_be_had_are_an_error(tiny_bert, init, mrl_dims, teacher_dim, message):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    with pytest.raises(InputError, match=message):
        projection_dim(encoder, init, mrl_dims, teacher_dim)


@pytest.mark.parametrize("init", ["identity", "orthogonal", "pca"])
@pytest.mark.parametrize("width", [32, 40])
def test_a_projection_starts_as_a_rotation_of_what_the_encoder_knows(tiny_bert, init, width):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    sample = torch.randn(100, 32) @ torch.randn(32, 32)
    dense = encoder.append_projection(width)
    init_projection(dense.linear, init, sample)
    with torch.no_grad():
        projected = dense({"sentence_embedding": sample})["sentence_embedding"][:, :32]
    torch.testing.assert_close(projected @ projected.T, sample @ sample.T, rtol=1e-4, atol=1e-3)
    if width > 32:
        assert dense.linear.weight[32:].abs().max() > 0


def test_principal_axes_put_the_strongest_first():
    scales = torch.tensor([0.1, 5.0, 1.0, 0.5])
    sample = torch.randn(500, 4) * scales
    axes = principal_axes(sample)
    torch.testing.assert_close(axes @ axes.T, torch.eye(4), atol=1e-5, rtol=0)
    unit = torch.nn.functional.normalize(sample, dim=-1)
    energy = (unit @ axes.T).square().mean(dim=0)
    assert energy.argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert axes[0].abs().argmax() == 1


def test_what_all_texts_share_is_in_every_prefix():
    """So that the cosines of every width have the range of the full width's."""
    sample = torch.randn(500, 16) + 5 * torch.eye(16)[7]
    axes = principal_axes(sample)
    assert axes[0, 7].abs() > 0.99
    full, prefix = (torch.nn.functional.normalize(sample @ axes[:n].T, dim=-1) for n in (16, 4))
    assert (prefix @ prefix.T).mean() > (full @ full.T).mean() > 0.5


def similar(left, right):
    """Return the mean cosine of rows."""
    return torch.nn.functional.cosine_similarity(left, right).mean().item()


@pytest.mark.parametrize("width", [12, 16, 24])
def test_a_start_from_the_teacher_maps_texts_that_it_has_not_seen(width):
    torch.manual_seed(0)
    student = 7 * torch.randn(400, 16) + 5  # of any length, about any place
    teacher = (student - 5) @ torch.randn(16, width) + torch.randn(400, width) + 30
    weight, bias = map_to_teacher(student[:300], teacher[:300])
    truth = teacher[300:] / teacher[300:].norm(dim=1, keepdim=True)
    unseen = student[300:] @ weight.T + bias
    left = (unseen - truth).square().sum() / (truth - truth.mean(dim=0)).square().sum()
    assert left < 0.1


def test_a_start_from_the_teacher_does_not_follow_noise():
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32))
    student = torch.randn(60, 32)  # a row of the map has half as many weights to find
    teacher = student @ rotation.T + torch.randn(60, 32)
    weight, bias = map_to_teacher(student, teacher)
    unseen, plain = torch.randn(500, 32), torch.linalg.lstsq(student, teacher).solution
    truth = unseen @ rotation.T
    assert similar(unseen @ weight.T + bias, truth) > similar(unseen @ plain, truth) + 0.05


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("width", [12, 16, 24])
def test_few_texts_still_start_from_the_teacher(count, width):
    student, teacher = torch.randn(count, 16), torch.randn(count, width)
    weight, bias = map_to_teacher(student, teacher)
    assert similar(student @ weight.T + bias, teacher) > 0.6
    assert torch.linalg.matrix_rank(weight) == min(16, width)  # other texts do not become alike


@pytest.mark.parametrize("student", [torch.zeros(40, 16), torch.ones(40, 16)])
def test_texts_that_are_all_alike_still_start_from_the_teacher(student):
    assert all(part.isfinite().all() for part in map_to_teacher(student, torch.randn(40, 24)))


def test_widths_parse_from_a_list_or_a_comma_string():
    assert parse_dims("64, 128") == parse_dims([64, 128]) == [64, 128]
    for wrong in ("", "64,x", [0], "-1"):
        with pytest.raises(InputError, match="mrl_dims"):
            parse_dims(wrong)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_qwen"])
def test_every_trainable_parameter_gets_a_gradient(model, request):
    encoder = Encoder(EncoderSpec(str(request.getfixturevalue(model))))
    prepare_training(encoder)
    encoder.append_projection(8)
    encoder(encoder.tokenize(TEXTS, "query", None, 64)).square().sum().backward()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert len(trained) > 10
    assert all(parameter.grad is not None for parameter in trained)


def test_normalize_is_taken_off_for_training(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    assert encoder.normalizes
    assert not any(isinstance(module, Normalize) for module in encoder.model)


# --- What FSDP gathers as a whole -----------------------------------------------------------

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.BertConfig(**SIZES), {"BertLayer", "BertEmbeddings"}),
        (transformers.ModernBertConfig(**SIZES, pad_token_id=0), {"ModernBertEncoderLayer"}),
        (transformers.Qwen3Config(**SIZES, num_key_value_heads=1), {"Qwen3DecoderLayer"}),
        (transformers.MistralConfig(**SIZES, num_key_value_heads=1), {"MistralDecoderLayer"}),
        # These declare nothing.
        (transformers.MPNetConfig(**SIZES), {"MPNetLayer"}),
        (transformers.ElectraConfig(**SIZES), {"ElectraLayer"}),
        (transformers.DebertaV2Config(**SIZES), {"DebertaV2Layer"}),
        (transformers.AlbertConfig(**SIZES), {"AlbertLayerGroup"}),
        (transformers.DistilBertConfig(vocab_size=50, dim=16, n_heads=2), {"TransformerBlock"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_layers_are_found_in_any_architecture(config, expected, tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.model[0].model = transformers.AutoModel.from_config(config)
    assert expected <= {kind.__name__ for kind in encoder.block_classes}


def test_the_layers_of_every_tower_are_found(tiny_bert, tiny_qwen, tmp_path):
    towers = [[Transformer(str(path)), Pooling(32)] for path in (tiny_bert, tiny_qwen)]
    SentenceTransformer(modules=[Router.for_query_document(*towers)], device="cpu").save_pretrained(
        str(tmp_path)
    )
    found = {kind.__name__ for kind in Encoder(EncoderSpec(str(tmp_path))).block_classes}
    assert {"BertLayer", "Qwen3DecoderLayer"} <= found


def test_a_model_without_layers_has_none_and_compiles_nothing(tiny_bert, tmp_path):
    tokenizer = SentenceTransformer(str(tiny_bert), device="cpu").tokenizer.backend_tokenizer
    modules = [StaticEmbedding(tokenizer, embedding_dim=8)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path))
    encoder = Encoder(EncoderSpec(str(tmp_path)))
    assert encoder.block_classes == set()
    with pytest.raises(InputError, match=r"model.compile: expected a model with layers, found no"):
        encoder.compile_layers()


def test_cudnn_plans_for_no_shape(tiny_bert):
    torch.backends.cuda.enable_cudnn_sdp(True)
    Encoder(EncoderSpec(str(tiny_bert)))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_chunk_costs_more_on_a_gpu(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert)), attn_implementation="sdpa")  # which pads
    texts = [Text(" ".join("a" * n), "document", None, 64) for n in (40, 40, 4, 4, 4, 4)]
    chunks = {}
    for device in ("cuda", "cpu"):
        encoder.pack(torch.device(device))
        chunks[device] = len(make_chunks(encoder, texts, 2048)[0])
    assert chunks == {"cuda": 1, "cpu": 2}


@pytest.mark.parametrize("init", ["identity", "orthogonal", "pca"])
@pytest.mark.parametrize(("width", "moved"), [(64, 1e-6), (96, 1e-6), (48, 0.02)])
def test_a_wider_projection_leaves_the_cosines(init, width, moved):
    sample = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(32, width)
    init_projection(linear, init, sample)

    def cosines(embeddings):
        unit = torch.nn.functional.normalize(embeddings, dim=-1)
        return unit @ unit.T

    with torch.no_grad():
        found, expected = linear(sample), cosines(sample)
        assert (cosines(found) - expected).abs().max() < moved
        assert (cosines(found[:, :40]) - expected).abs().max() < 0.02
    assert linear.weight[32:].norm(dim=1).min() > 0.05  # or they would never be trained
