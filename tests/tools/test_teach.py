"""A teacher store is of one run: a second one that is stopped leaves the first, or none."""

import contextlib
import errno
import json
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

from embedtune import InputError, whole_files
from embedtune.data.rows import Rows
from embedtune.data.teacher_store import TeacherStore
from embedtune.tools import teach as module
from embedtune.tools.teach import teach


class Teacher:
    """Embeds a text as its number and the number of the teacher; stops before one call."""

    default_prompt_name = None

    def __init__(self, number: int, stop: int | None = None) -> None:
        self.number, self.stop, self.calls = number, stop, count(1)

    def __iter__(self):
        return iter(())

    def __getitem__(self, index: int) -> torch.nn.Module:
        return torch.nn.Module()

    def modules(self):
        return ()

    def get_embedding_dimension(self) -> int:
        return 2

    def preprocess(self, texts, **options):
        return {}

    def encode(self, texts, **options):
        if next(self.calls) == self.stop:
            raise KeyboardInterrupt
        return np.array([[self.number, int(text.split()[1]) + 1] for text in texts], np.float32)


def run(monkeypatch, teacher, texts, out):
    monkeypatch.setattr(module, "TEXTS_PER_WRITE", 3)
    monkeypatch.setattr(module, "load_sentence_transformer", lambda *args, **options: teacher)
    data = out.parent / f"{teacher.number}.jsonl"
    data.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    teach("teacher", str(data), out)


