"""A trained model in a few words."""

import torch
from sentence_transformers import SentenceTransformer

from embedtune import Embedding


def test_embedding_encodes_in_order_without_gradients(tiny_bert):
    embedding = Embedding.from_pretrained(tiny_bert).to("cpu")
    texts = [f"text {'x ' * (i % 7)}{i}" for i in range(50)]
    found = embedding.encode(texts, batch_size=8)
    expected = SentenceTransformer(str(tiny_bert), device="cpu").encode(texts)
    assert found.shape == (50, 32)
    assert (found.device.type, found.dtype, found.requires_grad) == ("cpu", torch.float32, False)
    torch.testing.assert_close(found, torch.as_tensor(expected))
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
