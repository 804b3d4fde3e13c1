"""Each model is measured by its own similarity."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import SimilarityFunction

from embedtune.data.beir import read_beir
from embedtune.evaluation.compare import evaluate_models
from embedtune.evaluation.search import search
from embedtune.evaluation.similarity import pairwise_similarities, prepared, similarities

NAMES = ["cosine", "dot", "euclidean", "manhattan"]


@pytest.fixture
def embeddings():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 8, generator=draw) for n in (5, 20)]


@pytest.mark.parametrize("name", NAMES)
def test_similarities_are_those_of_sentence_transformers(embeddings, name):
    queries, documents = embeddings
    expected = SimilarityFunction.to_similarity_fn(name)(queries, documents)
    found = similarities(prepared(queries, name), prepared(documents, name), name)
    assert torch.allclose(found, expected, atol=1e-5)
    pairwise = pairwise_similarities(queries, documents[:5], name)
    assert torch.allclose(pairwise, expected[:, :5].diagonal(), atol=1e-5)
    best = search(queries, documents, torch.arange(20), 3, similarity=name)
    assert best.rows.tolist() == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalizes", [False, True])
def test_a_model_is_evaluated_by_its_own_similarity(tiny_transformer, tmp_path, name, normalizes):
    transformer = Transformer(str(tiny_transformer))
    with torch.no_grad():  # lengths that differ, so that the similarities do
        transformer.auto_model.embeddings.word_embeddings.weight[::3] *= 20
        for layer in transformer.auto_model.encoder.layer:
            layer.output.LayerNorm.weight[:4] *= 10
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean")]
    modules += [Normalize()] if normalizes else []
    model = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name=name)
    model.save_pretrained(str(tmp_path / "model"))
    corpus = {f"d{i}": f"{'long ' * (i % 7)}document number {i}" for i in range(40)}
    queries = {f"q{i}": f"document {i} {'and more ' * (i % 5)}" for i in range(12)}
    folder = write_beir(tmp_path / "set", queries, corpus)
    (result,) = evaluate_models([str(tmp_path / "model")], {"set": read_beir(folder, ("test",))})
    relevant = {f"q{i}": {f"d{i}"} for i in range(12)}
    expected = InformationRetrievalEvaluator(
        queries, corpus, relevant, main_score_function=name, name="set"
    )(model)
    assert result.metrics["ndcg@10"] == pytest.approx(expected[f"set_{name}_ndcg@10"], abs=1e-6)


def write_beir(folder, queries, corpus):
    import json

    (folder / "qrels").mkdir(parents=True)
    for file, texts in (("queries", queries), ("corpus", corpus)):
        lines = (json.dumps({"_id": k, "text": v}) + "\n" for k, v in texts.items())
        (folder / f"{file}.jsonl").write_text("".join(lines))
    rows = (f"q{i}\td{i}\t1\n" for i in range(len(queries)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder
