"""Each set is opened for what can be measured on it, and a field that is null counts as absent."""

import json

import pytest

from embedtune.data.opened import Files, OpenedData
from embedtune.data.records import Format
from embedtune.errors import InputError

PAIR = {"query": "q", "pos": ["p"]}
BOTH = frozenset({Format.PAIR, Format.TRIPLET})


def opened(folder, train: dict, val: dict, declared=None, teacher=None) -> OpenedData:
    paths: dict[str, str | None] = {"test": None, "predict": None}
    for part, row in (("train", train), ("val", val)):
        path = folder / f"{part}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        paths[part] = str(path)
    teachers = dict.fromkeys(paths) | {"val": teacher}
    files = Files(paths, teachers, declared, teacher_width=None, neg_nums=2, seed=1)
    data = OpenedData(files)
    data.open("train")
    data.open("val", BOTH)
    return data


@pytest.mark.parametrize("declared", [Format.PAIR, Format.TRIPLET])
def test_rows_with_null_scores_are_of_the_declared_format(tmp_path, declared):
    row = {**PAIR, "neg": ["n"], "scores": None}
    data = opened(tmp_path, row, row, declared)
    assert data.datasets["val/val"].rows.format == declared
    assert not data.testsets


@pytest.mark.parametrize("more", [{}, {"neg": None}])
def test_scored_rows_measure_what_is_trained_on_others(tmp_path, more):
    val = {**PAIR, **more, "scores": [0.5]}
    data = opened(tmp_path, {**PAIR, "neg": ["n"]}, val, Format.TRIPLET)
    assert list(data.testsets) == ["val/val"]
    assert list(data.datasets) == ["train"]


def test_a_teacher_of_no_set_is_refused(tmp_path):
    message = "data.val_teacher_path: expected distill rows in data.val_path, found none"
    with pytest.raises(InputError, match=message):
        opened(tmp_path, PAIR, {**PAIR, "scores": [0.5]}, teacher="nothing.f32")


def test_a_file_that_overlapping_globs_give_twice_is_told(tmp_path, caplog):
    """It may be meant: rows that weigh more."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(PAIR) + "\n")
    given = [str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")]
    files = Files({"train": given}, {"train": None}, None, teacher_width=None, neg_nums=2, seed=1)
    data = OpenedData(files)
    data.open("train")
    assert len(data.datasets["train"]) == 3
    path = (tmp_path / "a.jsonl").resolve()
    assert f"data.train_path: {path} is given 2 times, and so are its rows" in caplog.text
    assert "b.jsonl is given" not in caplog.text
