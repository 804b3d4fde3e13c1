"""Models that cannot be trained to what they export are refused in one line, before a step."""

from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    BoW,
    Normalize,
    Pooling,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from zoo_models import (
    Run,
    decoder,
    encoder,
    left_tokenizer,
    save,
    small_bert,
)

from embedtune.errors import InputError

FUNNEL = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1]}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def convolved(folder: Path) -> None:
    save([small_bert(folder), CNN(16, 8, [3]), Pooling(8), Normalize()], folder)


def convolved_words(folder: Path) -> None:
    words = WhitespaceTokenizer(["a", "dog", "walks", "home"], set())
    embeddings = WordEmbeddings(words, torch.randn(4, 16), update_embeddings=True)
    save([embeddings, CNN(16, 8, [3]), Pooling(8)], folder)


ON_PADDING = {
    "fnet": encoder("FNetConfig"),
    "funnel": encoder("FunnelConfig", sizes=FUNNEL, architectures=["FunnelModel"]),
    "convbert": encoder("ConvBertConfig", embedding_size=16, conv_kernel_size=3),
    "gpt2-left": decoder("GPT2Config", sizes=GPT2, tokens=left_tokenizer),
    "cnn": convolved,
    "cnn-of-words": convolved_words,
}


@pytest.mark.parametrize("build", ON_PADDING.values(), ids=ON_PADDING)
def test_an_embedding_that_depends_on_padding(build, tmp_path):
    build(tmp_path / "model")
    expected = r"model_name_or_path: '.*model': expected .* not depend on padding, found .* \d"
    with pytest.raises(InputError, match=expected):
        Run(tmp_path / "model", tmp_path).fit("run", 3)
    assert not (tmp_path / "run" / "model").exists()


def counting(folder: Path) -> None:
    save([BoW(["a", "dog"])], folder)


def frozen_words(folder: Path) -> None:
    words = WhitespaceTokenizer(["", "dog"], set())
    save([WordEmbeddings(words, torch.randn(2, 16)), Pooling(16)], folder)


@pytest.mark.parametrize("build", [counting, frozen_words])
def test_a_model_without_weights_to_train(build, tmp_path):
    build(tmp_path / "model")
    with pytest.raises(InputError, match="expected a model with weights to train, found none"):
        Run(tmp_path / "model", tmp_path).fit("run", 3)
