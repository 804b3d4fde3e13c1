"""A teacher store that does not fit its data is an error, never a misaligned read."""

import numpy as np
import pytest

from embedtune.data.teacher_store import TeacherStore, TeacherWriter, sidecar_path
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
