"""Texts are encoded without padding where the model's attention allows it, to the same result."""

import itertools
import json

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from embedtune import InputError
from embedtune.cli import main
from embedtune.data.chunks import Text, cut_packed, cut_padded, make_chunks
from embedtune.export.folder import export_encoder
from embedtune.models import dropout as dropout_module
from embedtune.models.attention import VARLEN, varlen_attention
from embedtune.models.dropout import FastDropout, attend_with_dropout, draw_kept
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec

CPU = torch.device("cpu")
TEXTS = [
    "a",
    "the second text",
    "one two three four five six seven eight",
    "中文 x",
    "b c",
    "b c d e",
]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
# (configuration class, sizes, whether it is encoded without padding)
ARCHITECTURES = {
    "bert": (transformers.BertConfig, SIZES, True),
    "roberta": (transformers.RobertaConfig, {**SIZES, "max_position_embeddings": 66}, True),
    "xlm-roberta": (transformers.XLMRobertaConfig, {**SIZES, "max_position_embeddings": 66}, True),
    "electra": (transformers.ElectraConfig, {**SIZES, "embedding_size": 16}, True),
    "distilbert": (
        transformers.DistilBertConfig,
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "pad_token_id": 0},
        True,
    ),
    # Layers with a sliding window.
    "modernbert": (
        transformers.ModernBertConfig,
        {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2},
        True,
    ),
    "qwen2-window": (
        transformers.Qwen2Config,
        {**DECODER, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        True,
    ),
    "wide-window": (
        transformers.Qwen2Config,
        {**DECODER, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
        False,
    ),
    "qwen3": (transformers.Qwen3Config, DECODER, True),
    "llama": (transformers.LlamaConfig, DECODER, True),
}


def save(name: str, tiny_transformer, folder) -> str:
    kind, sizes, _ = ARCHITECTURES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_transformer)
    torch.manual_seed(1)
    size = len(tokenizer) + 1  # loaded as Qwen2's, the tokenizer has one more
    config = kind(vocab_size=size, bos_token_id=None, eos_token_id=None, **sizes)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def encode(encoder: Encoder, texts: list[str], tokens_per_chunk: int = 24) -> torch.Tensor:
    wanted = [Text(text, "document", None, 64) for text in texts]
    chunks, order = make_chunks(encoder, wanted, tokens_per_chunk)
    return torch.cat([encoder(features) for features in chunks])[order]


def test_a_window_wider_than_what_is_tried_is_padded(tiny_transformer, tmp_path):
    encoder = Encoder(EncoderSpec(save("wide-window", tiny_transformer, tmp_path), "mean"))
    encoder.pack(CPU)
    assert not encoder.packs


@pytest.mark.parametrize("name", [n for n, (_, _, packs) in ARCHITECTURES.items() if packs])
def test_an_architecture_has_the_same_gradient_without_padding(name, tiny_transformer, tmp_path):
    path = save(name, tiny_transformer, tmp_path)
    gradients = []
    for packs in (False, True):
        encoder = Encoder(EncoderSpec(path, "mean")).eval()
        if packs:
            encoder.pack(CPU)
        weights = torch.arange(32.0).cos()
        (encode(encoder, TEXTS, 1000) @ weights).square().sum().backward()
        found = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        gradients.append(found)
    padded, packed = gradients
    assert padded.keys() == packed.keys()
    largest = max(gradient.abs().max() for gradient in padded.values())
    for parameter, gradient in padded.items():
        difference = (packed[parameter] - gradient).abs().max()
        assert difference < 1e-5 * largest, parameter


def test_padding_that_a_text_spells_out_takes_no_position(tiny_transformer, tmp_path):
    texts = ["a", "b [PAD] c [PAD] [PAD] d", "[PAD]", "e f [PAD]", "one two"]
    encoder = Encoder(EncoderSpec(save("xlm-roberta", tiny_transformer, tmp_path), "mean")).eval()
    padded = encode(encoder, texts, 1000)
    encoder.pack(CPU)
    assert encoder.packs
    torch.testing.assert_close(encode(encoder, texts, 1000), padded)


def test_buckets_that_validation_asked_for_first_serve_training():
    ends = torch.tensor([0, 5, 8])
    given = [states(2, 8) for _ in range(3)]
    with torch.inference_mode():
        varlen_attention(Layer(False), *given, None, cu_seq_lens_q=ends)
    varlen_attention(Layer(False), *given, None, cu_seq_lens_q=ends)[0].sum().backward()
    assert given[2].grad.abs().sum() > 0


