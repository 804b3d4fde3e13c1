"""Positives belong to the query: those of all rows that have it are known, and none is drawn."""

import json
import pickle
import re
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.data.batch import text_hashes
from embedtune.data.cache import cached_tables
from embedtune.data.examples import ExampleDataset
from embedtune.data.known_positives import KnownPositives
from embedtune.data.records import Format
from embedtune.data.rows import Rows
from embedtune.data.sampler import Key
from embedtune.errors import InputError
from embedtune.losses import InfoNCE


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_rows(count: int, seed: int, *, negatives: bool = False) -> list[dict]:
    """A query is in one row, or in several that share some positives, anywhere in the file."""
    rng = np.random.default_rng(seed)
    rows: list[dict] = []
    for i in range(count):
        query = f"shared {rng.integers(0, count // 6)}" if i % 2 else f"alone {i}"
        row = {"query": query, "pos": [f"p{p}" for p in rng.integers(0, 40, rng.integers(1, 4))]}
        if negatives:
            row["neg"] = [f"p{p}" for p in rng.integers(0, 60, 6)] + [f"n{i}"]
        rows.append(row)
    return [rows[i] for i in rng.permutation(count)]


def positives_by_query(rows: list[dict]) -> dict[str, set[str]]:
    known: dict[str, set[str]] = {}
    for row in rows:
        known.setdefault(row["query"], set()).update(row["pos"])
    return known


@pytest.mark.parametrize("block", [7, 10_000])
def test_the_index_holds_the_positives_of_queries_of_several_rows(tmp_path, block, monkeypatch):
    monkeypatch.setattr("embedtune.data.rows.ROWS_PER_WRITE", block)
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "cache"))
    rows = random_rows(120, seed=block)
    halves = [write(tmp_path / f"{i}.jsonl", rows[i::2]) for i in (0, 1)]
    index = KnownPositives(Rows(halves))
    queries = [row["query"] for row in rows]
    known, asked = positives_by_query(rows), [*queries, "none"]
    for query, found in zip([*queries, "none"], index.of(asked, [None] * len(asked)), strict=True):
        if queries.count(query) < 2:
            assert found is None
            continue
        assert found.dtype == np.int64
        assert found.tolist() == np.unique(text_hashes(known[query])).tolist()
    assert sum(queries.count(query) > 1 for query in known) > 5
    assert index.of([], []) == []
    # In another process, as a worker that was not forked.
    again, none = pickle.loads(pickle.dumps(index)), [None] * len(queries)
    found = zip(again.of(queries, none), index.of(queries, none), strict=True)
    assert all(np.array_equal(a, b) for a, b in found if b is not None)


@pytest.mark.parametrize(
    "rows",
    [
        [{"query": "a", "pos": ["b"]}],
        [{"query": "a", "pos": ["b", "c"]}, {"query": "b", "pos": ["b", "c"]}],
    ],
)
def test_where_every_query_is_in_one_row_nothing_is_kept(tmp_path, rows):
    opened = Rows([write(tmp_path / "rows.jsonl", rows)])
    for _ in range(2):
        assert KnownPositives(opened).of(["a", "b"], [None, None]) == [None, None]
    assert ExampleDataset(opened)[Key(0, 0)].known_positive_id is None


def test_a_query_under_another_prompt_is_another(tmp_path):
    """What answers it under one instruction may be the hard negative under another."""
    rows = [
        {"query": "q", "prompt": "answer: ", "pos": ["a"], "neg": ["b"]},
        {"query": "q", "prompt": "contradict: ", "pos": ["b"], "neg": ["a"]},
        {"query": "q", "prompt": "answer: ", "pos": ["c"], "neg": ["b"]},
    ]
    examples = ExampleDataset(Rows([write(tmp_path / "rows.jsonl", rows)]), neg_nums=1)
    first, second, third = (examples[Key(0, i)] for i in range(3))
    assert first.known_positive_id.tolist() == np.unique(text_hashes(["a", "c"])).tolist()
    assert third.known_positive_id.tolist() == first.known_positive_id.tolist()
    assert second.known_positive_id is None
    assert (first.negatives, second.negatives) == (["b"], ["a"])


def test_the_index_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "rows.jsonl", random_rows(40, seed=3))
    ExampleDataset(Rows([path]))
    before = {table.path: table.path.stat().st_ino for table in cached_tables()}
    ExampleDataset(Rows([path])).with_tokens(lambda *_: {})
    assert {table.path: table.path.stat().st_ino for table in cached_tables()} == before
    write(path, random_rows(40, seed=4))
    ExampleDataset(Rows([path]))
    assert len(cached_tables()) == 2 * len(before)


