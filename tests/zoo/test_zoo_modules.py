"""Models of other modules than a transformer, a pooling and a Normalize."""

from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    BoW,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    StaticEmbedding,
    WeightedLayerPooling,
    WordEmbeddings,
    WordWeights,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from torch import nn
from zoo_models import (
    SIZES,
    WORDS,
    Build,
    check,
    configured,
    enlarge,
    named,
    save,
    small_bert,
    tokenizer,
    transformer,
)

SPOKEN = ["this", "dog", "love", "number", "what", "two", "words", "one", "three", "four", "cut"]
UNIT = torch.nn.Identity()


def modules(make) -> Build:
    """Return how a model is built of the modules that ``make`` returns for a folder."""

    def build(folder: Path) -> None:
        made = make(folder)
        for module in made[isinstance(made[0], WordEmbeddings) :]:  # of which padding stays zero
            enlarge(module)
        save(made, folder)

    return build


def static() -> StaticEmbedding:
    return StaticEmbedding(tokenizer().backend_tokenizer, embedding_dim=16)


def words(update: bool = True) -> WordEmbeddings:
    vocab = ["PADDING_TOKEN", *SPOKEN]
    weights = torch.randn(len(vocab), 16, generator=torch.Generator().manual_seed(2))
    weights[0] = 0
    return WordEmbeddings(WhitespaceTokenizer(vocab, set()), weights, update_embeddings=update)


def layers(folder: Path) -> list[nn.Module]:
    bert = small_bert(folder, output_hidden_states=True)
    return [bert, WeightedLayerPooling(16, num_hidden_layers=2, layer_start=1), Pooling(16, "mean")]


def towers(folder: Path) -> list[nn.Module]:
    queries = [transformer(configured(transformers.BertConfig, SIZES), folder / "q"), Pooling(16)]
    sizes = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 34}
    documents = transformer(
        configured(transformers.RobertaConfig, sizes), folder / "d", tokenizer(model_max_length=32)
    )
    return [Router.for_query_document(queries, [documents, Pooling(16, "cls")]), Normalize()]


def after_pooling(folder: Path) -> list[nn.Module]:
    heads = [[Dense(16, 16, activation_function=UNIT), Normalize()] for _ in range(2)]
    return [small_bert(folder), Pooling(16), Router.for_query_document(*heads)]


def mapped(folder: Path) -> list[nn.Module]:
    routes = {"small": [static()], "large": [small_bert(folder), Pooling(16)]}
    mappings = {("query", None): "small", (None, "text"): "large"}
    return [Router(routes, route_mappings=mappings), Normalize()]


CLIP_TEXT = {
    **SIZES,
    "vocab_size": len(WORDS),
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def clip_text(folder: Path) -> list[nn.Module]:
    config = transformers.CLIPTextConfig(**CLIP_TEXT)
    return [transformer(config, folder / "bare"), Pooling(16)]


def clip(folder: Path) -> None:
    images = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=images, projection_dim=12)
    enlarge(transformers.CLIPModel(config)).save_pretrained(folder / "bare")
    tokenizer().save_pretrained(folder / "bare")
    transformers.CLIPImageProcessor(crop_size=16).save_pretrained(folder / "bare")
    save([Transformer(str(folder / "bare"))], folder)


MODELS = {
    "static": modules(lambda folder: [static(), Normalize()]),
    "static-dense": modules(lambda folder: [static(), Dense(16, 12)]),
    "words": modules(lambda folder: [words(), Pooling(16)]),
    "words-frozen": modules(lambda folder: [words(False), Pooling(16), Dense(16, 16)]),
    "words-weighted": modules(
        lambda folder: [
            words(),
            WordWeights(words().tokenizer.get_vocab(), {"dog": 3.0}),
            Pooling(16),
        ]
    ),
    "cnn": modules(lambda folder: [words(), CNN(16, 8, [1, 3]), Pooling(16)]),
    "lstm": modules(lambda folder: [words(), LSTM(16, 8), Pooling(16)]),
    "bow": modules(lambda folder: [BoW(SPOKEN), Dense(len(SPOKEN), 16)]),
    "clip": clip,
    "clip-text": modules(clip_text),
    "weighted-layers": modules(layers),
    "dense-dense": modules(
        lambda folder: [small_bert(folder), Pooling(16), Dense(16, 24), Dense(24, 12), Normalize()]
    ),
    "layer-norm": modules(lambda folder: [small_bert(folder), Pooling(16), LayerNorm(16)]),
    "normalize-inside": modules(
        lambda folder: [small_bert(folder), Pooling(16), Normalize(), Dense(16, 16)]
    ),
    "concatenated": modules(
        lambda folder: [small_bert(folder), Pooling(16, ("cls", "mean", "max")), Normalize()]
    ),
    "dropout": modules(lambda folder: [small_bert(folder), Pooling(16), Dropout(0.3)]),
    "dense-of-tokens": modules(
        lambda folder: [
            small_bert(folder),
            Dense(16, 12, module_input_name="token_embeddings"),
            Pooling(12),
        ]
    ),
    "static-and-transformer": modules(
        lambda folder: [
            Router.for_query_document([static()], [small_bert(folder), Pooling(16)]),
            Normalize(),
        ]
    ),
    "two-towers": modules(towers),
    "one-tower-before-pooling": modules(
        lambda folder: [
            Router.for_query_document([bert := small_bert(folder)], [bert]),
            Pooling(16),
        ]
    ),
    "router-after-pooling": modules(after_pooling),
    "router-with-mappings": modules(mapped),
}

PADDED = {
    *("static", "static-dense", "words", "words-frozen", "words-weighted", "cnn", "lstm", "bow"),
    *("clip", "clip-text", "weighted-layers"),
    *("static-and-transformer", "two-towers", "one-tower-before-pooling", "router-with-mappings"),
}
"""Models that are not encoded without padding: attention is not all that mixes their tokens."""


@pytest.mark.parametrize("name", named(MODELS))
def test_a_model_of_other_modules_is_trained_and_exported_as_what_it_is(name, tmp_path):
    check(MODELS[name], tmp_path, packs=name not in PADDED)
