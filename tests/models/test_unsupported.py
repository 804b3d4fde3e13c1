"""What is no text encoder, or contradicts itself, is one line when it is loaded."""

import pytest
import torch
from sentence_transformers import (
    CrossEncoder,
    MultiVectorEncoder,
    SentenceTransformer,
    SparseEncoder,
)
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
from transformers import AutoTokenizer, BertForSequenceClassification, GPT2Config, GPT2Model
from zoo_models import edit

from embedtune.errors import InputError
from embedtune.models.encoder import Encoder
from embedtune.models.loading import load_sentence_transformer
from embedtune.models.spec import EncoderSpec


@pytest.mark.parametrize("kind", [SparseEncoder, MultiVectorEncoder, CrossEncoder])
@pytest.mark.parametrize("tells", [True, False])
def test_a_model_of_another_kind(tiny_transformer, tmp_path, kind, tells):
    kind(str(tiny_transformer), device="cpu").save_pretrained(str(tmp_path))
    if not tells:  # as earlier releases wrote it
        (tmp_path / "config_sentence_transformers.json").unlink()
        if kind is CrossEncoder:
            (tmp_path / "modules.json").unlink()
    expected = (
        rf"model_name_or_path: '{tmp_path}': expected a SentenceTransformer or a bare encoder, "
        rf"which make one dense embedding a text, found a {kind.__name__}$"
    )
    with pytest.raises(InputError, match=expected):
        load_sentence_transformer(str(tmp_path), device="cpu")


@pytest.mark.parametrize(("labels", "is_refused"), [(1, True), (3, False)])
def test_a_bare_classifier_is_a_reranker_if_it_gives_one_score(
    tiny_transformer, tmp_path, labels, is_refused
):
    model = BertForSequenceClassification.from_pretrained(tiny_transformer, num_labels=labels)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_transformer).save_pretrained(tmp_path)
    if is_refused:
        with pytest.raises(InputError, match="found a CrossEncoder"):
            load_sentence_transformer(str(tmp_path), device="cpu")
    else:
        assert Encoder(EncoderSpec(str(tmp_path))).width == 32


def test_a_tokenizer_larger_than_the_embedding_table(tiny_bert, tmp_path):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    rows = model[0].auto_model.get_input_embeddings().num_embeddings
    model.tokenizer.add_tokens(["[QUERY]"])
    model.save_pretrained(str(tmp_path))
    expected = rf"at most the {rows} tokens of .*, found {rows + 1}, the last of them '\[QUERY\]'"
    with pytest.raises(InputError, match=expected):
        Encoder(EncoderSpec(str(tmp_path)))
    model[0].auto_model.resize_token_embeddings(rows + 1)
    model.save_pretrained(str(tmp_path))
    Encoder(EncoderSpec(str(tmp_path)))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_router_without_a_route(tiny_bert, tmp_path, is_first):
    transformer, pooling, _ = SentenceTransformer(str(tiny_bert), device="cpu")
    routes = {"query": [Dense(32, 8)], "doc": [Dense(32, 8)]}
    if is_first:
        routes = {name: [transformer, pooling, dense[0]] for name, dense in routes.items()}
        modules = [Router(routes)]
    else:
        modules = [transformer, pooling, Router(routes)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path))
    expected = "expected a Router with a route for document, found query, doc"
    with pytest.raises(InputError, match=expected):
        Encoder(EncoderSpec(str(tmp_path)))


def test_word_embeddings_by_a_tokenizer_of_transformers(tiny_transformer, tmp_path):
    words = AutoTokenizer.from_pretrained(tiny_transformer)
    embeddings = WordEmbeddings(words, torch.randn(len(words), 8))
    SentenceTransformer(modules=[embeddings, Pooling(8)], device="cpu").save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(InputError, match="expected WordEmbeddings with a tokenizer of words"):
        Encoder(EncoderSpec(str(tmp_path)))


@pytest.mark.parametrize("end", ["<|im_end|>", None])
def test_a_tokenizer_that_names_no_padding(tiny_qwen, tmp_path, end, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen)
    tokenizer.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1)
    GPT2Model(config).save_pretrained(tmp_path)
    edit(tmp_path, "tokenizer_config.json", pad_token=None, eos_token=end)
    if end is None:
        with pytest.raises(InputError, match="expected a tokenizer with a token to pad with"):
            Encoder(EncoderSpec(str(tmp_path)))
        return
    with caplog.at_level("INFO"):
        encoder = Encoder(EncoderSpec(str(tmp_path)))
    assert f"names no token to pad with: it is '{end}'" in caplog.text
    assert encoder.tokenize(["a", "a b"], "query", None, 8)["attention_mask"].tolist() == [
        [1, 0, 0],
        [1, 1, 1],
    ]


def test_pooling_is_chosen_only_where_there_are_tokens(tiny_bert, tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = SentenceTransformer(str(tiny_bert), device="cpu").tokenizer.backend_tokenizer
    modules = [StaticEmbedding(tokenizer, embedding_dim=8)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=r"model.pooling: .* tokens, found StaticEmbedding in"):
        Encoder(EncoderSpec(str(tmp_path), pooling="mean"))