def test_rows_without_positives_to_know_have_no_index(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "cache"))
    ExampleDataset(Rows([write(tmp_path / "distill.jsonl", [{"query": "a"}] * 2)]))
    assert len(cached_tables()) == 1


# --- Negatives ------------------------------------------------------------------------------------


def test_a_positive_of_another_row_is_never_drawn(tmp_path):
    rows = random_rows(90, seed=5, negatives=True)
    data = ExampleDataset(Rows([write(tmp_path / "rows.jsonl", rows)]), neg_nums=4)
    known = positives_by_query(rows)
    would = 0
    for epoch in range(3):
        for i in range(len(data)):
            example = data[Key(epoch, i)]
            assert len(example.negatives) == 4
            assert not known[example.query] & set(example.negatives)
    for row in rows:
        would += len(known[row["query"]] & set(row["neg"]) - set(row["pos"]))
    assert would > 10, "the rows must offer some"


def test_rows_whose_negatives_are_all_positives_elsewhere_are_refused(tmp_path):
    rows = [
        {"query": "a", "pos": ["p"], "neg": ["q", "n"]},
        {"query": "a", "pos": ["q"], "neg": ["p"]},
        {"query": "b", "pos": ["q"], "neg": ["p"]},
        {"query": "a", "pos": ["r"], "neg": ["q", "p"]},
    ]
    one, several = (write(tmp_path / f"{n}.jsonl", rows[:n]) for n in (2, 4))
    message = "one.jsonl:2: field 'neg': expected at least one text that is neither the query "
    one = one.rename(tmp_path / "one.jsonl")
    for _ in range(2):
        with pytest.raises(InputError, match=re.escape(message) + ".*found none$"):
            ExampleDataset(Rows([one]))
    with pytest.raises(InputError, match=r"4\.jsonl:2: .*found none; so in 2 rows$"):
        ExampleDataset(Rows([several]))
    # Read as pairs nothing is drawn.
    pairs = ExampleDataset(Rows([several], Format.PAIR))
    assert pairs[Key(0, 0)].negatives == []


def test_the_text_of_a_query_is_never_drawn(tmp_path):
    rows = [
        {"query": "a", "pos": ["p"], "neg": ["a", "n"]},
        {"query": "b", "prompt": "ask: ", "pos": ["b"], "neg": ["b", "n"]},
        {"query": "c", "pos": ["p"], "neg": ["c", "q", "n"]},
        {"query": "c", "pos": ["q"], "neg": ["n", "c"]},
    ]
    data = ExampleDataset(Rows([write(tmp_path / "rows.jsonl", rows)]), neg_nums=2)
    for epoch in range(4):
        for i in range(4):
            assert data[Key(epoch, i)].negatives == ["n", "n"]
    assert data[Key(0, 1)].positives == ["b"]


def test_a_row_whose_negatives_are_its_query_or_positives_elsewhere_is_refused(tmp_path):
    rows = [
        {"query": "a", "pos": ["p"], "neg": ["n"]},
        {"query": "a", "pos": ["q"], "neg": ["a", "p"]},
    ]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: field 'neg': .*neither the query nor"):
        ExampleDataset(Rows([write(tmp_path / "rows.jsonl", rows)]))


# --- Batches --------------------------------------------------------------------------------------


def losses(model, path: Path, batch_size: int, **loss) -> list[float]:
    found = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            found.append(outputs["loss"].item())

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep()],
    )
    module = EmbeddingModule(str(model), lr=1e-12, dropout=0.0, loss=InfoNCE(**loss))
    trainer.fit(module, EmbeddingDataModule(str(path), batch_size=batch_size, shuffle=False))
    return found


@pytest.mark.parametrize("multi_positive", [False, True])
def test_positives_of_rows_in_other_batches_are_known(tmp_path, tiny_bert, multi_positive):
    """Rows of a query apart, in another order, in two files: the loss is that of one row."""
    together = [
        {"query": "red", "pos": ["one", "two", "three"]},
        {"query": "blue", "pos": ["three"]},
        {"query": "green", "pos": ["one"]},
        {"query": "blue", "pos": ["four"]},
    ]
    apart = [
        {"query": "red", "pos": ["one"]},
        {"query": "red", "pos": ["two", "two"]},
        {"query": "red", "pos": ["three"]},
        *together[1:],
    ]
    apart[1]["pos"] = ["two"]
    paths = write(tmp_path / "t.jsonl", together), write(tmp_path / "a.jsonl", apart)
    for batch_size in (2, 3, 6):
        settings = {"temperature": 0.5, "multi_positive": multi_positive}
        one, several = (losses(tiny_bert, path, batch_size, **settings) for path in paths)
        assert several == pytest.approx(one, abs=1e-6)
        assert len(one) == 6 // batch_size
    # The first batch of two holds the positives one and two of red alone: nothing is a negative.
    if not multi_positive:
        assert losses(tiny_bert, paths[1], 2)[0] == 0


