"""Files that are broken at random are accepted, or are one ``InputError``: nothing else, and soon.

Each case is a kind of file, a way to break it and a seed; it always breaks in the same way.
"""

import gzip
import json
import random
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zstandard
from testset_files import write_plain_beir

from embedtune.cli import main
from embedtune.cli.config_files import refuse_broken_configs
from embedtune.data.beir import read_beir
from embedtune.data.records import RecordReader
from embedtune.data.rows import Rows
from embedtune.data.teacher_store import TeacherStore, sidecar_path
from embedtune.digests import DIGESTS, refuse_damaged, write_digests
from embedtune.errors import InputError

SEEDS = range(2)
SECONDS = 10
"""A case takes some milliseconds; the machine may be busy."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise where the block takes too long, whatever it waits for."""

    def stop(*_: object) -> None:
        raise AssertionError(f"took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- Ways to break a file -------------------------------------------------------------------------


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def insert_bytes(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.randint(1, 40)) + data[place:]


def replace_token(tokens: list[bytes]) -> Callable[[bytes, random.Random], bytes]:
    """Return what puts one of ``tokens`` in the place of a word or number of a text."""

    def replaced(data: bytes, rng: random.Random) -> bytes:
        letters = (string.ascii_letters + string.digits + "_").encode()
        place = rng.choice([i for i, byte in enumerate(data) if byte in letters] or [0])
        start, end = place, place
        while start > 0 and data[start - 1] in letters:
            start -= 1
        while end < len(data) and data[end] in letters:
            end += 1
        quoted = data[start - 1 : start] == data[end : end + 1] == b'"'
        wider = quoted and rng.random() < 0.8  # the whole string, not what is in it
        return data[: start - wider] + rng.choice(tokens) + data[end + wider :]

    return replaced


WAYS = {
    "truncate": truncate,
    "flip_bits": flip_bits,
    "insert_bytes": insert_bytes,
    "swap_types": replace_token(
        [b"null", b"true", b"7", b"-0.5", b'"7"', b"[]", b"{}", b'["a"]', b'{"a": [1]}', b"NaN"]
    ),
    "nest": replace_token([b"[" * 10**5, b"[" * 500 + b"]" * 500, b'{"a":' * 10**5]),
    "huge_numbers": replace_token(
        [b"1e400", b"-1e39", b"9" * 30, b"9" * 400, b"9" * 5000, b"Infinity", b"-Infinity"]
    ),
}


# --- Files that are whole -------------------------------------------------------------------------

TRIPLETS = [{"query": f"q {i}", "pos": [f"p {i}", "p"], "neg": ["n", f"n {i}"]} for i in range(20)]
SCORED = [{"query": f"q {i}", "pos": ["a", "b"], "scores": [0.5, -i]} for i in range(20)]
PROMPTED = [{"query": f"q {i}", "pos": ["día 天"], "prompt_for_query": "find: "} for i in range(20)]
BY_FORMAT = {
    name: b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    for name, rows in {"triplet": TRIPLETS, "scored": SCORED, "prompted": PROMPTED}.items()
}
ZSTD = zstandard.ZstdCompressor(write_checksum=True)


def read_rows(path: Path) -> None:
    list(RecordReader([path]))
    len(Rows([path]))


def rows_case(
    name: str, content: str, pack: Callable[[bytes], bytes] = bytes
) -> Callable[[Path], tuple[Path, Callable[[], None]]]:
    def build(folder: Path) -> tuple[Path, Callable[[], None]]:
        path = folder / name
        path.write_bytes(pack(BY_FORMAT[content]))
        return path, lambda: read_rows(path)

    return build


def beir_case(name: str) -> Callable[[Path], tuple[Path, Callable[[], None]]]:
    def build(folder: Path) -> tuple[Path, Callable[[], None]]:
        write_plain_beir(folder, "test")
        return folder / name, lambda: read_beir(folder) and None

    return build


def store_case(is_sidecar: bool) -> Callable[[Path], tuple[Path, Callable[[], None]]]:
    def build(folder: Path) -> tuple[Path, Callable[[], None]]:
        path = folder / "t.f32"
        np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32).tofile(path)
        if is_sidecar:
            known = {"rows": 20, "width": 8, "queries_digest": "d", "model": "m"}
            sidecar_path(path).write_text(json.dumps(known))

        def read() -> None:
            store = TeacherStore([path], 20, None, "d")
            assert all(np.isfinite(store[row]).all() for row in range(20))

        return (sidecar_path(path) if is_sidecar else path), read

    return build


def digests_case(folder: Path) -> tuple[Path, Callable[[], None]]:
    for name in ("model.safetensors", "dense.safetensors"):
        (folder / name).write_bytes(random.Random(name).randbytes(500))
    write_digests(folder, sorted(folder.glob("*.safetensors")))
    return folder / DIGESTS, lambda: refuse_damaged(folder)


def yaml_case(folder: Path) -> tuple[Path, Callable[[], None]]:
    path = folder / "run.yaml"
    path.write_text(
        "seed_everything: 7\n"
        "model:\n  model_name_or_path: /none/of/these\n  lr: 2e-5\n  use_mrl: false\n"
        "data:\n  train_path: [a.jsonl, b.jsonl]\n  batch_size: 4\n  shuffle: true\n"
        "trainer:\n  max_epochs: 1\n  accelerator: cpu\n  gradient_clip_val: 1.0\n"
        "  limit_train_batches: 0.5\n"
    )
    return path, lambda: refuse_broken_configs(["fit", "--config", str(path)])


KINDS = {
    "triplet.jsonl": rows_case("f.jsonl", "triplet"),
    "scored.jsonl": rows_case("f.jsonl", "scored"),
    "prompted.jsonl": rows_case("f.jsonl", "prompted"),
    "scored.jsonl.gz": rows_case("f.jsonl.gz", "scored", gzip.compress),
    "triplet.jsonl.zst": rows_case("f.jsonl.zst", "triplet", ZSTD.compress),
    "lines.txt": rows_case("f.txt", "triplet"),
    "corpus.jsonl": beir_case("corpus.jsonl"),
    "queries.jsonl": beir_case("queries.jsonl"),
    "test.tsv": beir_case("qrels/test.tsv"),
    "store": store_case(is_sidecar=False),
    "sidecar": store_case(is_sidecar=True),
    "digests": digests_case,
    "yaml": yaml_case,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_accepted_or_one_line(tmp_path, kind, way, seed):
    path, read = KINDS[kind](tmp_path)
    read()  # it is whole
    rng = random.Random(f"{kind} {way} {seed}")
    path.write_bytes(WAYS[way](path.read_bytes(), rng))
    said = None
    with time_limit():
        try:
            read()
        except InputError as error:
            said = str(error)
    assert said is None or (tmp_path.name in said and "\n" not in said)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_broken_configuration_ends_a_run_with_one_line(tmp_path, monkeypatch, capsys, way, seed):
    """Also one that can be read: its model is nowhere, so that no case trains."""
    monkeypatch.chdir(tmp_path)
    path, _ = yaml_case(tmp_path)
    rng = random.Random(f"run {way} {seed}")
    path.write_bytes(WAYS[way](path.read_bytes(), rng))
    with time_limit(), pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(path)])
    said = [line for line in capsys.readouterr().err.splitlines() if "embedtune: error: " in line]
    assert (caught.value.code, len(said)) == (2, 1)