def test_packed_chunks_hold_no_padding(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.pack(CPU)
    wanted = [Text(text, "document", None, 64) for text in TEXTS]
    chunks, _ = make_chunks(encoder, wanted, 24)
    lengths = [len(encoder.model.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert sum(chunk["input_ids"].numel() for chunk in chunks) == sum(lengths)
    assert len(chunks) > 1
    assert all(chunk["input_ids"].numel() <= max(24, max(lengths)) for chunk in chunks)


@pytest.mark.parametrize("given", ["eager", "sdpa"])
def test_a_given_attention_is_kept(tiny_bert, given):
    encoder = Encoder(EncoderSpec(str(tiny_bert)), attn_implementation=given).eval()
    encoder.pack(CPU)
    assert encoder.model[0].auto_model.config._attn_implementation == given
    assert not encoder.packs
    packed = Encoder(EncoderSpec(str(tiny_bert))).eval()
    packed.pack(CPU)
    assert packed.packs
    torch.testing.assert_close(encode(encoder, TEXTS), encode(packed, TEXTS), rtol=0, atol=1e-6)


def test_an_unknown_attention_is_an_error(tiny_bert):
    with pytest.raises(InputError, match=r"model_name_or_path.*flesh"):
        Encoder(EncoderSpec(str(tiny_bert)), attn_implementation="flesh")


def test_the_exported_model_does_not_know_how_it_was_trained(tiny_bert, tmp_path):
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.pack(CPU)
    export_encoder(encoder, tmp_path / "model")
    assert VARLEN not in "".join(p.read_text() for p in (tmp_path / "model").rglob("*.json"))
    exported = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert exported[0].auto_model.config._attn_implementation == "sdpa"


def test_a_fit_with_a_given_attention_is_exported_for_any(tiny_bert, tmp_path):
    rows = [{"query": f"query {i}", "pos": [f"document {i} {'w ' * i}"]} for i in range(4)]
    data, run = tmp_path / "train.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model.model_name_or_path": tiny_bert,
        "model.attn_implementation": "eager",
        "model.grad_cache": True,
        "data.train_path": data,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": run,
        "trainer.enable_progress_bar": False,
    }
    main(["fit", *(f"--{name}={value}" for name, value in flags.items())])
    assert not (run / "model" / "UNVERIFIED").exists()
    exported = SentenceTransformer(str(run / "model"), device="cpu")
    assert exported[0].auto_model.config._attn_implementation == "sdpa"


# --- Attention and dropout ------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def states(heads: int, tokens: int) -> torch.Tensor:
    return torch.randn(1, heads, tokens, 8, requires_grad=True)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_stays_within_a_text(is_causal, key_heads, kind):
    lengths = [3, 3, 1, 5]
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    given = states(4, 12), states(key_heads, 12), states(key_heads, 12)
    found, _ = varlen_attention(
        Layer(is_causal), *(g.to(kind) for g in given), None, cu_seq_lens_q=ends, scaling=0.3
    )
    found.float().square().sum().backward()
    gradients = [g.grad.clone() for g in given]
    for g in given:
        g.grad = None
    text = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    mask = text[:, None] == text
    if is_causal:
        mask &= torch.ones_like(mask).tril()
    query, key, value = (g.to(kind).float().repeat_interleave(4 // g.shape[1], 1) for g in given)
    scores = (0.3 * query @ key.transpose(2, 3)).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    expected.square().sum().backward()
    tolerance = 1e-5 if kind == torch.float32 else 0.05
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    for gradient, g in zip(gradients, given, strict=True):
        assert g.grad.abs().max() > 0.01
        torch.testing.assert_close(gradient, g.grad, rtol=tolerance, atol=tolerance)


def test_dropout_drops_its_share_and_keeps_the_mean():
    kept = torch.empty(400, 501, dtype=torch.uint8)
    keep_prob = draw_kept(kept, 0.3)
    assert set(kept.unique().tolist()) == {0, 1}
    dropped = ~kept.bool()
    assert keep_prob == pytest.approx(0.7, abs=1e-5)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.005)
    # The four parts of a draw, and neighbours, are independent.
    for part in range(4):
        assert dropped.flatten()[part::4].float().mean().item() == pytest.approx(0.3, abs=0.01)
    both = (dropped[:, 1:] & dropped[:, :-1]).float().mean().item()
    assert both == pytest.approx(0.09, abs=0.005)


def test_attention_dropout_follows_torch_s_generator_and_is_right_on_average():
    ends = torch.tensor([0, 4, 8])
    given = [states(2, 8).detach() for _ in range(3)]

    def attend(seed: int | None) -> torch.Tensor:
        dropout = 0.0 if seed is None else 0.5
        torch.manual_seed(seed or 0)
        return varlen_attention(Layer(False), *given, None, cu_seq_lens_q=ends, dropout=dropout)[0]

    assert torch.equal(attend(1), attend(1))
    assert not torch.equal(attend(1), attend(2))
    mean = torch.stack([attend(seed) for seed in range(1, 3000)]).mean(dim=0)
    torch.testing.assert_close(mean, attend(None), rtol=0, atol=0.1)


MASKS = {
    "none": None,
    "padding": (torch.arange(7) < torch.tensor([7, 5, 6])[:, None])[:, None, None],
    "window": (torch.arange(7)[:, None] - torch.arange(7)).abs() < 3,
    "padding that sees itself": torch.eye(7, dtype=torch.bool)
    | (torch.arange(7) < torch.tensor([7, 5, 6])[:, None])[:, None, None].expand(3, 1, 7, 7),
}


@pytest.fixture
def drawn(monkeypatch) -> list[torch.Tensor]:
    """The masks that attention draws from now on."""
    masks: list[torch.Tensor] = []

    def remember(kept: torch.Tensor, dropout: float) -> float:
        keep_prob = draw_kept(kept, dropout)
        masks.append(kept.clone())
        return keep_prob

    monkeypatch.setattr(dropout_module, "draw_kept", remember)
    return masks


def attend_by_formula(query, key, value, mask, kept, keep_prob, scale):
    scores = scale * query @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) * kept / keep_prob) @ value


@pytest.mark.parametrize("block", [7 * 7 * 4, 1 << 18], ids=["blocks", "one block"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_with_dropout_equals_its_formula(mask, block, drawn, monkeypatch):
    monkeypatch.setattr(dropout_module, "BLOCK", block // torch.get_num_threads())
    generator = torch.Generator().manual_seed(3)
    given = [
        torch.randn(3, 2, 7, 5, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]
    weights = torch.randn(3, 2, 7, 5, generator=generator, dtype=torch.float64)
    found = attend_with_dropout(*given, mask, 0.25, 0.4)
    gradients = torch.autograd.grad((found * weights).sum(), given)
    assert (len(drawn) > 1) == (block < 1 << 18)
    kept = torch.cat(drawn).view(3, 2, 7, 7)
    assert 0 < kept.double().mean() < 1
    expected = attend_by_formula(*given, mask, kept, 0.75, 0.4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), given), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_attention_with_dropout_is_about_as_exact_in_half_precision_as_fused_attention(drawn):
    generator = torch.Generator().manual_seed(3)
    exact = [torch.randn(1, 4, 60, 16, generator=generator) for _ in range(4)]
    query, key, value, weights = [states.bfloat16() for states in exact]
    # One text, laid out as the layers do it, with scores up to 60: 1 / 4 apart in bfloat16. Rotary
    # embeddings make queries and keys float32.
    given = [states.transpose(1, 2).contiguous().transpose(1, 2) for states in (query, key, value)]
    types = torch.float32, torch.float32, torch.bfloat16
    given = [states.to(kind).requires_grad_() for states, kind in zip(given, types, strict=True)]
    whole = torch.tensor([0, 60])
    found, _ = varlen_attention(
        Layer(False), *given, None, cu_seq_lens_q=whole, dropout=0.25, scaling=3.0
    )
    found = found.transpose(1, 2)
    assert found.dtype == torch.bfloat16
    gradients = torch.autograd.grad(found, given, weights)
    kept = torch.cat(drawn).view(1, 4, 60, 60)

    wide = [states.double().requires_grad_() for states in (query, key, value)]
    expected = attend_by_formula(*wide, None, kept.double(), 0.75, 3.0)
    wanted = torch.autograd.grad(expected, wide, weights.double())
    fused = [states.clone().requires_grad_() for states in (query, key, value)]
    reference = torch.nn.functional.scaled_dot_product_attention(*fused, scale=3.0)
    reference_wide = attend_by_formula(*wide, None, 1.0, 1.0, 3.0)
    reference_gradients = torch.autograd.grad(reference, fused, weights)
    reference_wanted = torch.autograd.grad(reference_wide, wide, weights.double())

    def error(found, wanted):
        return ((found.double() - wanted).norm() / wanted.norm()).item()

    assert error(found, expected) < 1.5 * error(reference, reference_wide) < 0.01
    for gradient, want, other, other_want in zip(
        gradients, wanted, reference_gradients, reference_wanted, strict=True
    ):
        assert error(gradient, want) < 1.5 * error(other, other_want) < 0.03


def test_attention_drops_the_same_whatever_the_number_of_threads(drawn, monkeypatch):
    monkeypatch.setattr(dropout_module, "BLOCK", 7 * 7 * 2)
    given = [torch.randn(5, 2, 7, 5) for _ in range(3)]
    threads, masks = torch.get_num_threads(), []
    for count in (1, 2):
        torch.manual_seed(3)
        torch.set_num_threads(count)
        try:
            attend_with_dropout(*given, None, 0.25, 0.4)
        finally:
            torch.set_num_threads(threads)
        masks.append(torch.cat(drawn))
        drawn.clear()
    assert torch.equal(*masks)


def test_a_dropout_of_one_drops_all():
    given = torch.ones(3, 4)
    assert not FastDropout(1.0).train()(given).any()
    assert FastDropout(1 - 1e-9).train()(given).isfinite().all()


def test_dropout_between_layers_draws_as_fast_and_the_same_again(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert), dropout=0.4))
    encoder.pack(CPU)
    layer = encoder.model[0].auto_model.encoder.layer[0].output
    assert isinstance(layer.dropout, FastDropout)
    given = torch.ones(300, 301, requires_grad=True)
    torch.manual_seed(1)
    dropped = layer.dropout.train()(given)
    torch.manual_seed(1)
    assert torch.equal(layer.dropout(given), dropped)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.6], rel=1e-4)
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    dropped.sum().backward()
    assert torch.equal(given.grad, dropped)
    assert torch.equal(layer.dropout.eval()(given), given)


