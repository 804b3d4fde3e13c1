"""Attention over packed texts that share blocks, as on GPUs: here on the CPU, in float64."""

import numpy as np
import pytest
import torch
from test_attention import ARCHITECTURES, TEXTS, save
from transformers import AttentionInterface

from embedtune.data.chunks import Text, make_chunks
from embedtune.models.attention import VARLEN, varlen_attention
from embedtune.models.encoder import Encoder
from embedtune.models.gpu_attention import Blocks, attend_in_blocks, block_bias
from embedtune.models.packing import BLOCK_INPUTS, PACKED_INPUTS, lay_in_blocks
from embedtune.models.spec import EncoderSpec
from embedtune.models.trial import packs_exactly

LENGTHS = (60, 17, 17, 16, 9, 3, 1)


def blocks_of(lengths: tuple[int, ...], only_short: bool = True) -> Blocks:
    found = lay_in_blocks(np.array(lengths), only_short)
    bias = block_bias(found["block_text"], torch.float64)
    return Blocks(found["block_source"], found["block_place"], bias)


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ((1,), 64),
        ((64, 64), 64),
        ((80, *[10] * 20), 128),
        ((80, 70), None),
        ((129, *[2] * 200), None),
        (LENGTHS, 64),
        (tuple(reversed(LENGTHS)), 64),
    ],
)
def test_every_token_has_a_place_in_a_block(lengths, size):
    if size is None:
        assert lay_in_blocks(np.array(lengths), only_short=True) == {}
        size = -(-max(lengths) // 64) * 64
    source, place, text = lay_in_blocks(np.array(lengths), only_short=False).values()
    tokens = sum(lengths)
    assert text.shape[1] == size
    assert len(source) == text.numel()
    assert torch.equal(source[place], torch.arange(tokens))
    assert len(set(place.tolist())) == tokens
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(text.flatten()[place], numbers.int())
    assert (text == -1).sum() == text.numel() - tokens
    for row in text.tolist():  # a text is in one piece
        kept = [n for i, n in enumerate(row) if n != -1 and (i == 0 or row[i - 1] != n)]
        assert len(kept) == len(set(kept))
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, length in zip(starts, lengths, strict=False):
        assert torch.equal(place[start : start + length], place[start] + torch.arange(length))


def test_blocks_are_hardly_empty():
    lengths = np.random.default_rng(0).integers(4, 40, 3000)
    text = lay_in_blocks(lengths, only_short=True)["block_text"]
    assert lengths.sum() > 0.85 * text.numel()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("lengths", [LENGTHS, (150, 97, 64, 9, 1)], ids=["short", "long"])
def test_texts_attend_to_themselves_alone(lengths, key_heads, causal, window):
    torch.manual_seed(0)
    given = [
        torch.randn(sum(lengths), heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, key_heads, key_heads)
    ]
    blocks = blocks_of(lengths, only_short=False)
    found = attend_in_blocks(*given, blocks, 0.0, None, causal, window)
    outputs = []
    for q, k, v in zip(*(states.split(lengths) for states in given), strict=True):
        k, v = (states.repeat_interleave(4 // key_heads, dim=1) for states in (k, v))
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = distance.abs() < (window or len(q))
        seen &= distance >= 0 if causal else True
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", probabilities, v))
    wanted = torch.cat(outputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((o * weights).sum(), given) for o in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_each_text_and_head_drops_others():
    lengths = (16,) * 12
    query = torch.zeros(sum(lengths), 4, 16, dtype=torch.float64)
    value = torch.eye(16, dtype=torch.float64).repeat(12, 1)[:, None].expand(-1, 4, -1)
    torch.manual_seed(0)
    output = attend_in_blocks(query, query, value, blocks_of(lengths), 0.5, None, False, None)
    kept = (output > 0).view(12, 16, 4, 16).transpose(1, 2).flatten(2).flatten(0, 1).double()
    agreement = (kept[:, None] == kept).double().mean(-1)
    others = agreement[~torch.eye(48, dtype=torch.bool)]
    assert abs(others.mean() - 0.5) < 0.02
    assert others.max() < 0.7


@pytest.fixture
def attends_in_blocks():
    """Let texts attend in blocks on the CPU as well, through transformers' layers, and no others.

    Padded ones go where they always do.
    """

    def attend(module, query, key, value, mask, **kwargs):
        if kwargs.get("cu_seq_lens_q") is None:
            return varlen_attention(module, query, key, value, mask, **kwargs)
        if "block_bias" not in kwargs:
            raise RuntimeError("no kernel")
        blocks = Blocks(*(kwargs[name] for name in BLOCK_INPUTS))
        states = (s[0].transpose(0, 1) for s in (query, key, value))
        causal = kwargs.get("is_causal")
        causal = module.is_causal if causal is None else causal
        how = kwargs.get("scaling"), causal, kwargs.get("sliding_window")
        return attend_in_blocks(*states, blocks, 0.0, *how)[None], None

    AttentionInterface.register(VARLEN, attend)
    yield
    AttentionInterface.register(VARLEN, varlen_attention)


@pytest.mark.parametrize("name", [name for name, (*_, packs) in ARCHITECTURES.items() if packs])
def test_blocks_go_through_an_architecture(name, tiny_transformer, tmp_path, attends_in_blocks):
    encoder = Encoder(EncoderSpec(save(name, tiny_transformer, tmp_path), "mean")).eval()
    texts = [Text(text, "document", None, 64) for text in TEXTS]
    alone, order = make_chunks(encoder, texts, 1000)
    with torch.no_grad():
        wanted = torch.cat([encoder(features) for features in alone])[order]
        encoder.packs, encoder._packed_for = True, ("cuda", None)
        transformer = encoder.model[0]
        transformer.model.set_attn_implementation(VARLEN)
        if transformer.model_forward_params is not None:
            transformer.model_forward_params |= {*PACKED_INPUTS, *BLOCK_INPUTS}
        chunks, order = make_chunks(encoder, texts, 1000)
        assert all("block_text" in features for features in chunks)
        found = torch.cat([encoder(features) for features in chunks])[order]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_long_texts_are_tried_too(tiny_bert, attends_in_blocks):
    # As on a GPU whose kernels for short texts do, and those for long ones do not.
    encoder = Encoder(EncoderSpec(str(tiny_bert))).eval()
    encoder.packs, encoder._packed_for = True, ("cuda", torch.float16)
    encoder.model[0].model.set_attn_implementation(VARLEN)
    assert not packs_exactly(encoder, torch.device("cpu"), None)
