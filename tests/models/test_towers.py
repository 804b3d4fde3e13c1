"""Each tower behind a Router has limits of its own."""

import pytest
import transformers
import zoo_models
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

from embedtune.models.encoder import Encoder
from embedtune.models.loading import cap_length
from embedtune.models.spec import EncoderSpec
from embedtune.models.towers import route

TEXT = "a " * 100


def bert(folder, positions: int, limit: int) -> list:
    sizes = {**zoo_models.SIZES, "max_position_embeddings": positions}
    config = zoo_models.configured(transformers.BertConfig, sizes)
    tokens = zoo_models.tokenizer(model_max_length=limit)
    return [zoo_models.transformer(config, folder, tokens), Pooling(16)]


def tokens(encoder: Encoder, role: str, max_len: int | None = None) -> int:
    longest = encoder.longest(role) if max_len is None else encoder.cap(max_len, role)
    return encoder.tokenize([TEXT], role, None, longest)["input_ids"].shape[-1]


@pytest.fixture
def encoder(tmp_path) -> Encoder:
    queries, documents = bert(tmp_path / "q", 20, 8), bert(tmp_path / "d", 40, 12)
    zoo_models.save([Router.for_query_document(queries, documents)], tmp_path / "model")
    return Encoder(EncoderSpec(str(tmp_path / "model")))


def test_a_tower_cuts_at_its_own_limit(encoder):
    assert (encoder.cap(1000, "query"), encoder.cap(9, "query")) == (20, 9)
    assert (encoder.longest_inputs, encoder.max_seq_length) == ([8, 12], 12)
    assert (tokens(encoder, "query"), tokens(encoder, "document")) == (8, 12)
    assert (tokens(encoder, "query", 16), tokens(encoder, "document", 10)) == (16, 10)
    assert cap_length(encoder.model, 1000) == 20  # of a text without a role


def test_a_limit_is_raised_as_far_as_a_tower_has_positions(encoder, tmp_path):
    encoder.raise_max_seq_length(30)
    assert (tokens(encoder, "query"), tokens(encoder, "document")) == (20, 30)
    encoder.raise_max_seq_length(10)
    assert tokens(encoder, "document") == 30
    zoo_models.save(list(encoder.model), tmp_path / "again")
    router = SentenceTransformer(str(tmp_path / "again"), device="cpu")[0]
    limits = [modules[0].max_seq_length for modules in router.sub_modules.values()]
    assert limits == [20, 30]


def test_a_role_may_have_a_limit_of_its_own(tmp_path):
    zoo_models.encoder("BertConfig")(tmp_path)
    zoo_models.edit(tmp_path, "sentence_bert_config.json", query_length=8)
    encoder = Encoder(EncoderSpec(str(tmp_path)))
    assert (tokens(encoder, "query"), tokens(encoder, "document")) == (8, 64)
    assert (encoder.longest_inputs, encoder.max_seq_length) == ([8, 64], 64)
    encoder.raise_max_seq_length(20)
    assert encoder.longest_inputs == [20, 64]


def test_a_static_tower_has_none(tmp_path):
    static = StaticEmbedding(zoo_models.tokenizer().backend_tokenizer, embedding_dim=16)
    router = Router.for_query_document([static], bert(tmp_path / "d", 40, 12))
    zoo_models.save([router], tmp_path / "model")
    encoder = Encoder(EncoderSpec(str(tmp_path / "model")))
    assert (encoder.longest_inputs, encoder.max_seq_length) == ([None, 12], None)
    assert (encoder.cap(1000, "query"), encoder.cap(1000, "document")) == (1000, 40)
    encoder.raise_max_seq_length(1000)
    assert (tokens(encoder, "query"), tokens(encoder, "document")) == (100, 40)


def test_positions_after_the_padding_are_not_counted_on(tmp_path):
    """sentence-transformers cuts RoBERTa's texts at more tokens than it has positions for."""
    sizes = {**zoo_models.SIZES, "max_position_embeddings": 34}
    zoo_models.encoder("RobertaConfig", sizes=sizes)(tmp_path)
    assert SentenceTransformer(str(tmp_path), device="cpu").max_seq_length == 34
    assert Encoder(EncoderSpec(str(tmp_path))).max_seq_length == 33


@pytest.mark.parametrize(
    ("mappings", "query", "document"),
    [
        ({}, "text", "text"),
        ({("query", None): "a"}, "a", "text"),
        ({("query", "text"): "a", ("query", None): "b", (None, "text"): "c"}, "a", "c"),
        ({(None, None): "b"}, "b", "b"),
    ],
)
def test_a_route_is_the_one_that_the_router_takes(mappings, query, document):
    names = sorted({"text", *mappings.values()})
    backend = zoo_models.tokenizer().backend_tokenizer
    routes = {n: [StaticEmbedding(backend, embedding_dim=i)] for i, n in enumerate(names, 1)}
    router = Router(routes, route_mappings=mappings or None)
    for role, expected in (("query", query), ("document", document)):
        assert route(router, role) == expected
        embedding = router(router.preprocess(["a"], task=role))["sentence_embedding"]
        assert embedding.shape[-1] == 1 + names.index(expected)
