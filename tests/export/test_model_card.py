"""The model card of an exported folder: what the hub reads in it, and what people do."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from sentence_transformers import SentenceTransformer

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.checkpoints.training_facts import NOTHING_KNOWN, TrainingFacts
from embedtune.export.folder import export_encoder
from embedtune.export.model_card import as_code, write_model_card
from embedtune.losses import InfoNCE, Matryoshka
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec
from embedtune.training.facts import describe_loss, training_facts

WICKED = "a|b `c` ``d`` <script>alert(1)</script>\n---\n: yes # {{ 1 }} \\| _e_ *f*"
FACTS = TrainingFacts(
    data={
        "files": ["train.jsonl"],
        "format": "triplet",
        "rows": 12_809,
        "examples": 919,
        "negatives": 7,
        "teacher_width": None,
        "query_prompt": None,
        "query_max_len": 64,
        "passage_max_len": 32,
    },
    configuration={"loss": "InfoNCE(temperature=0.02)", "learning rate": 5e-5, "seed": 666},
    mrl_dims=None,
    step=58,
    epoch=2,
    base_metrics={"val/docs/ndcg@10": 0.5},
    metrics={"val/docs/ndcg@10": 0.61234, "val/docs/loss": 1.5},
)
MRL = FACTS._replace(
    mrl_dims=[32, 16, 8],
    base_metrics={"val/docs/ndcg@10": 0.5, "val/docs/ndcg@10/8": 0.25, "val/sts/spearman": 0.75},
    metrics={
        "val/docs/ndcg@10": 0.6,
        "val/docs/mrr@10": 0.7,
        "val/docs/ndcg@10/32": 0.6,
        "val/docs/ndcg@10/8": 0.375,
        "val/docs/mrr@10/8": float("nan"),
        "val/sts/spearman": 0.875,
    },
    intervals={
        "val/docs/ndcg@10": [-0.01, 0.21],
        "val/docs/ndcg@10/8": [0.05, 0.2],
        "val/sts/spearman": [0.0, 0.0],
    },
)


@pytest.fixture
def encoder(tiny_bert) -> Encoder:
    return Encoder(EncoderSpec(str(tiny_bert)))


def card(folder: Path, encoder: Encoder, facts: TrainingFacts | None) -> ModelCard:
    write_model_card(folder, encoder, facts)
    return ModelCard.load(folder / "README.md")


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table, as a reader sees them: entities are resolved."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    found: list[list[list[str]]] = []
    for token in parser.parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level == 4:
            shown = [child.content for child in token.children if child.type != "html_inline"]
            found[-1][-1].append("".join(shown))
    return found


def settings(text: str) -> dict[str, str]:
    return {row[0]: row[1] for table in tables(text) for row in table if len(row) == 2}


def snippets(text: str, folder: Path) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [block.replace("sentence_transformers_model_id", str(folder)) for block in blocks]


# --- What the hub reads ---------------------------------------------------------------------


def test_the_metadata_is_what_the_hub_asks_for(encoder, tmp_path):
    data = card(tmp_path, encoder, FACTS).data.to_dict()
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    expected = ["sentence-transformers", "sentence-similarity", "feature-extraction", "embedtune"]
    assert data["tags"] == expected
    # A folder is no model on the hub, and this one's own card says nothing of these.
    assert not {"base_model", "license", "language", "model_name"} & data.keys()
    (result,) = data["model-index"][0]["results"]
    assert result["task"]["type"] == "information-retrieval"
    assert result["dataset"] == {"name": "docs", "type": "unknown", "config": "docs"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("cosine_ndcg@10", 0.6123)


def test_matryoshka_is_a_tag_and_its_widths_are_told_apart(encoder, tmp_path):
    data = card(tmp_path, encoder, MRL).data
    assert "matryoshka" in data.tags
    docs, sts = data.to_dict()["model-index"][0]["results"]
    found = [(m["type"], m["value"], m.get("args")) for m in docs["metrics"]]
    assert found == [
        ("cosine_ndcg@10", 0.6, None),
        ("cosine_ndcg@10", 0.375, {"truncate_dim": 8}),
        ("cosine_mrr@10", 0.7, None),
    ]
    assert (sts["task"]["type"], sts["dataset"]["name"]) == ("semantic-similarity", "sts")
    assert sts["metrics"][0]["type"] == "spearman_cosine"


@pytest.mark.parametrize(
    ("name", "is_hub_id"),
    [
        ("org/some-model_v1.5", True),
        ("bert-base-uncased", False),
        ("/models/bert", False),
        ("./bert", False),
        ("models/bert", False),  # a folder of that name is there
    ],
)
def test_a_base_model_is_a_hub_id_and_never_a_path(encoder, tmp_path, monkeypatch, name, is_hub_id):
    monkeypatch.chdir(tmp_path)
    Path("models/bert").mkdir(parents=True)
    encoder.spec = encoder.spec._replace(model_name_or_path=name)
    found = card(tmp_path, encoder, FACTS)
    assert found.data.base_model == (name if is_hub_id else None)
    assert (f"[{name}](https://huggingface.co/{name})" in found.text) == is_hub_id
    assert "/models/bert" not in found.content
    assert ("based on some-model_v1.5" in found.text) == is_hub_id


@pytest.mark.parametrize(
    ("metadata", "licence", "language"),
    [
        ("license: apache-2.0\nlanguage: en", "apache-2.0", ["en"]),
        ("license: mit\nlanguage: [de, 'no', xx-invalid, 3]", "mit", ["de", "no"]),
        ("license: Apache 2.0\nlanguage: English", None, None),
        ("license: [mit]\nlanguage: {en: 1}", None, None),
        ("license: : mit", None, None),  # no YAML
        ("- no mapping", None, None),
    ],
)
def test_licence_and_language_are_those_of_the_base_model(
    tiny_bert, tmp_path, metadata, licence, language
):
    base = tmp_path / "base"
    SentenceTransformer(str(tiny_bert), device="cpu").save_pretrained(str(base))
    (base / "README.md").write_text(f"---\n{metadata}\n---\n\n# A model\n")
    found = card(tmp_path, Encoder(EncoderSpec(str(base))), None)
    assert (found.data.license, found.data.language) == (licence, language)
    assert ("Licence" in settings(found.text)) == (licence is not None)


def test_so_they_are_for_a_model_from_the_hub(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "README.md").write_text("---\nlicense: mit\n---\n")
    encoder.spec = encoder.spec._replace(model_name_or_path="org/name")
    assert card(tmp_path, encoder, None).data.license == "mit"


# --- What people read -----------------------------------------------------------------------


def test_the_facts_of_the_fit_are_told(encoder, tmp_path):
    text = card(tmp_path, encoder, FACTS).text
    found = settings(text)
    assert found["Embedding width"] == "32"
    assert found["Similarity"] == "cosine"
    assert found["Longest input"] == "64 tokens"
    assert found["Files"] == "train.jsonl"
    assert found["Format"].startswith("triplet: ")
    assert (found["Rows"], found["Examples"]) == ("12,809", "919 an epoch")
    assert found["Hard negatives"].startswith("7 a query")
    assert (found["Longest query"], found["Longest document"]) == ("64 tokens", "32 tokens")
    assert (found["Loss"], found["Seed"]) == ("InfoNCE(temperature=0.02)", "666")
    assert "after step 58, in epoch 2" in text
    assert not {"Trained widths", "Teacher", "Query prompt", "Prompt query"} & found.keys()
    assert tables(text)[1] == [
        ["Set", "Metric", "Base model", "This model", "Change"],
        ["docs", "nDCG@10", "0.5000", "0.6123", "+0.1123, unclear"],
    ]


def test_the_metrics_are_told_at_every_width(encoder, tmp_path):
    text = card(tmp_path, encoder, MRL).text
    assert settings(text)["Trained widths"] == "32, 16, 8 (Matryoshka)"
    assert tables(text)[1] == [
        ["Set", "Metric", "Width", "Base model", "This model", "Change"],
        ["docs", "nDCG@10", "full", "0.5000", "0.6000", "+0.1000 (-0.0100 to +0.2100), unclear"],
        ["docs", "nDCG@10", "8", "0.2500", "0.3750", "+0.1250 (+0.0500 to +0.2000), better"],
        ["docs", "MRR@10", "full", "-", "0.7000", "-"],
        [
            *("sts", "Spearman correlation", "full", "0.7500", "0.8750"),
            "+0.1250 (+0.0000 to +0.0000), equal",
        ],
    ]
    assert "followed by its 95% interval, a paired bootstrap of 2,000 resamples" in text


@pytest.mark.parametrize(
    ("monitor", "value", "is_below"),
    [
        ("val/docs/ndcg@10", 0.49, True),
        ("val/docs/ndcg@10", 0.5, False),
        ("val/docs/ndcg@10", 0.6, False),
        ("val/docs/ndcg@10", float("nan"), False),
        ("val/docs/loss", 0.49, False),  # less is better
        ("val/gone/ndcg@10", 0.49, False),
        (None, 0.49, False),
    ],
)
def test_a_model_below_its_base_says_so(encoder, tmp_path, monitor, value, is_below):
    facts = FACTS._replace(
        base_metrics={"val/docs/ndcg@10": 0.5, "val/docs/loss": 0.5},
        metrics={"val/docs/ndcg@10": value, "val/docs/loss": value, "val/docs/mrr@10": 0.5},
        intervals={"val/docs/ndcg@10": [-0.02, -0.001]},
        monitor=monitor,
    )
    text = card(tmp_path, encoder, facts).text
    assert ("**This model is below the base model** by `val/docs/ndcg@10`" in text) == is_below
    if value == 0.49:
        assert "| -0.0100 (-0.0200 to -0.0010), worse |" in text


def test_without_a_base_there_is_nothing_to_compare_with(encoder, tmp_path):
    text = card(tmp_path, encoder, FACTS._replace(base_metrics={})).text
    assert tables(text)[1][0] == ["Set", "Metric", "This model"]


@pytest.mark.parametrize("facts", [None, FACTS._replace(data={}, configuration={}, metrics={})])
def test_what_is_not_known_is_left_out(encoder, tmp_path, facts):
    found = card(tmp_path, encoder, facts)
    headings = re.findall(r"^## (.*)", found.text, re.MULTILINE)
    assert headings == ["Intended use and limits", "How to use it"]
    assert "no measurements" in found.text
    assert "trained on" not in found.text
    assert "model-index" not in found.data.to_dict()


def test_many_files_are_counted(encoder, tmp_path):
    data = {**FACTS.data, "files": [f"{i}.jsonl" for i in range(13)]}
    found = settings(card(tmp_path, encoder, FACTS._replace(data=data)).text)
    assert found["Files"].endswith("9.jsonl and 3 more")


@pytest.mark.parametrize("wicked", [WICKED, ": yes", "no", "---", " a ", "\udcff", "a\\|b", "`"])
def test_special_characters_break_neither_tables_nor_yaml(encoder, tmp_path, wicked):
    encoder.set_prompt("query", wicked)
    facts = FACTS._replace(
        data={**FACTS.data, "files": [wicked, "b.jsonl"], "query_prompt": wicked},
        configuration={"loss": wicked, "seed": 1},
        metrics={f"val/{wicked.replace('/', '')}/ndcg@10": 0.5, "val/b/ndcg@10": 0.25},
    )
    found = card(tmp_path, encoder, facts)
    told = settings(found.text)
    assert told["Prompt query"] == repr(wicked)
    assert told["Query prompt"] == f"{wicked!r}, in all rows"
    assert (told["Files"].endswith(", b.jsonl"), told["Seed"]) == (True, "1")
    if wicked.isprintable():
        assert told["Files"].split(", ")[0].strip() == told["Loss"].strip() == wicked.strip()
    assert [len(row) for row in tables(found.text)[1]] == [3, 3, 3]
    assert "<script>" not in MarkdownIt("commonmark", {"html": True}).render(found.text)
    results = found.data.to_dict()["model-index"][0]["results"]
    assert [r["metrics"][0]["value"] for r in results] == [0.5, 0.25]
    if wicked.isprintable() and "/" not in wicked:
        assert results[0]["dataset"]["name"] == wicked


def test_code_is_plain_where_it_can_be():
    assert as_code("InfoNCE(temperature=0.02)") == "`InfoNCE(temperature=0.02)`"
    assert as_code("<b>") == "`<b>`"
    assert as_code("a\nb") == "<code>a&#92;nb</code>"


# --- What people run ------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [None, MRL])
def test_the_snippets_run(encoder, tmp_path, capsys, facts):
    encoder.set_prompt("query", "find: ")
    export_encoder(encoder, tmp_path / "model", facts=facts)
    blocks = snippets((tmp_path / "model" / "README.md").read_text(), tmp_path / "model")
    assert len(blocks) == (1 if facts is None else 2)
    for block in blocks:
        names: dict = {}
        exec(block, names)  # what a reader does
        comments = re.findall(r"  # (.*)", block)
        assert capsys.readouterr().out.startswith("\n".join(comments))
        assert names["model"].truncate_dim == (None if block is blocks[0] else 16)


def test_a_push_puts_the_repository_into_the_snippet(encoder, tmp_path):
    export_encoder(encoder, tmp_path / "model", facts=MRL)
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    model.save_pretrained(str(tmp_path / "pushed"), model_name="me/mine")
    text = (tmp_path / "pushed" / "README.md").read_text()
    assert 'SentenceTransformer("me/mine")' in text
    assert 'SentenceTransformer("me/mine", truncate_dim=16)' in text


def test_code_of_its_own_is_asked_for(encoder, tmp_path):
    encoder.spec = encoder.spec._replace(trust_remote_code=True)
    text = card(tmp_path, encoder, None).text
    assert '("sentence_transformers_model_id", trust_remote_code=True)' in text


# --- What a fit tells -----------------------------------------------------------------------

ROWS = {
    "pair": {"query": "a", "pos": ["b", "c"], "prompt_for_query": "find: "},
    "scored": {"query": "a", "pos": ["b", "c"], "scores": [0.8, 0.1]},
    "distill": {"query": "a"},
}


def run(folder: Path, model: Path, name: str, command: str) -> TrainingFacts:
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n" + json.dumps(ROWS[name]) + "\n")
    teacher = None
    if name == "distill":
        teacher = str(folder / "teacher.f32")
        np.eye(2, 48, dtype=np.float32).tofile(teacher)
    data = EmbeddingDataModule(str(path), str(path), teacher_path=teacher, val_teacher_path=teacher)
    module = EmbeddingModule(str(model))
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0 if command == "fit" else 1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )
    getattr(trainer, command)(module, datamodule=data)
    write_model_card(folder, module.encoder, training_facts(trainer, module))
    return training_facts(trainer, module)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pair", {"rows": 2, "examples": 4, "query_prompt": "find: ", "passage_max_len": 64}),
        ("scored", {"rows": 2, "examples": 2, "query_prompt": None, "teacher_width": None}),
        ("distill", {"rows": 2, "teacher_width": 48, "passage_max_len": None}),
    ],
)
def test_every_format_has_its_facts(tiny_bert, tmp_path, name, expected):
    facts = run(tmp_path, tiny_bert, name, "fit")
    always = {"files": [f"{name}.jsonl"], "format": name, "negatives": None}
    assert facts.data | always | expected == facts.data
    assert facts.configuration | {"steps": 1, "batch size": 32, "seed": 666} == facts.configuration
    assert "epochs" not in facts.configuration
    assert (facts.step, facts.epoch, facts.mrl_dims) == (1, 1, None)
    found = settings((tmp_path / "README.md").read_text())
    assert found.get("Teacher") == ("embeddings of 48 numbers" if name == "distill" else None)
    assert ("Longest document" in found) == (name != "distill")
    assert ("Prompt query" in found) == ("Query prompt" in found) == (name == "pair")


def test_a_validation_has_none(tiny_bert, tmp_path):
    assert run(tmp_path, tiny_bert, "scored", "validate") == NOTHING_KNOWN


# --- What a checkpoint holds ----------------------------------------------------------------


def test_facts_survive_a_checkpoint_and_json(tmp_path):
    torch.save({"training_facts": MRL._asdict()}, tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)["training_facts"]
    assert str(TrainingFacts(**loaded)) == str(MRL)  # nan is not itself
    assert json.loads(json.dumps(FACTS._asdict())) == FACTS._asdict()


def test_a_loss_is_described_with_what_it_wraps():
    loss = Matryoshka(InfoNCE(0.05), [32, 16])
    assert describe_loss(loss).startswith("Matryoshka(InfoNCE(")
    assert "temperature=0.05" in describe_loss(loss)
