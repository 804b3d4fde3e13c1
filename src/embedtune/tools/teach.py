"""Make a teacher store: the texts of a data set, and a teacher's embeddings of them."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from embedtune.data.lines import resolve_paths
from embedtune.data.rows import Rows
from embedtune.data.teacher_store import TeacherWriter, sidecar_path
from embedtune.errors import InputError, require_positive
from embedtune.models.loading import cap_length, load_sentence_transformer, refuse_filled
from embedtune.models.towers import cutting_at, towers
from embedtune.models.unsupported import refuse_as_teacher
from embedtune.whole_files import naming, part_folder, refuse_in_the_way

log = logging.getLogger("embedtune")

TEXTS_PER_WRITE = 4096


class TeacherFiles(NamedTuple):
    """What :func:`teach` writes."""

    texts: Path
    embeddings: Path


def teach(
    model: str,
    data: str | list[str],
    out: str | Path,
    prompt: str = "",
    max_len: int = 512,
    batch_size: int = 64,
    trust_remote_code: bool = False,
) -> TeacherFiles:
    """Embed every distinct query, positive and negative of ``data`` with a teacher.

    Writes ``OUT/texts.jsonl`` (distill rows, first occurrences in the order of the data) and
    ``OUT/embeddings.f32``, a float32 memory map ``[texts, width]`` with its description beside it.
    The rows' own query prompts are left out of both: they are the student's.

    Args:
        model: The teacher: hub name or folder of a sentence-transformers model.
        data: jsonl files of any format, or a glob.
        out: Folder to write to.
        prompt: Prepended to each text for the teacher alone.
        max_len: Longest text in tokens.
        batch_size: Texts that are encoded at once.
        trust_remote_code: Run code that the teacher brings along.

    Raises:
        InputError: The data or the model cannot be read, ``out`` cannot be made or holds
            files that no store is made of, or a number is below 1.
    """
    out = Path(out)
    require_positive("batch_size", batch_size)
    require_positive("max_len", max_len)
    refuse_in_the_way(out, f"{out}: expected a folder to write to")
    files = TeacherFiles(out / "texts.jsonl", out / "embeddings.f32")
    paths = resolve_paths(data, "data")
    _refuse_to_replace(files, paths)
    rows = Rows(paths)
    teacher = load_sentence_transformer(model, trust_remote_code=trust_remote_code)
    refuse_as_teacher(teacher, model)
    if teacher.default_prompt_name is not None and not prompt:
        default = teacher.prompts[teacher.default_prompt_name]
        log.info("%s: its default prompt %r is left out; prompt gives one", model, default)
    longest = cap_length(teacher, max_len)
    refuse_filled(teacher, prompt, longest)
    out.mkdir(parents=True, exist_ok=True)
    width = int(teacher.get_embedding_dimension() or 0)
    with ExitStack() as unfinished:
        # Stopped before its end, it leaves a former store as it was.
        part = unfinished.enter_context(part_folder(files.texts)) / files.texts.name
        with naming(files.texts):
            _write_texts(part, rows)
        texts = Rows([part])
        queries = iter(texts.table["query"])
        writer = unfinished.enter_context(TeacherWriter(files.embeddings, len(texts), width))
        unfinished.enter_context(cutting_at(towers(teacher), longest))
        while block := list(islice(queries, TEXTS_PER_WRITE)):
            embeddings = teacher.encode(
                block,
                prompt=prompt,
                batch_size=batch_size,
                show_progress_bar=True,
                processing_kwargs={"text": {"max_length": longest}},
            )
            writer.write(embeddings)
        writer.close(texts.queries_digest, {part: files.texts}, model=model, prompt=prompt)
    log.info("wrote %s texts of width %s to %s", f"{len(texts):,}", width, out)
    return files


def _refuse_to_replace(files: TeacherFiles, data: list[Path]) -> None:
    """Refuse to write over what is read, or over files that are no store's: none describes them."""
    read = {os.path.realpath(path) for path in data}
    for path in files:
        if os.path.realpath(path) in read:
            raise InputError(f"{path}: expected another out folder than that of the data it reads")
        description = sidecar_path(files.embeddings)
        if path.exists() and not description.is_file():
            raise InputError(
                f"{path}: expected nothing or a store of embedtune teach, found a file without "
                f"{description.name} beside it"
            )


def _write_texts(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(
            json.dumps({"query": text}, ensure_ascii=False) + "\n" for text in distinct_texts(rows)
        )


def distinct_texts(rows: Rows) -> Iterator[str]:
    """Yield the queries, positives and negatives of ``rows``, each text once, in order."""
    seen: set[int] = set()
    for row in rows.table:
        for text in (row["query"], *row["positives"], *row["negatives"]):
            key = hash(text)
            if key not in seen:
                seen.add(key)
                yield text
