"""Training rows are tokenised once; the ids of the table are those of the texts as they train."""

import json
import pickle
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.data import collate, token_table
from embedtune.data.chunks import PROBE
from embedtune.data.collate import Collator
from embedtune.data.examples import ExampleDataset
from embedtune.data.rows import Rows
from embedtune.data.sampler import Key
from embedtune.data.token_table import TokenTable
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec

COUNT = 12
ROWS = {
    "pair": [{"query": f"query {i}", "pos": [f"right {i} {'x ' * i}"]} for i in range(COUNT)],
    "triplet": [
        {"query": f"q {i}", "pos": [f"p {i}", f"r {i}"], "neg": [f"n {i} {j}" for j in range(4)]}
        for i in range(COUNT)
    ],
    "scored": [
        {"query": f"query {i}", "pos": [f"a {i}", f"b {i}"], "scores": [0.8, 0.1]}
        for i in range(COUNT)
    ],
    "distill": [{"query": f"text {i} {'x ' * i}"} for i in range(COUNT)],
}


def write(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Give every test a cache of its own, and writes of a few rows."""
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_table, "TEXTS_PER_WRITE", 10)
    monkeypatch.setattr(token_table, "TEXTS_PER_CALL", 7)
    return tmp_path / "cache"


@pytest.fixture
def encoder(tiny_bert) -> Encoder:
    encoder = Encoder(EncoderSpec(str(tiny_bert)))
    encoder.model.prompts |= {"query": "ask: ", "document": "doc: "}
    return encoder


@pytest.fixture
def collator(encoder) -> Collator:
    return Collator(encoder, query_max_len=16, passage_max_len=12, tokens_per_chunk=64)


class Silent(Collator):
    """Breaks when it is asked to tokenise."""

    def token_ids(self, texts):
        raise AssertionError("tokenised again")


class Interrupted(Collator):
    """Breaks in the middle of a table."""

    calls = 0

    def token_ids(self, texts):
        self.calls += 1
        if self.calls > 3:
            raise KeyboardInterrupt
        return super().token_ids(texts)


def like(collator: Collator, kind: type[Collator]) -> Collator:
    return kind(collator.encoder, collator.query_max_len, collator.passage_max_len, 64)


def alone(encoder, text) -> list[int]:
    return encoder.tokenize([text.text], text.role, text.prompt, text.max_len)["input_ids"][
        0
    ].tolist()


@pytest.mark.parametrize("name", list(ROWS))
def test_ids_are_those_of_each_text_by_itself(tmp_path, encoder, collator, name):
    rows = [dict(row) for row in ROWS[name]]
    rows[1]["prompt_for_query"] = "row: "  # the others take the encoder's own
    rows[2]["query"] = "too long " * 20
    if "pos" in rows[2]:
        rows[2]["pos"] = ["too long " * 20, *rows[2]["pos"][1:]]
    rows = Rows([write(tmp_path, rows)])
    table = TokenTable(rows, collator, "key")
    assert table.table.data.column("query").num_chunks > 1
    plain = ExampleDataset(rows, neg_nums=3)
    data = plain.with_tokens(table.find)
    keys = [Key(epoch, i) for epoch in range(2) for i in range(len(data))]
    lengths = set()
    for example, before in zip(data.__getitems__(keys), plain.__getitems__(keys), strict=True):
        assert example._replace(tokens=None) == before
        texts = collator.texts(example)
        assert set(example.tokens) == {(text.role, text.text) for text in texts}
        for text in texts:
            ids = example.tokens[text.role, text.text]
            assert ids.dtype == np.int32
            assert ids.tolist() == alone(encoder, text)
            lengths.add((text.role, len(ids)))
    assert ("query", 16) in lengths
    assert ("document", 12) in lengths or name == "distill"


def test_ids_are_slices_of_the_table(tmp_path, collator):
    rows = Rows([write(tmp_path, ROWS["triplet"])])
    data = ExampleDataset(rows).with_tokens(TokenTable(rows, collator, "key").find)
    assert not any(ids.flags.owndata for ids in data[Key(0, 5)].tokens.values())


def test_a_text_may_stand_twice_and_in_every_column(tmp_path, encoder, collator):
    twice = {"query": "same", "pos": ["same", "same"], "neg": ["other", "other", "same", "third"]}
    rows = Rows([write(tmp_path, [ROWS["triplet"][0], twice])])
    data = ExampleDataset(rows, neg_nums=5).with_tokens(TokenTable(rows, collator, "key").find)
    for index in (2, 3):
        example = data[Key(0, index)]
        assert set(example.negatives) == {"other", "third"}
        for text in collator.texts(example):
            assert example.tokens[text.role, text.text].tolist() == alone(encoder, text)


def test_a_write_tokenises_each_text_once(tmp_path, collator, monkeypatch):
    monkeypatch.setattr(token_table, "TEXTS_PER_WRITE", 1000)
    asked = []
    token_ids = collator.token_ids
    collator.token_ids = lambda texts: asked.extend(texts) or token_ids(texts)
    rows = [{"query": "same", "pos": [f"{i}"], "neg": ["wrong"]} for i in range(5)]
    TokenTable(Rows([write(tmp_path, rows)]), collator, "key")
    assert len(asked) == len(set(asked)) == 1 + 5 + 1


def test_a_row_of_many_texts_is_written_by_itself(tmp_path, collator):
    rows = [{"query": "q", "pos": ["p"], "neg": ["n"] * (n - 2)} for n in (3, 50, 4, 6, 3)]
    table = TokenTable(Rows([write(tmp_path, rows)]), collator, "key").table
    assert [len(part) for part in table.data.column("query").chunks] == [1, 1, 2, 1]


def test_no_more_long_texts_than_fit_are_tokenised_or_written_at_once(tmp_path, collator):
    calls = []
    collator.token_ids = lambda texts: calls.append(texts) or [np.arange(3)] * len(texts)
    lengths = [9 * 2**20, 9 * 2**20, *[2**20] * 5, 1, 1]
    rows = [{"query": f"{i}" + "a" * length} for i, length in enumerate(lengths)]
    table = TokenTable(Rows([write(tmp_path, rows)]), collator, "key").table
    assert [len(texts) for texts in calls] == [1, 1, 3, 3, 1]
    assert [len(chunk) for chunk in table.data.column("query").chunks] == [2, 7]


def test_the_table_is_opened_again_without_tokenising(tmp_path, collator):
    rows = Rows([write(tmp_path, ROWS["pair"])])
    first = TokenTable(rows, collator, "key")
    again = TokenTable(Rows(rows.paths), like(collator, Silent), "key")
    assert again.table.to_dict() == first.table.to_dict()
    for other, key in ((rows, "other key"), (Rows([write(tmp_path, ROWS["triplet"])]), "key")):
        with pytest.raises(AssertionError, match="tokenised again"):
            TokenTable(other, like(collator, Silent), key)


def test_the_key_tells_how_names_of_special_tokens_in_a_text_are_taken(encoder, collator):
    text = collator.document("a [SEP] b")
    key, (ids,) = collator.tokens_key, collator.token_ids([text])
    encoder.model.tokenizer.split_special_tokens = True
    assert collator.token_ids([text])[0].tolist() != ids.tolist()
    assert collator.tokens_key != key


@pytest.mark.parametrize("package", ["sentence-transformers", "transformers", "tokenizers"])
def test_the_key_tells_what_has_tokenised(collator, monkeypatch, package):
    key, installed = collator.tokens_key, collate.version
    monkeypatch.setattr(collate, "version", lambda name: installed(name) + "0" * (name == package))
    assert collator.tokens_key != key


def test_an_interrupted_table_is_not_there(tmp_path, collator, cache):
    rows = Rows([write(tmp_path, ROWS["pair"])])
    before = set(cache.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        TokenTable(rows, like(collator, Interrupted), "key")
    assert set(cache.rglob("*")) == before
    assert len(TokenTable(rows, collator, "key").table) == COUNT


def test_workers_are_handed_the_place_of_the_table_alone(tmp_path, collator, monkeypatch):
    monkeypatch.setattr(token_table, "TEXTS_PER_WRITE", 1000)
    rows = Rows([write(tmp_path, ROWS["triplet"] * 100)])
    table = TokenTable(rows, collator, "key")
    assert len(pickle.dumps(table)) < 5_000 < table.table.data.nbytes
    data = ExampleDataset(rows)
    known, again = (
        data.with_tokens(found.find)[Key(0, 7)].tokens
        for found in (table, pickle.loads(pickle.dumps(table)))
    )
    assert known.keys() == again.keys()
    assert all(np.array_equal(ids, again[text]) for text, ids in known.items())


# --- In a run ---------------------------------------------------------------------------


def fit(folder, model, name, data=None, workers=0, **settings) -> tuple[EmbeddingModule, list]:
    """Train one run; return its module and the texts tokenised after it was set up."""
    pl.seed_everything(1, verbose=False)
    module = EmbeddingModule(str(model), use_mrl=True, mrl_dims="8,32", lr=1e-3)
    if data is None:
        data = EmbeddingDataModule(
            str(write(folder, ROWS[name])),
            batch_size=4,
            neg_nums=3,
            passage_max_len=8,
            num_workers=workers,
            teacher_path=teacher(folder) if name == "distill" else None,
        )
    tokenised = []
    tokenize = module.encoder.tokenize

    class Watch(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.encoder.tokenize = lambda texts, *args: (
                tokenised.extend(texts) or tokenize(texts, *args)
            )

    trainer = pl.Trainer(
        **{"max_epochs": 2, "default_root_dir": str(folder), **settings},
        accelerator="cpu",
        logger=False,
        callbacks=[Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return module, tokenised


def teacher(folder: Path) -> str:
    path = folder / "teacher.f32"
    vectors = np.random.default_rng(0).standard_normal((COUNT, 32), dtype=np.float32)
    vectors.tofile(path)
    return str(path)


@pytest.fixture
def written(monkeypatch) -> list[Path]:
    """Return the paths of the tables that are written."""
    paths = []
    open_table = token_table.open_table

    def opened(path, schema, write):
        return open_table(path, schema, lambda: paths.append(path) or write())

    monkeypatch.setattr(token_table, "open_table", opened)
    return paths


@pytest.mark.parametrize("name", list(ROWS))
def test_a_run_with_the_table_is_that_without(tmp_path, tiny_bert, monkeypatch, written, name):
    with_table, tokenised = fit(tmp_path, tiny_bert, name)
    assert len(written) == 1
    assert set(tokenised) <= {PROBE}
    monkeypatch.setattr(EmbeddingDataModule, "_open_tokens", lambda self: None)
    without, tokenised = fit(tmp_path, tiny_bert, name)
    assert not set(tokenised) <= {PROBE}
    state = without.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in with_table.state_dict().items())


def test_workers_read_the_table(tmp_path, tiny_bert, written):
    states = [fit(tmp_path, tiny_bert, "triplet", workers=n)[0].state_dict() for n in (0, 2)]
    assert len(written) == 1
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("settings", "tables"),
    [
        ({"max_steps": 2}, 0),
        ({"max_steps": 3}, 1),
        ({"max_epochs": 1, "limit_train_batches": 2}, 0),
        ({"max_epochs": 2, "limit_train_batches": 2}, 1),
        ({"max_steps": 2, "accumulate_grad_batches": 2}, 1),
    ],
)
def test_a_run_of_less_than_an_epoch_tokenises_as_it_goes(
    tmp_path, tiny_bert, written, settings, tables
):
    _, tokenised = fit(tmp_path, tiny_bert, "pair", **settings)
    assert len(written) == tables
    assert set(tokenised) <= {PROBE} if tables else len(set(tokenised)) > 4


def test_more_negatives_than_a_run_draws_are_not_all_tokenised(tmp_path, tiny_bert, written):
    row = {"query": "q", "pos": ["p"], "neg": [f"n{i}" for i in range(12)]}
    path = str(write(tmp_path, [row] * 4))
    for epochs, tables in ((2, 0), (4, 1)):  # 14 texts a row, of which an epoch encodes 4
        data = EmbeddingDataModule(path, batch_size=2, neg_nums=2)
        fit(tmp_path, tiny_bert, "triplet", data, max_epochs=epochs)
        assert len(written) == tables


def test_another_model_gets_a_table_of_its_own(tmp_path, tiny_bert, tiny_qwen, written):
    data = EmbeddingDataModule(str(write(tmp_path, ROWS["pair"])), batch_size=4)
    fit(tmp_path, tiny_bert, "pair", data)
    again, _ = fit(tmp_path, tiny_qwen, "pair", data)
    fresh, _ = fit(
        tmp_path, tiny_qwen, "pair", EmbeddingDataModule(data.paths["train"], batch_size=4)
    )
    assert len(set(written)) == len(written) == 2
    state = fresh.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_inputs_that_are_more_than_ids_are_not_kept(tmp_path, tiny_bert, written, monkeypatch):
    monkeypatch.setattr(Collator, "tokens_key", None)
    _, tokenised = fit(tmp_path, tiny_bert, "pair")
    assert not written
    assert len(set(tokenised)) > COUNT
