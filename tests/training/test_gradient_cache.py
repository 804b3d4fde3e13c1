"""Chunks, deduplication, packing and the gradient cache give the gradients of the plain path."""

import pytest
import torch

from embedtune import EmbeddingModule
from embedtune.data.collate import Collator
from embedtune.data.examples import Example
from embedtune.losses import Distillation, InfoNCE, Matryoshka
from embedtune.losses.inputs import Embeddings, Target

CPU = torch.device("cpu")
DOCUMENTS = ["short", "a b c d e f g h i j", "one two", "x " * 20, "other words here", "中文"]
EXAMPLES = [
    # Repeated texts: a positive that is another's negative, a query asked twice.
    Example(
        i,
        f"query {i % 5} {'w ' * i}" if i != 3 else "query 0 ",
        None,
        [DOCUMENTS[i % 6]],
        [DOCUMENTS[(i + 2) % 6], f"negative {i}"],
        [DOCUMENTS[i % 6]],
    )
    for i in range(8)
]
LOSSES = {
    "pair": lambda: InfoNCE(0.1),
    "triplet": lambda: InfoNCE(0.1, in_batch_positives=True),
    "mrl": lambda: Matryoshka(InfoNCE(0.1, in_batch_positives=True), [8, 16, 32]),
    "distill": lambda: Distillation([8, 32], similarity_weight=1.0, rank_weight=1.0),
}


def examples_for(name: str) -> list[Example]:
    if name == "distill":
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(8, 32, generator=generator).numpy()
        return [Example(e.example_id, e.query, teacher=teacher[i]) for i, e in enumerate(EXAMPLES)]
    return [e._replace(negatives=()) for e in EXAMPLES] if name == "pair" else EXAMPLES


def gradients(module: EmbeddingModule) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def backward(module: EmbeddingModule, name: str, tokens_per_chunk: int) -> dict[str, torch.Tensor]:
    """Run a step's own path and return its gradients."""
    batch = Collator(module.encoder, 32, 32, tokens_per_chunk)(examples_for(name))
    encoded = module(batch.chunks)
    embeddings = Embeddings(
        encoded[batch.query],
        encoded[batch.positive] if len(batch.positive) else None,
        encoded[batch.negative] if len(batch.negative) else None,
    )
    module.loss(embeddings, target_of(batch))["loss"].backward()
    return gradients(module)


def target_of(batch) -> Target:
    return Target(
        teacher=batch.teacher,
        list_index=batch.list_index,
        own=torch.arange(len(batch.query)),
        query_id=batch.query_id,
        positive_id=batch.positive_id,
        negative_id=batch.negative_id if len(batch.negative_id) else None,
        positive_query_id=batch.query_id[batch.list_index],
        known_positive_id=batch.known_positive_id,
    )


def plain_backward(module: EmbeddingModule, name: str) -> dict[str, torch.Tensor]:
    """Encode each column in one padded batch with sentence-transformers, repetitions included."""
    examples = examples_for(name)
    batch = Collator(module.encoder, 32, 32, 10_000)(examples)
    columns = [
        [e.query for e in examples],
        [t for e in examples for t in e.positives],
        [t for e in examples for t in e.negatives],
    ]
    model = module.encoder.model
    encoded = [
        model(model.preprocess(column, max_length=32))["sentence_embedding"] if column else None
        for column in columns
    ]
    module.loss(Embeddings(*encoded), target_of(batch))["loss"].backward()
    return gradients(module)


@pytest.mark.parametrize("grad_cache", [False, True])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_those_of_the_plain_path(tiny_bert, name, packs, grad_cache):
    def make() -> EmbeddingModule:
        made = EmbeddingModule(str(tiny_bert), dropout=0.0, grad_cache=grad_cache)
        made.loss = LOSSES[name]()
        return made.train()

    expected = plain_backward(make(), name)
    module = make()
    if packs:
        module.encoder.pack(CPU)
        assert module.encoder.packs
    found = backward(module, name, tokens_per_chunk=40)
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-2
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        difference = (found[parameter] - gradient).abs().max().item()
        assert difference < 1e-5 * largest, parameter


def test_the_gradient_cache_replays_dropout(tiny_bert):
    found = []
    for grad_cache in (False, True):
        module = EmbeddingModule(str(tiny_bert), dropout=0.3, grad_cache=grad_cache).train()
        module.encoder.pack(CPU)
        module.loss = LOSSES["mrl"]()
        torch.manual_seed(7)
        found.append(backward(module, "mrl", tokens_per_chunk=40))
    plain, cached = found
    for parameter, gradient in plain.items():
        torch.testing.assert_close(cached[parameter], gradient, rtol=1e-5, atol=1e-7)


def test_the_gradient_cache_keeps_one_chunk_whatever_the_batch(tiny_bert):
    def kept_bytes(grad_cache: bool, repeats: int) -> int:
        module = EmbeddingModule(str(tiny_bert), grad_cache=grad_cache).train()
        module.encoder.pack(CPU)
        examples = [
            Example(i, f"{i} {e.query}", None, [f"{i} {e.positives[0]}"])
            for i, e in enumerate(EXAMPLES * repeats)
        ]
        chunks = Collator(module.encoder, 32, 32, 40)(examples).chunks
        kept = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(chunks)
        return sum(kept)

    assert kept_bytes(True, 16) < 1.2 * kept_bytes(True, 4)
    assert kept_bytes(False, 16) > 3 * kept_bytes(False, 4)
