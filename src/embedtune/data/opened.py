"""Open the files of a data module: what is trained on, and what is measured."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from embedtune.data.beir import is_beir, read_beir
from embedtune.data.examples import ExampleDataset
from embedtune.data.lines import read_lines, resolve_paths
from embedtune.data.records import Format, detect_format
from embedtune.data.rows import Rows
from embedtune.data.scored_pairs import PROMPT_IGNORED, scored_pairs
from embedtune.data.teacher_store import open_teacher
from embedtune.data.testset_batches import TextDataset
from embedtune.data.testsets import name_sets
from embedtune.errors import InputError

log = logging.getLogger("embedtune")

Part = Literal["train", "val", "test", "predict"]
SPLITS = {"val": ("dev", "val", "test"), "test": ("test",)}
"""The qrels that are looked for in a BEIR folder, in this order."""


class Files(NamedTuple):
    """Where the parts of the data are, and how they are read.

    Attributes:
        paths: What the user gave for each part, None for none.
        teachers: Memory maps of the teacher's embeddings, by part.
        declared: Format of the rows; None takes it from their fields.
        teacher_width: Width of a teacher's embeddings; None takes it from the files' sizes.
        neg_nums: Hard negatives drawn per query.
        seed: Seed of the negatives.
    """

    paths: Mapping[str, Any]
    teachers: Mapping[str, str | Sequence[str] | None]
    declared: Format | None
    teacher_width: int | None
    neg_nums: int
    seed: int


def _first_format(paths: Sequence[Path]) -> Format | None:
    """Return the format of the first row of files, if there is one."""
    return next(map(detect_format, read_lines(paths)), None)


def _format_without_scores(sets: Iterable[list[str]], key: str) -> Format | None:
    """Return the format of the first rows without scores: scored ones validate any training."""
    rows = (resolve_paths(given, key) for given in sets if not is_beir(Path(given[0])))
    return next((found for found in map(_first_format, rows) if found != Format.SCORED), None)


def _tell_of_twice(paths: Sequence[Path], key: str) -> None:
    """Warn of a file that is there several times, as where globs overlap."""
    counts = Counter(path.resolve() for path in paths)
    for path, count in counts.items():
        if count > 1:
            log.warning("%s: %s is given %d times, and so are its rows", key, path, count)


class OpenedData:
    """The data sets of a run, opened once each.

    Attributes:
        datasets: Rows by name: ``train``, ``predict``, and ``val/<name>`` or ``test/<name>`` for a
            loss.
        testsets: Test sets by name, ``val/<name>`` or ``test/<name>``.
    """

    def __init__(self, files: Files) -> None:
        """Open nothing yet."""
        self.files = files
        self.datasets: dict[str, ExampleDataset] = {}
        self.testsets: dict[str, TextDataset] = {}

    @property
    def format(self) -> Format | None:
        """Format of the opened rows; None when there are none (predict)."""
        formats = (data.rows.format for part, data in self.datasets.items() if part != "predict")
        return next(formats, None)

    def open(self, part: Part, loss_formats: frozenset[Format] | None = None) -> None:
        """Open a part, unless it is open.

        Args:
            part: Its files are given.
            loss_formats: Those that a loss takes which is asked for, None without one.

        Raises:
            InputError: A file is not there, cannot be read, or does not fit the others.
        """
        key = f"data.{part}_path"
        if part == "val" or part == "test":
            sets = name_sets(self.files.paths[part], key)
            trained = self._trained_format() or _format_without_scores(sets.values(), key)
            for name, paths in sets.items():
                if not {f"{part}/{name}"} & {*self.datasets, *self.testsets}:
                    self._open_evaluated(part, f"{part}/{name}", paths, trained, loss_formats)
            self._refuse_lonely_teacher(part)
        elif part not in self.datasets:
            # Queries alone are what predict takes from rows of any format.
            declared = Format.DISTILL if part == "predict" else self.files.declared
            files = resolve_paths(self.files.paths[part], key)
            _tell_of_twice(files, key)
            self.datasets[part] = self._examples(part, Rows(files, declared))

    def _trained_format(self) -> Format | None:
        """Return the format that is trained on, where that is known without reading all rows."""
        path, declared = self.files.paths["train"], self.files.declared
        if self.format is not None or declared is not None or not path:
            return self.format or declared
        with contextlib.suppress(InputError):  # a model may be measured where its rows are not
            return _first_format(resolve_paths(path, "data.train_path"))
        return None

    def _open_evaluated(
        self,
        part: Literal["val", "test"],
        name: str,
        given: list[str],
        trained: Format | None,
        loss_formats: frozenset[Format] | None,
    ) -> None:
        """Open one set of ``val_path`` or ``test_path`` for what can be measured on it."""
        if is_beir(Path(given[0])):
            self.testsets[name] = TextDataset(read_beir(Path(given[0]), SPLITS[part]))
            return
        paths = resolve_paths(given, f"data.{part}_path")
        declared = self.files.declared
        present = next((line.present for line in read_lines(paths)), set())
        is_triplet = declared == Format.TRIPLET and "neg" in present
        rows = Rows(paths, None if "scores" in present and not is_triplet else declared)
        if rows.ignored_fields:
            log.info("%s: ignored fields: %s", name, ", ".join(rows.ignored_fields))
        if rows.format == Format.SCORED:
            if rows.has_prompts:
                log.info("%s: %s", name, PROMPT_IGNORED)
            self.testsets[name] = TextDataset(scored_pairs(rows.records()))
            low, high = rows.score_range or (0.0, 0.0)
            if low == high:
                log.warning("%s: all scores are %g: a Spearman correlation is 0", name, low)
            # Sentence pairs have no default loss; nobody asked for one to be validated.
            has_default = trained == Format.SCORED or rows.list_lengths.min() >= 2
            if not (has_default if loss_formats is None else Format.SCORED in loss_formats):
                return
        if trained in (None, rows.format):
            self.datasets[name] = self._examples(part, rows)
            self._refuse_other_teacher(part, name)
        elif rows.format != Format.SCORED:
            raise InputError(
                f"data.{part}_path: {given[0]}: expected {trained} rows as those of training, "
                f"scored rows or a BEIR folder, found {rows.format} rows"
            )

    def _refuse_other_teacher(self, part: Literal["val", "test"], name: str) -> None:
        """Refuse a teacher that cannot be that of a set."""
        teacher, key = self.datasets[name].teacher, f"data.{part}_teacher_path"
        if teacher is None:
            return
        others = [other for other in self.datasets if other.startswith(f"{part}/")]
        if others != [name]:
            raise InputError(f"{key}: expected one set of distill rows, found {', '.join(others)}")
        trained = self.datasets["train"].teacher if "train" in self.datasets else None
        if trained is not None and trained.width != teacher.width:
            raise InputError(
                f"{key}: expected embeddings as wide as those of data.teacher_path, "
                f"{trained.width}, found {teacher.width}"
            )

    def _refuse_lonely_teacher(self, part: Literal["val", "test"]) -> None:
        """Refuse a teacher of no set: nobody would look at it."""
        if self.files.teachers[part] and not any(n.startswith(f"{part}/") for n in self.datasets):
            raise InputError(
                f"data.{part}_teacher_path: expected distill rows in data.{part}_path, found none"
            )

    def _examples(self, part: Part, rows: Rows) -> ExampleDataset:
        key = "data.teacher_path" if part == "train" else f"data.{part}_teacher_path"
        if part == "predict":
            return ExampleDataset(rows)
        files = self.files
        teacher = open_teacher(rows, files.teachers[part], files.teacher_width, key)
        return ExampleDataset(rows, files.neg_nums, files.seed, teacher)