def test_dropout_settings_reach_the_model_and_are_exported(tiny_bert, tmp_path):
    spec = EncoderSpec(str(tiny_bert), dropout=0.3, attention_dropout=0.0)
    encoder = Encoder(spec)
    layer = encoder.model[0].auto_model.encoder.layer[0]
    assert (layer.attention.self.dropout.p, layer.output.dropout.p) == (0.0, 0.3)
    export_encoder(encoder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["hidden_dropout_prob"] == 0.3
    default = Encoder(EncoderSpec(str(tiny_bert))).model[0].auto_model.encoder.layer[0]
    assert (default.attention.self.dropout.p, default.output.dropout.p) == (0.1, 0.1)


DROPPING = {
    "bart": (
        transformers.BartConfig,
        {"activation_dropout": 0.3},
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
    "gpt-neo": (
        transformers.GPTNeoConfig,
        {"embed_dropout": 0.3, "resid_dropout": 0.3},
        {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    ),
    "starcoder2": (transformers.Starcoder2Config, {"residual_dropout": 0.3}, DECODER),
}
"""Models with dropouts of names of their own: (configuration class, these, sizes)."""


@pytest.mark.parametrize("name", DROPPING)
def test_every_dropout_is_set(name, tiny_transformer, tmp_path):
    kind, drops, sizes = DROPPING[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_transformer)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    config = kind(**{**ids, "pad_token_id": 0, **sizes, **drops})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own, none = (Encoder(EncoderSpec(str(tmp_path), "mean", dropout=d)).train() for d in (None, 0))
    assert not torch.equal(encode(own, TEXTS), encode(own, TEXTS))
    assert torch.equal(encode(none, TEXTS), encode(none, TEXTS))


@pytest.mark.parametrize("setting", [{"dropout": 1.0}, {"attention_dropout": -0.1}])
def test_a_share_out_of_range_is_an_error(tiny_bert, setting):
    with pytest.raises(InputError, match=f"model.{next(iter(setting))}: expected a share"):
        Encoder(EncoderSpec(str(tiny_bert), **setting))


# --- Where chunks are cut -------------------------------------------------------------------


def padded_cost(cuts: list[int], lengths: list[int], fixed: float) -> float:
    return sum(fixed + lengths[a] * (b - a) for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("seed", range(5))
def test_padded_chunks_are_cut_where_it_costs_least(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(torch.randint(1, 30, (9,), generator=generator).tolist(), reverse=True)
    limit = 64
    found = cut_padded(lengths, limit, 1)
    inner = range(1, len(lengths))
    every = ([0, *c, 9] for n in range(9) for c in itertools.combinations(inner, n))
    allowed = [
        c for c in every if all(lengths[a] * (b - a) <= limit for a, b in itertools.pairwise(c))
    ]
    assert found in allowed
    assert padded_cost(found, lengths, 1) == min(padded_cost(c, lengths, 1) for c in allowed)


def test_texts_without_tokens_are_cut_too():
    # An empty document, and a tokenizer that adds no special tokens.
    assert cut_padded([3, 0, 0], 8, 1)[-1] == cut_packed([3, 0, 0], 8)[-1] == 3


def test_a_text_longer_than_the_limit_is_a_chunk_of_its_own():
    lengths = [100, 100, 1]
    assert cut_packed(lengths, 10) == cut_padded(lengths, 10, 1000) == [0, 1, 2, 3]


def test_packed_chunks_are_about_equal():
    cuts = cut_packed([10] * 21, 100)
    tokens = [10 * (b - a) for a, b in itertools.pairwise(cuts)]
    assert tokens == [70, 70, 70]