@pytest.mark.parametrize("settings", [{"max_len": 2}, {"prompt": "a " * 100}])
def test_a_teacher_that_would_see_nothing_of_a_text_is_refused(tiny_bert, tmp_path, settings):
    (tmp_path / "rows.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(InputError, match="max_len: expected more tokens than"):
        teach(str(tiny_bert), str(tmp_path / "rows.jsonl"), tmp_path / "store", **settings)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("roles", [("query", "document"), ("query", "passage")])
def test_a_teacher_that_leaves_its_way_open_is_refused(tiny_bert, tmp_path, roles):
    """A text is neither a query nor a document: nothing but a default says which route it takes."""
    tower = list(SentenceTransformer(str(tiny_bert), device="cpu"))[:2]
    router = Router(dict.fromkeys(roles, tower), allow_empty_key=False)
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "router"))
    (tmp_path / "rows.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(InputError, match="expected a Router with a"):
        teach(str(tmp_path / "router"), str(tmp_path / "rows.jsonl"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_teacher_takes_its_way_by_default_whatever_it_is_called(tiny_bert, tmp_path):
    tower = list(SentenceTransformer(str(tiny_bert), device="cpu"))[:2]
    router = Router({"short": tower, "long": tower}, default_route="long")
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "router"))
    (tmp_path / "rows.jsonl").write_text('{"query": "a"}\n')
    files = teach(str(tmp_path / "router"), str(tmp_path / "rows.jsonl"), tmp_path / "store")
    expected = SentenceTransformer(str(tmp_path / "router"), device="cpu").encode(["a"])
    found = np.fromfile(files.embeddings, np.float32).reshape(1, -1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def owner(out):
    """Return whose store it is: all three files say the same, or it is refused."""
    rows = Rows([out / "texts.jsonl"])
    store = TeacherStore([out / "embeddings.f32"], len(rows), None, rows.queries_digest)
    values = np.stack([store[row] for row in range(len(rows))])
    assert [f"text {int(value) - 1}" for value in values[:, 1]] == rows.table["query"][:]
    (number,) = set(values[:, 0].tolist())
    return number


@pytest.mark.parametrize("second", [range(8), range(7, -1, -1), range(11)])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_teacher_that_is_stopped_leaves_the_former_store(tmp_path, monkeypatch, stop, second):
    run(monkeypatch, Teacher(1), [f"text {i}" for i in range(8)], tmp_path / "store")
    texts = [f"text {i}" for i in second]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, Teacher(2, stop), texts, tmp_path / "store")
    assert owner(tmp_path / "store") == 1
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert names == {"texts.jsonl", "embeddings.f32", "embeddings.f32.json"}


@pytest.mark.parametrize("name", ["texts.jsonl", "embeddings.f32"])
def test_files_that_are_no_stores_are_not_replaced(tmp_path, monkeypatch, name):
    path = tmp_path / "store" / name
    path.parent.mkdir()
    path.write_text("somebody's")
    with pytest.raises(InputError, match=rf"{name}: expected nothing or a store"):
        run(monkeypatch, Teacher(1), ["text 1"], path.parent)
    assert path.read_text() == "somebody's"
    assert len(list(path.parent.iterdir())) == 1


def test_a_store_does_not_replace_what_it_is_made_of(tmp_path, monkeypatch):
    """Not even the texts of a store, for it would be gone if they were more than those."""
    run(monkeypatch, Teacher(1), ["text 1", "text 2"], tmp_path / "store")
    before = (tmp_path / "store/texts.jsonl").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    for data in ("store/texts.jsonl", "link/*.jsonl"):
        with pytest.raises(InputError, match=r"texts.jsonl: expected another out folder than that"):
            teach("teacher", str(tmp_path / data), tmp_path / "store")
    assert (tmp_path / "store/texts.jsonl").read_bytes() == before


def test_a_link_that_leads_nowhere_is_no_folder_to_write_to(tmp_path, monkeypatch):
    store = tmp_path / "store"
    store.symlink_to("nowhere")
    with pytest.raises(InputError, match="store: expected a folder to write to, found the link"):
        run(monkeypatch, Teacher(1), ["text 1"], store)
    store.unlink()
    store.mkdir()
    (store / "texts.jsonl").symlink_to("texts.jsonl")
    run(monkeypatch, Teacher(1), ["text 1"], store)  # such a file is replaced
    assert owner(store) == 1


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("move", range(6))
def test_a_store_that_a_kill_left_is_made_anew(tmp_path, monkeypatch, move, is_there):
    """Wherever the kill came while its files took their places."""
    store, replace, moves = tmp_path / "store", Path.replace, count()
    if is_there:
        run(monkeypatch, Teacher(1), ["text 1", "text 2"], store)

    def killed(part, path):
        if next(moves) >= move:
            raise SystemExit
        return replace(part, path)

    monkeypatch.setattr(Path, "replace", killed)
    monkeypatch.setattr(whole_files, "remove", lambda path: None)
    with contextlib.suppress(SystemExit):
        run(monkeypatch, Teacher(2), ["text 1", "text 2"], store)
    monkeypatch.undo()
    run(monkeypatch, Teacher(3), ["text 1", "text 2"], store)
    assert owner(store) == 3
    assert len(list(store.iterdir())) == 3


@pytest.mark.parametrize("second", [range(8), range(7, -1, -1)])
@pytest.mark.parametrize("name", ["texts.jsonl", "embeddings.f32", "embeddings.f32.json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_no_store_is_of_two_runs(tmp_path, monkeypatch, error, name, second):
    """Wherever the second one ends while it puts its files in their places."""
    run(monkeypatch, Teacher(1), [f"text {i}" for i in range(8)], tmp_path / "store")
    texts, replace = [f"text {i}" for i in second], Path.replace

    def stopped(part, path):
        if Path(path).name == name and part.parent != path.parent:
            raise error
        return replace(part, path)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(type(error)):
        run(monkeypatch, Teacher(2), texts, tmp_path / "store")
    monkeypatch.setattr(Path, "replace", replace)
    assert owner(tmp_path / "store") == 1
    run(monkeypatch, Teacher(3), texts, tmp_path / "store")
    assert owner(tmp_path / "store") == 3
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert names == {"texts.jsonl", "embeddings.f32", "embeddings.f32.json"}
