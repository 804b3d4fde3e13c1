"""A teacher store that does not fit its data is an error, never a misaligned read."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from embedtune.data import teacher_store
from embedtune.data.rows import Rows
from embedtune.data.teacher_store import (
    TeacherStore,
    TeacherWriter,
    open_teacher,
    sidecar_path,
)
from embedtune.errors import InputError


def memmap(path, rows, width, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    values.tofile(path)
    return values


def test_a_row_is_read_as_it_was_written(tmp_path):
    values = memmap(tmp_path / "t.f32", 10, 6)
    store = TeacherStore([tmp_path / "t.f32"], rows=10, width=6)
    assert store.width == 6
    assert np.array_equal(store[7], values[7])


def test_two_stores_concatenate_along_the_width(tmp_path):
    first, second = memmap(tmp_path / "a", 10, 6), memmap(tmp_path / "b", 10, 3, seed=1)
    store = TeacherStore([tmp_path / "a", tmp_path / "b"], rows=10, width=9)
    whole = np.concatenate([first, second], axis=1)
    assert np.array_equal(np.stack([store[i] for i in range(10)]), whole)


def test_workers_are_handed_the_places_of_the_files_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memmap(Path("a"), 1000, 6)
    memmap(Path("b"), 1000, 3, seed=1)
    store = TeacherStore(["a", "b"], rows=1000)
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(sent)
    assert (again.width, again.widths) == (9, [6, 3])
    assert all(np.array_equal(again[i], store[i]) for i in (0, 999))


@pytest.mark.parametrize(
    ("counts", "widths", "is_told"),
    [([4, 4], [2, 2], True), ([3, 5], [3, 5], True), ([3, 5], [4, 4], False), ([8], [4], False)],
)
def test_stores_that_may_be_of_a_file_each_are_told(tmp_path, caplog, counts, widths, is_told):
    """Of 4 rows of width 4 each, or of width 2 of all 8 rows: the sizes are the same."""
    files, stores = [], []
    for i, count in enumerate(counts):
        files.append(tmp_path / f"{i}.jsonl")
        files[-1].write_text("".join(f'{{"query": "{i} {j}"}}\n' for j in range(count)))
    for i, width in enumerate(widths):
        stores.append(str(tmp_path / f"{i}.f32"))
        memmap(stores[-1], sum(counts), width, seed=i)
    store = open_teacher(Rows(files), stores, None, "data.teacher_path")
    assert store.widths == widths
    said = f"read side by side, as {' + '.join(map(str, widths))} values of each of the 8 rows"
    assert (said in caplog.text) == is_told


@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [(9, 6, "expected 9 rows"), (10, 5, "teacher_embedding_dim: found 5"), (20, 6, "hold 3 = 3")],
)
def test_a_file_of_the_wrong_size_is_an_error(tmp_path, rows, width, message):
    memmap(tmp_path / "t.f32", 10, 6)
    with pytest.raises(InputError, match=message):
        TeacherStore([tmp_path / "t.f32"], rows=rows, width=width)


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="found no file"):
        TeacherStore([tmp_path / "none"], rows=1)
    with pytest.raises(InputError, match=f"the embeddings.f32 in a .* found the folder {tmp_path}"):
        TeacherStore([tmp_path], rows=1)
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="found 0 bytes"):
        TeacherStore([tmp_path / "empty"], rows=1)


def test_a_written_store_is_checked_against_rows_and_texts(tmp_path):
    path = tmp_path / "t.f32"
    writer = TeacherWriter(path, rows=4, width=2)
    writer.write(np.ones((3, 2), np.float32))
    writer.write(np.full((1, 2), 7, np.float32))
    writer.close("digest-of-texts", model="m")
    assert sidecar_path(path).exists()
    assert TeacherStore([path], 4, 2, "digest-of-texts")[3].tolist() == [7, 7]
    with pytest.raises(InputError, match="of other texts"):
        TeacherStore([path], 4, 2, "digest-of-shuffled-texts")
    # Half the rows of twice the width have the same size: the description tells them apart.
    with pytest.raises(InputError, match="its description says 4 rows of width 2"):
        TeacherStore([path], 2, 4)


# --- Files of another kind ------------------------------------------------------------------------


def values_of(rows=32, width=16, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("rows", [32, 3000])
@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("<f2", "looks like float16"),
        ("<f8", "looks like float64"),
        (">f4", "looks like float32 of reversed bytes"),
    ],
)
def test_values_of_another_type_are_refused_by_its_name(tmp_path, kind, found, rows, scale):
    values_of(rows, scale=scale).astype(kind).tofile(tmp_path / "t.f32")
    with pytest.raises(InputError, match=rf"t\.f32: expected float32, found what {found}"):
        TeacherStore([tmp_path / "t.f32"], rows=rows)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("rows", [32, 3000])
def test_so_is_bfloat16_which_reads_well_as_half_as_many(tmp_path, rows, scale):
    values = torch.from_numpy(values_of(rows, scale=scale)).bfloat16()
    values.view(torch.uint16).numpy().tofile(tmp_path / "t.f32")
    with pytest.raises(InputError, match="found what looks like bfloat16"):
        TeacherStore([tmp_path / "t.f32"], rows=rows)


@pytest.mark.parametrize(
    "values",
    [
        values_of(scale=1e-6),
        values_of().clip(min=0),  # half of them are 0
        values_of(2, 2),
        values_of().astype(np.float16).astype(np.float32),  # half of the bytes are 0
        np.ones((4, 8), np.float32) + np.eye(4, 8, dtype=np.float32),
        np.eye(8, dtype=np.float32),
        values_of() ** 3,
        *(values_of(2, 2, seed) for seed in range(20)),
        torch.from_numpy(values_of()).bfloat16().float().numpy(),
        np.round(values_of() * 8),
    ],
)
def test_float32_is_not_taken_for_another_type(tmp_path, values):
    values.tofile(tmp_path / "t.f32")
    assert np.array_equal(TeacherStore([tmp_path / "t.f32"], rows=len(values))[1], values[1])


def test_an_npy_file_is_refused_by_its_name(tmp_path):
    for kind in (np.float32, np.float16):
        np.save(tmp_path / "t.npy", values_of().astype(kind))
        with pytest.raises(InputError, match=r"t\.npy: .*found an \.npy file.*tofile"):
            TeacherStore([tmp_path / "t.npy"], rows=32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("row", [0, 7, 31])
def test_a_row_without_a_finite_norm_is_named(tmp_path, monkeypatch, bad, row):
    monkeypatch.setattr(teacher_store, "VALUES_PER_CHECK", 5 * 16)  # of 6 and a half blocks
    values = values_of()
    values[row:, 3], found = bad, re.escape(str(np.float32(bad)))
    values.tofile(tmp_path / "t.f32")
    with pytest.raises(InputError, match=rf"t\.f32: row {row + 1}: .* {found}$"):
        TeacherStore([tmp_path / "t.f32"], rows=32)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("block", [16, 1 << 20])
def test_rows_that_are_all_equal_are_refused(tmp_path, monkeypatch, value, block):
    """As those of a store that was never filled: a student would learn to tell nothing apart."""
    monkeypatch.setattr(teacher_store, "VALUES_PER_CHECK", block)
    values = np.full((32, 16), value, dtype=np.float32)
    values.tofile(tmp_path / "t.f32")
    with pytest.raises(InputError, match=r"t\.f32: .* tell texts apart, found 32 equal rows"):
        TeacherStore([tmp_path / "t.f32"], rows=32)
    values[31, 3] = 1.0
    values.tofile(tmp_path / "t.f32")
    assert TeacherStore([tmp_path / "t.f32"], rows=32)[31][3] == 1.0


def test_rows_of_zeros_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(teacher_store, "VALUES_PER_CHECK", 5 * 16)
    values = values_of()
    values[[9, 30]] = 0
    values.tofile(tmp_path / "t.f32")
    TeacherStore([tmp_path / "t.f32"], rows=32)
    assert caplog.messages == [f"{tmp_path / 't.f32'}: 2 rows are zero, the first is row 10"]


KNOWN = {"rows": 32, "width": 16, "queries_digest": "d"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"[" * 10**5, "expected JSON"),
        (b'{"rows": ' + b"9" * 5000, "expected JSON"),
        (b'{"rows": "\xff"}', "expected UTF-8"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"null", "found null"),
        *[
            (
                json.dumps({k: v for k, v in KNOWN.items() if k != name}).encode(),
                f"{name}: .*no such",
            )
            for name in KNOWN
        ],
        *[
            (json.dumps({**KNOWN, name: bad}).encode(), f"{name}: expected")
            for name, bad in [("rows", "32"), ("rows", True), ("width", 1.5), ("queries_digest", 7)]
        ],
    ],
)
def test_a_broken_description_is_named(tmp_path, text, found):
    memmap(tmp_path / "t.f32", 32, 16)
    sidecar_path(tmp_path / "t.f32").write_bytes(text)
    with pytest.raises(InputError, match=rf"t\.f32\.json: .*{found}"):
        TeacherStore([tmp_path / "t.f32"], 32, 16, "d")


@pytest.mark.parametrize("size", [0, 4, 32 * 16 * 4 - 1, 31 * 16 * 4, 33 * 16 * 4, 64 * 16 * 4])
def test_a_described_file_of_another_size_is_refused(tmp_path, size):
    sidecar_path(tmp_path / "t.f32").write_text(json.dumps(KNOWN))
    (tmp_path / "t.f32").write_bytes(bytes(size))
    with pytest.raises(InputError, match=r"t\.f32: expected 32 rows"):
        TeacherStore([tmp_path / "t.f32"], 32)


# --- Written whole --------------------------------------------------------------------------------


def write_store(path, value, is_stopped=False):
    with TeacherWriter(path, 4, 2) as writer:
        writer.write(np.eye(3, 2, dtype=np.float32))
        if is_stopped:
            raise KeyboardInterrupt
        writer.write(np.full((1, 2), value, np.float32))
        writer.close("d", model=f"model {value}")


def test_a_store_is_not_there_before_it_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "t.f32", 1, is_stopped=True)
    assert list(tmp_path.iterdir()) == []
    write_store(tmp_path / "t.f32", 1)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "t.f32", 2, is_stopped=True)
    assert TeacherStore([tmp_path / "t.f32"], 4, 2, "d")[3].tolist() == [1, 1]


def test_no_description_stands_beside_the_embeddings_of_another(tmp_path, monkeypatch):
    """Also where the second store is stopped in its last moment."""
    path, replace = tmp_path / "t.f32", Path.replace
    write_store(path, 1)

    def stopped(part, place):
        if Path(place) == sidecar_path(path) and part.parent != place.parent:
            raise KeyboardInterrupt
        return replace(part, place)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_store(path, 2)
    assert TeacherStore([path], 4, 2, "d")[3].tolist() == [1, 1]


# --- Damage ---------------------------------------------------------------------------------


def write_values(path, values):
    with TeacherWriter(path, *values.shape) as writer:
        for block in np.array_split(values, 3):
            writer.write(block)
        writer.close("d")
    return path


def test_a_flipped_bit_in_a_store_is_named(tmp_path):
    values = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    path = write_values(tmp_path / "t.f32", values)
    assert np.array_equal(TeacherStore([path], 20)[19], values[19])
    data = bytearray(path.read_bytes())
    data[100] ^= 1  # a number as any other
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"^{path}: is damaged: expected the bytes"):
        TeacherStore([path], 20)


def test_a_store_without_a_digest_is_taken(tmp_path):
    path = write_values(tmp_path / "t.f32", np.eye(4, 2, dtype=np.float32))
    known = json.loads(sidecar_path(path).read_text())
    assert len(known.pop("digest")) == 32
    sidecar_path(path).write_text(json.dumps(known))
    assert TeacherStore([path], 4, None, "d").width == 2


def test_a_digest_that_is_none_is_named(tmp_path):
    path = write_values(tmp_path / "t.f32", np.eye(4, 2, dtype=np.float32))
    known = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(known | {"digest": 7}))
    with pytest.raises(InputError, match="digest: expected a string, found the number 7"):
        TeacherStore([path], 4)
