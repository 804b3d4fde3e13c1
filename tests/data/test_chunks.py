"""A batch encodes each distinct text once, with hardly any padding, and finds it again."""

import pytest
import torch

from embedtune.data.batch import text_ids
from embedtune.data.chunks import Text, make_chunks
from embedtune.data.collate import Collator
from embedtune.data.examples import Example
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec

EXAMPLES = [
    Example(0, "same query", None, ["short"], ["a b c d e f g h", "short"], ["short", "other"]),
    Example(3, "same query", "find: ", ["short"], ["x", "a b c d e f g h"], ["short"]),
]


def collate(tiny_bert, examples, **kwargs):
    settings = {"query_max_len": 16, "passage_max_len": 8, "tokens_per_chunk": 20, **kwargs}
    encoder = Encoder(EncoderSpec(str(tiny_bert))).eval()
    return encoder, Collator(encoder, **settings)(examples)


def test_each_distinct_text_is_encoded_once(tiny_bert):
    _, batch = collate(tiny_bert, EXAMPLES)
    # The query with and without its prompt are two texts.
    assert sum(len(chunk["input_ids"]) for chunk in batch.chunks) == 2 + 3
    assert batch.positive[0] == batch.positive[1] == batch.negative[1]
    assert batch.query[0] != batch.query[1]


def test_rows_point_at_the_right_embeddings(tiny_bert):
    encoder, batch = collate(tiny_bert, EXAMPLES)
    with torch.no_grad():
        encoded = torch.cat([encoder(features) for features in batch.chunks])
        for rows, texts, max_len in (
            (batch.query, ["same query", "find: same query"], 16),
            (batch.positive, ["short", "short"], 8),
            (batch.negative, ["a b c d e f g h", "short", "x", "a b c d e f g h"], 8),
        ):
            alone = [encoder(encoder.tokenize([t], "document", None, max_len)) for t in texts]
            torch.testing.assert_close(encoded[rows], torch.cat(alone), rtol=0, atol=1e-6)


def test_chunks_keep_within_their_tokens_and_are_sorted_by_length(tiny_bert):
    examples = [Example(i, "q" * i, None, ["w " * (i % 7 + 1)]) for i in range(1, 40)]
    _, batch = collate(tiny_bert, examples)
    shapes = [tuple(chunk["input_ids"].shape) for chunk in batch.chunks]
    assert all(n * t <= 20 or n == 1 for n, t in shapes)
    assert [t for _, t in shapes] == sorted((t for _, t in shapes), reverse=True)
    real = sum(int(chunk["attention_mask"].sum()) for chunk in batch.chunks)
    assert real / sum(n * t for n, t in shapes) > 0.9


def test_queries_and_documents_have_limits_of_their_own(tiny_bert):
    examples = [Example(0, "q" * 50, None, ["d" * 50])]
    _, batch = collate(tiny_bert, examples, tokens_per_chunk=1)
    assert sorted(int(chunk["attention_mask"].sum()) for chunk in batch.chunks) == [8, 16]


@pytest.mark.parametrize("texts", [[""], ["", "abc"], ["ab", "", "abcdef", ""]])
@pytest.mark.parametrize("packs", [False, True])
def test_a_text_without_tokens_is_encoded(tiny_qwen, packs, texts):
    """That tokenizer adds none of its own."""
    encoder = Encoder(EncoderSpec(str(tiny_qwen), pooling="max")).eval()
    if packs:
        encoder.pack(torch.device("cpu"))
    assert encoder.packs == packs
    chunks, order = make_chunks(encoder, [Text(t, "document", None, 8) for t in texts], 8)
    with torch.no_grad():
        encoded = torch.cat([encoder(features) for features in chunks])[order]
        assert encoded.isfinite().all()
        for text, embedding in zip(texts, encoded, strict=True):
            if text:
                alone = encoder(encoder.tokenize([text], "document", None, 8))
                torch.testing.assert_close(embedding, alone[0], rtol=0, atol=1e-5)


def test_text_ids_are_equal_for_equal_texts_alone():
    ids = text_ids(["a", "b", "a"])
    assert ids.dtype == torch.int64
    assert ids[0] == ids[2] != ids[1]
    assert ids.tolist() == text_ids(["a", "b", "a"]).tolist()


def test_known_positives_are_padded_with_zeros(tiny_bert):
    _, batch = collate(tiny_bert, EXAMPLES)
    assert batch.known_positive_id.tolist() == [
        text_ids(["short", "other"]).tolist(),
        [*text_ids(["short"]).tolist(), 0],
    ]
    assert batch.example_id.tolist() == [0, 3]
    assert batch.list_index.tolist() == [0, 1]
