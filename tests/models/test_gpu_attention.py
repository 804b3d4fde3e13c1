"""On a GPU texts are encoded without padding, to the same result. Skipped where there is none."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_attention import ARCHITECTURES, TEXTS, save
from torch import Tensor

from embedtune.data.chunks import Text, make_chunks
from embedtune.models.encoder import Encoder
from embedtune.models.gpu_attention import Blocks, attend_on_gpu, block_bias
from embedtune.models.packing import lay_in_blocks, to_device
from embedtune.models.spec import EncoderSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
PACKS = [name for name, (_, _, packs) in ARCHITECTURES.items() if packs]
LONG, SHORT = (150, 97, 64, 9, 1), (60, 17, 17, 16, 9, 3, 1)


def blocks_of(lengths: tuple[int, ...], kind: torch.dtype) -> Blocks | None:
    found = lay_in_blocks(np.array(lengths), only_short=kind != torch.float32)
    if not found:
        return None
    source, place, text = (tensor.to(GPU) for tensor in found.values())
    return Blocks(source, place, block_bias(text, kind))


def encode(encoder: Encoder, texts: list[str], tokens_per_chunk: int = 24) -> Tensor:
    chunks, order = make_chunks(
        encoder, [Text(text, "document", None, 64) for text in texts], tokens_per_chunk
    )
    return torch.cat([encoder(to_device(features, GPU)) for features in chunks])[order]


def states(lengths: tuple[int, ...], kind: torch.dtype, heads: int, key_heads: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(sum(lengths), n, 32, device=GPU, dtype=kind, requires_grad=True)
        for n in (heads, key_heads, key_heads)
    ]


def expected(
    lengths: tuple[int, ...], given: list[Tensor], causal: bool, window: int | None
) -> Tensor:
    """Attend to one text after the other in float64."""
    outputs = []
    for q, k, v in zip(*(t.double().split(lengths) for t in given), strict=True):
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = distance.abs() < window if window else torch.ones_like(distance, dtype=torch.bool)
        seen &= distance >= 0 if causal else True
        scores = torch.einsum("qhd,khd->hqk", q, k) / 32**0.5
        scores = scores.masked_fill(~seen.to(GPU), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [LONG, SHORT], ids=["long", "short"])
def test_kernels_attend_within_each_text(lengths, kind, key_heads, causal, window):
    given = states(lengths, kind, 4, key_heads)
    starts = torch.tensor([0, *lengths], device=GPU).cumsum(0).int()
    blocks = blocks_of(lengths, kind)
    output = attend_on_gpu(*given, starts, max(lengths), blocks, 0.0, None, causal, window)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[kind]
    wanted = expected(lengths, given, causal, window)
    torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)
    weights = torch.randn(wanted.shape, device=GPU, dtype=torch.float64)
    found = torch.autograd.grad((output.double() * weights).sum(), given)
    for gradient, exact in zip(
        found, torch.autograd.grad((wanted * weights).sum(), given), strict=True
    ):
        largest = float(exact.abs().max())
        torch.testing.assert_close(gradient, exact, rtol=0, atol=3 * tolerance * largest)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [LONG, SHORT], ids=["long", "short"])
def test_kernels_drop_probabilities_and_are_right_on_average(lengths, kind):
    given = states(lengths, kind, 4, 4)
    starts = torch.tensor([0, *lengths], device=GPU).cumsum(0).int()
    blocks = blocks_of(lengths, kind)

    def attend(dropout: float) -> Tensor:
        return attend_on_gpu(*given, starts, max(lengths), blocks, dropout, None, False, None)

    torch.manual_seed(1)
    first = attend(0.3)
    torch.manual_seed(1)
    assert torch.equal(attend(0.3), first)
    # The output is linear in the values, for what is dropped in both.
    weights = torch.randn_like(first)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad((attend(0.3) * weights).sum(), given[2])
    scale = (first.double() * weights).norm()
    difference = (gradient.double() * given[2]).sum() - (first.double() * weights).sum()
    assert abs(difference) < (1e-4 if kind == torch.float32 else 2e-2) * scale
    with torch.no_grad():
        mean = torch.stack([attend(0.3).double() for _ in range(2000)]).mean(0)
    exact = expected(lengths, given, False, None)
    assert (first - exact).abs().max() > 0.1
    assert (mean - exact).abs().max() < 0.1
    assert (mean - exact).abs().mean() < 0.01


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [16, 160])
def test_each_text_and_head_drops_others(length, kind):
    lengths, width = (length,) * 12, 16
    starts = torch.arange(0, sum(lengths) + 1, length, device=GPU).int()
    query = torch.zeros(sum(lengths), 4, 32, device=GPU, dtype=kind)
    value = torch.zeros(length, 32, device=GPU, dtype=kind)
    value[:width, :width] = torch.eye(width)
    value = value.repeat(12, 1)[:, None].expand(-1, 4, -1).contiguous()
    blocks = blocks_of(lengths, kind)
    output = attend_on_gpu(query, query, value, starts, length, blocks, 0.5, None, False, None)
    kept = (output[..., :width] > 0).view(12, length, 4, width).transpose(1, 2)
    kept = kept.flatten(2).flatten(0, 1).float()
    agreement = (kept[:, None] == kept).float().mean(-1)
    others = agreement[~torch.eye(48, dtype=torch.bool, device=GPU)]
    assert abs(others.mean() - 0.5) < 0.02
    assert others.max() < 0.7


def test_windows_and_dropout_in_float32_need_blocks():
    given = states(SHORT, torch.float32, 4, 4)
    starts = torch.tensor([0, *SHORT], device=GPU).cumsum(0).int()
    for dropout, window in ((0.1, None), (0.0, 5)):
        found = attend_on_gpu(*given, starts, max(SHORT), None, dropout, None, False, window)
        assert found is None


@pytest.fixture(params=["blocks", "long"])
def kernels(request, monkeypatch):
    """Let texts share blocks, or attend as long ones do."""
    if request.param == "long":
        monkeypatch.setattr("embedtune.models.encoder.lay_in_blocks", lambda *_, **__: {})


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", PACKS)
def test_an_architecture_is_encoded_as_on_a_cpu(name, tiny_transformer, tmp_path):
    path = save(name, tiny_transformer, tmp_path)
    encoder = Encoder(EncoderSpec(path, "mean")).eval()
    encoder.pack(GPU, torch.bfloat16)
    assert encoder.packs
    model = SentenceTransformer(modules=[Transformer(path), Pooling(32, "mean")], device="cpu")
    wanted = torch.as_tensor(model.encode(TEXTS))
    found = encode(encoder, TEXTS).detach().cpu()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        half = encode(encoder, TEXTS).detach().cpu()
    assert 0 < (half - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", PACKS)
def test_an_architecture_has_the_gradient_of_a_cpu(name, tiny_transformer, tmp_path):
    path = save(name, tiny_transformer, tmp_path)
    gradients = []
    for device in ("cpu", "cuda"):
        encoder = Encoder(EncoderSpec(path, "mean")).eval()
        encoder.pack(torch.device(device))
        wanted = [Text(text, "document", None, 64) for text in TEXTS]
        chunks, order = make_chunks(encoder, wanted, 1000)
        found = torch.cat([encoder(to_device(c, torch.device(device))) for c in chunks])[order]
        (found @ torch.arange(32.0, device=device).cos()).square().sum().backward()
        gradients.append(
            {n: p.grad.cpu() for n, p in encoder.named_parameters() if p.grad is not None}
        )
    on_cpu, on_gpu = gradients
    assert on_cpu.keys() == on_gpu.keys()
    largest = max(gradient.abs().max() for gradient in on_cpu.values())
    for parameter, gradient in on_cpu.items():
        assert (on_gpu[parameter] - gradient).abs().max() < 1e-4 * largest, parameter


def test_an_encoder_goes_from_device_to_device(tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert))).eval()
    found = []
    for device in ("cpu", "cuda", "cpu"):
        encoder.pack(torch.device(device), torch.bfloat16 if device == "cuda" else None)
        assert encoder.packs
        encoder.to(device)
        chunks, _ = make_chunks(encoder, [Text(t, "document", None, 64) for t in TEXTS], 64)
        chunk = to_device(chunks[0], torch.device(device))
        found.append(encoder(chunk).detach().cpu())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
def test_nothing_waits_for_the_gpu(half, tiny_bert):
    encoder = Encoder(EncoderSpec(str(tiny_bert), dropout=0.1)).train()
    encoder.pack(GPU, half)
    chunks, _ = make_chunks(encoder, [Text(t, "document", None, 64) for t in TEXTS], 64)
    chunk = to_device(chunks[0], GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", half, enabled=half is not None):
            encoder(chunk).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3"])
def test_compiled_layers_compute_the_same(name, tiny_transformer, tmp_path):
    path = save(name, tiny_transformer, tmp_path)
    gradients = []
    for compiled in (False, True):
        encoder = Encoder(EncoderSpec(path, "mean", dropout=0.0)).train()
        encoder.pack(GPU, torch.bfloat16)
        if compiled:
            encoder.compile_layers()
        for texts in (TEXTS[:3], TEXTS):  # chunks of another size compile nothing anew
            encoder.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = encode(encoder, texts, 1000).square().sum()
            loss.backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for parameter, gradient in gradients[0].items():
        assert (gradients[1][parameter] - gradient).abs().max() < 3e-2 * largest, parameter
