"""A trained model in a few words."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from embedtune import Embedding
from embedtune.data.chunks import Text, make_chunks
from embedtune.data.scored_pairs import ScoredPairs
from embedtune.errors import InputError
from embedtune.evaluation import evaluate_models
from embedtune.models import Encoder, EncoderSpec


def test_embedding_encodes_in_order_without_gradients(tiny_bert):
    embedding = Embedding.from_pretrained(tiny_bert).to("cpu")
    texts = [f"text {'x ' * (i % 7)}{i}" for i in range(50)]
    found = embedding.encode(texts, batch_size=8)
    expected = SentenceTransformer(str(tiny_bert), device="cpu").encode(texts)
    assert found.shape == (50, 32)
    assert (found.device.type, found.dtype, found.requires_grad) == ("cpu", torch.float32, False)
    torch.testing.assert_close(found, torch.as_tensor(expected))
    torch.testing.assert_close(embedding.encode(texts[3]), found[3])
    (found * 2).sum()  # an ordinary tensor, not one of inference mode
    assert not found.is_inference()


def test_embedding_takes_a_prompt_and_a_longest_input(tiny_bert):
    embedding = Embedding.from_pretrained(tiny_bert)
    prompted = embedding.encode(["text"], prompt="query: ")
    torch.testing.assert_close(prompted, embedding.encode(["query: text"]))
    long_text = "a b c d e f g h i j k l m n o p"
    torch.testing.assert_close(
        embedding.encode([long_text], max_len=6), embedding.encode(["a b c d"])
    )
    assert embedding.encode([]).shape == (0, 32)
    # Longer than the model's 64 positions, by the default of 512 tokens.
    torch.testing.assert_close(embedding.encode(["a " * 100]), embedding.encode(["a " * 62]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size: .*found 0"),
        ({"max_len": -1}, "max_len: .*found -1"),
        ({"max_len": 2}, "max_len: expected more tokens than begin and end a text, found 2"),
        ({"prompt": "a " * 70}, "max_len: expected more tokens than the prompt .*, found 64"),
    ],
)
def test_embedding_refuses_what_leaves_nothing_of_a_text(tiny_bert, setting, message):
    with pytest.raises(InputError, match=message):
        Embedding(tiny_bert).encode(["text", "other"], **setting)


# --- Texts without tokens -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(tiny_qwen, tmp_path_factory) -> Path:
    """Return a model whose tokenizer adds no tokens of its own."""
    folder = tmp_path_factory.mktemp("decoder")
    modules = [Transformer(str(tiny_qwen)), Pooling(32, pooling_mode="mean")]
    with torch.no_grad():  # padding is no zero, so that it shows
        modules[0].auto_model.embed_tokens.weight.add_(0.1 * torch.randn(32))
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("texts", [[""], ["", ""], ["", "a b"], [*["a b"] * 64, ""]])
def test_an_empty_text_is_encoded_as_in_training(decoder, texts):
    encoder = Encoder(EncoderSpec(str(decoder))).eval()
    with torch.no_grad():
        chunks, order = make_chunks(encoder, [Text("", "document", None, 64)], 64)
        trained = torch.cat([encoder(chunk) for chunk in chunks])[order]
    found = Embedding(decoder).encode(texts)
    torch.testing.assert_close(found[texts.index("")], trained[0])
    assert found[0].norm() > 0
    torch.testing.assert_close(
        Embedding(decoder).encode([""], prompt="find: "), Embedding(decoder).encode(["find: "])
    )


def test_an_empty_document_is_evaluated_wherever_it_falls(decoder):
    """Also where it is alone in the last of sentence-transformers' batches of 32."""
    texts = [f"text {i}" for i in range(32)] + [""]
    pairs = ScoredPairs(texts, [f"other {i}" for i in range(33)], torch.arange(33.0))
    (result,) = evaluate_models([str(decoder)], {"sts": pairs})
    assert -1 <= result.quality() <= 1
