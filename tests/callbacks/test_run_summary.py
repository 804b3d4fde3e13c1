"""What a fit says before its first step."""

import json
import logging
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from embedtune.cli import main

ROWS = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(6)]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(ROWS)
    caplog.set_level(logging.INFO, logger="embedtune")


def write(rows: list[dict]) -> None:
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fit(model: Path, *flags: str) -> SentenceTransformer:
    """Train a step and return what was exported."""
    main(
        [
            *("fit", "--model.model_name_or_path", str(model), "--data.train_path", "train.jsonl"),
            *("--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--data.batch_size", "6"),
            *("--save_on_epoch_end", "false"),
            *flags,
        ]
    )
    return SentenceTransformer("run/model", device="cpu")


def saved(bare: Path, *more, **config) -> Path:
    """Save a sentence-transformers model of a bare checkpoint."""
    transformer = Transformer(str(bare))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "cls"), *more]
    SentenceTransformer(modules=modules, device="cpu", **config).save_pretrained("base")
    return Path("base")


def fact(caplog, label: str) -> str:
    """Return what the summary says under a label."""
    (summary,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("this run"))
    (line,) = (line for line in summary.splitlines() if line.startswith(f"  {label}  "))
    return line.removeprefix(f"  {label}").strip()


def test_pooling_and_who_says_so(tiny_transformer, tiny_qwen, caplog):
    fit(saved(tiny_transformer))
    assert fact(caplog, "pooling      ") == "cls, by the model's folder"
    caplog.clear()
    fit(tiny_transformer, "--model.pooling", "max")
    assert fact(caplog, "pooling      ") == "max, by model.pooling"
    for bare, usual in (
        (tiny_transformer, "cls or mean"),
        (tiny_qwen, "lasttoken of most decoders"),
    ):
        caplog.clear()
        fit(bare)
        told = fact(caplog, "pooling      ")
        assert told.startswith("mean, since the model's folder names none")
        assert "model.pooling" in told
        assert usual in told


@pytest.mark.parametrize(
    ("similarity", "more", "exported"),
    [
        ("dot", [], "cosine"),
        ("dot", [Normalize()], "dot"),
        ("euclidean", [], "cosine"),
        ("euclidean", [Normalize()], "euclidean"),
        ("manhattan", [Normalize()], "cosine"),
        ("cosine", [], "cosine"),
    ],
)
def test_what_is_exported_compares_as_it_was_trained(
    tiny_transformer, caplog, similarity, more, exported
):
    model = fit(saved(tiny_transformer, *more, similarity_fn_name=similarity))
    assert model.similarity_fn_name == exported
    assert fact(caplog, "embedding    ").endswith(f"compared by {exported}")
    assert ("similarity: cosine from now on" in caplog.text) == (similarity != exported)


def test_a_checkpoint_brings_its_similarity_and_prompts(tiny_transformer):
    base = saved(tiny_transformer, similarity_fn_name="dot", prompts={"query": "old: "})
    fit(base, "--data.query_prompt", "find: ", "--data.document_prompt", "text: ")
    main(["export", "run/checkpoints/last.ckpt", "exported"])
    model = SentenceTransformer("exported", device="cpu")
    assert model.similarity_fn_name == "cosine"
    assert (model.prompts["query"], model.prompts["document"]) == ("find: ", "text: ")


def test_prompts_of_the_yaml_are_trained_with_and_exported(tiny_transformer, caplog):
    base = saved(tiny_transformer, prompts={"query": "q: ", "passage": "p: "})
    model = fit(base)
    assert fact(caplog, "prompts      ") == "queries 'q: '; documents 'p: '"
    caplog.clear()
    losses = []
    for flags in ((), ("--data.query_prompt", "other: "), ("--data.document_prompt", "")):
        model = fit(base, *flags, "--model.dropout", "0")
        losses.append(Path("run/metrics.csv").read_text().splitlines()[1].split(",")[4])
    assert model.prompts["document"] == ""
    assert model.prompts["query"] == "q: "
    assert "queries 'q: '; documents none" in caplog.text
    assert len(set(losses)) == 3


def test_prompts_in_the_rows_are_those_of_the_rows_alone(tiny_bert, caplog, capsys):
    write([{**row, "prompt": "ask: "} for row in ROWS])  # FlagEmbedding's name
    model = fit(tiny_bert)
    assert fact(caplog, "prompts      ").startswith("queries 'ask: ', of all rows; documents none")
    assert model.prompts["query"] == "ask: "
    with pytest.raises(SystemExit):
        fit(tiny_bert, "--data.query_prompt", "other: ")
    error = capsys.readouterr().err
    assert "data.query_prompt: expected none, for rows of train.jsonl bring prompts" in error


def test_two_prompts_in_a_row_are_refused(tiny_bert, capsys):
    write([{**ROWS[0], "prompt": "a: ", "prompt_for_query": "b: "}, *ROWS[1:]])
    with pytest.raises(SystemExit):
        fit(tiny_bert)
    assert "train.jsonl:1: fields 'prompt_for_query' and 'prompt'" in capsys.readouterr().err


def test_prompts_that_nothing_uses_are_told(tiny_transformer, caplog):
    base = saved(tiny_transformer, prompts={"web_search_query": "Instruct: "})
    fit(base)
    told = fact(caplog, "prompts      ")
    assert told.startswith("queries none; documents none; the model's web_search_query not used")
    assert "data.query_prompt" in told


def test_longest_inputs(tiny_transformer, caplog):
    model = SentenceTransformer(str(saved(tiny_transformer)), device="cpu")
    model.max_seq_length = 16
    model.save_pretrained("short")
    fit(Path("short"), "--data.query_max_len", "8", "--data.passage_max_len", "12")
    told = fact(caplog, "longest input")
    assert told == "queries 8 tokens, documents 12; exported with the model's own 16"
    caplog.clear()
    fit(Path("short"), "--data.query_max_len", "8", "--data.passage_max_len", "24")
    told = fact(caplog, "longest input")
    assert told.endswith("documents 24; exported with the model's own 16")


@pytest.mark.parametrize("count", [6, 12])
def test_the_longest_input_is_raised_as_far_as_texts_go(tiny_transformer, caplog, count):
    """By the texts that are tokenised ahead, or by a sample where a fit is on fewer (12 rows)."""
    model = SentenceTransformer(str(saved(tiny_transformer)), device="cpu")
    model.max_seq_length = 16
    model.save_pretrained("short")
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(count)]
    rows[3]["pos"] = ["a b c d e f g h i j k l m n o p q r"]
    write(rows)
    longest = len(model.tokenizer(rows[3]["pos"][0])["input_ids"])
    assert longest > 16
    for limit, expected in ((64, longest), (18, 18)):
        caplog.clear()
        exported = fit(Path("short"), "--data.passage_max_len", str(limit))
        assert exported.max_seq_length == expected
        told = fact(caplog, "longest input")
        said = f"exported with {expected}, as the longest text has, above the model's own 16"
        assert told.endswith(said)


def test_what_is_trained_and_what_is_frozen(tiny_bert, caplog):
    """BERT's own pooler has no part in an embedding."""
    fit(tiny_bert)
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    frozen = sum(p.numel() for p in model[0].auto_model.pooler.parameters())
    trained = sum(p.numel() for p in model.parameters()) - frozen
    assert fact(caplog, "parameters   ") == f"{trained:,} trained, {frozen:,} frozen"