def test_validation_knows_the_positives_of_its_own_rows(tmp_path, tiny_bert):
    rows = [
        {"query": "q", "pos": ["a"]},
        {"query": "x", "pos": ["b"]},
        {"query": "q", "pos": ["b"]},
    ]
    path = write(tmp_path / "val.jsonl", rows)
    module = EmbeddingModule(str(tiny_bert), loss=InfoNCE(0.5))
    trainer = pl.Trainer(accelerator="cpu", use_distributed_sampler=False, logger=False)
    data = EmbeddingDataModule(val_path=str(path), batch_size=2)
    (metrics,) = trainer.validate(module, data, verbose=False)
    texts = module.encoder.model.encode(["q", "a", "x", "b"], convert_to_tensor=True)
    _, a, x, b = torch.nn.functional.normalize(texts, dim=1)
    # Of the first batch x has one negative, a, and q none, for b is its positive in the last row.
    expected = torch.nn.functional.softplus((x @ a - x @ b) / 0.5).item() / 3
    assert metrics["val/val/loss"] == pytest.approx(expected, abs=1e-5)


def test_lists_know_the_texts_of_every_list_of_their_query(tmp_path):
    rows = [{**row, "scores": [0.5] * len(row["pos"])} for row in random_rows(60, seed=5)]
    data = ExampleDataset(Rows([write(tmp_path / "rows.jsonl", rows)]))
    texts = positives_by_query(rows)
    queries = [row["query"] for row in rows]
    for i, row in enumerate(rows):
        example = data[Key(0, i)]
        assert list(example.known_positives) == row["pos"]
        if queries.count(row["query"]) < 2:
            assert example.known_positive_id is None
        else:
            expected = text_hashes(texts[row["query"]])
            assert sorted(example.known_positive_id) == sorted(expected)


@pytest.mark.parametrize("prompt", [None, "ask: "])
def test_a_query_is_no_negative_of_its_own_text(tmp_path, tiny_bert, prompt):
    rows = [
        {"query": "red", "pos": ["one"], "prompt": prompt},
        {"query": "blue", "pos": ["red"]},
    ]
    rest = losses(tiny_bert, write(tmp_path / "a.jsonl", rows), 2, temperature=0.5)
    texts = [f"{prompt or ''}red", "one", "blue", "red"]
    module = EmbeddingModule(str(tiny_bert))
    encoded = module.encoder.model.encode(texts, convert_to_tensor=True)
    _, one, blue, own = torch.nn.functional.normalize(encoded, dim=1)
    # One is the negative of blue; red has none.
    expected = torch.nn.functional.softplus((blue @ one - blue @ own) / 0.5).item() / 2
    assert rest == pytest.approx([expected], abs=1e-5)


def test_a_row_may_name_the_prompt_that_others_have_from_the_model(tmp_path, tiny_bert):
    folder = tmp_path / "model"
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model.prompts["query"] = "ask: "
    model.save_pretrained(str(folder))
    rows = [
        {"query": "red", "pos": ["one"], "prompt": "ask: "},
        {"query": "red", "pos": ["two"]},
    ]
    assert losses(folder, write(tmp_path / "a.jsonl", rows), 2) == [0]
    rows[0]["prompt"] = "tell: "
    assert losses(folder, write(tmp_path / "b.jsonl", rows), 2)[0] > 0


def test_queries_that_are_their_own_positives_keep_them(tmp_path, tiny_bert):
    """As rows that dropout alone tells apart."""
    texts = ["red", "blue", "green"]
    rows = [{"query": text, "pos": [text]} for text in texts]
    (found,) = losses(tiny_bert, write(tmp_path / "a.jsonl", rows), 3, temperature=0.5)
    module = EmbeddingModule(str(tiny_bert))
    encoded = module.encoder.model.encode(texts, convert_to_tensor=True)
    encoded = torch.nn.functional.normalize(encoded, dim=1)
    expected = torch.nn.functional.cross_entropy(encoded @ encoded.T / 0.5, torch.arange(3))
    assert found == pytest.approx(expected.item(), abs=1e-5)
