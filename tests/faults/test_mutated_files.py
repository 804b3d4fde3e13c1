"""Files that are broken at random are accepted, or are one ``InputError``: nothing else, and soon.

Each case is a kind of file, a way to break it and a seed; it always breaks in the same way. What is
accepted is what the file says: of files with digests, what they said before they were broken.
`--mutations 2000` breaks that many files.
"""

import gzip
import json
import math
import random
import shutil
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from testset_files import write_plain_beir

from embedtune.checkpoints.read import read_checkpoint
from embedtune.checkpoints.resume import Place
from embedtune.cli import main
from embedtune.cli.config_files import refuse_broken_configs
from embedtune.data.beir import read_beir
from embedtune.data.records import RecordReader
from embedtune.data.rows import Rows
from embedtune.data.teacher_store import TeacherStore, TeacherWriter, sidecar_path
from embedtune.digests import DIGESTS, refuse_damaged, write_digests
from embedtune.errors import InputError
from embedtune.export.folder import export_encoder
from embedtune.models.encoder import Encoder
from embedtune.models.loading import load_sentence_transformer
from embedtune.models.spec import EncoderSpec

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


def read_rows(path: Path) -> list:
    records = list(RecordReader([path]))
    rows = Rows([path])
    assert len(rows) == len(records)
    queries = [record.query for record in records]
    assert rows.table["query"][:] == queries
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").split("\n")
        assert queries == [json.loads(line)["query"] for line in lines if line.strip()]
    return records


def rows_case(
    name: str, content: str, pack: Callable[[bytes], bytes] = bytes
) -> Callable[[Path], tuple[Path, Callable[[], Any]]]:
    def build(folder: Path) -> tuple[Path, Callable[[], Any]]:
        path = folder / name
        path.write_bytes(pack(BY_FORMAT[content]))
        return path, lambda: read_rows(path)

    return build


def beir_case(name: str) -> Callable[[Path], tuple[Path, Callable[[], Any]]]:
    def build(folder: Path) -> tuple[Path, Callable[[], Any]]:
        write_plain_beir(folder, "test")
        return folder / name, lambda: read_beir(folder) and None

    return build


def store_case(is_sidecar: bool) -> Callable[[Path], tuple[Path, Callable[[], Any]]]:
    def build(folder: Path) -> tuple[Path, Callable[[], Any]]:
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


def yaml_case(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "run.yaml"
    path.write_text(
        "seed_everything: 7\n"
        "model:\n  model_name_or_path: /none/of/these\n  lr: 2e-5\n  use_mrl: false\n"
        "data:\n  train_path: [a.jsonl, b.jsonl]\n  batch_size: 4\n  shuffle: true\n"
        "trainer:\n  max_epochs: 1\n  accelerator: cpu\n  gradient_clip_val: 1.0\n"
        "  limit_train_batches: 0.5\n"
    )
    return path, lambda: refuse_broken_configs(["fit", "--config", str(path)])


def checkpoint_case(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path, chance = folder / "a.ckpt", torch.Generator().manual_seed(0)
    weights = {f"encoder.{i}": torch.randn(6, 5, generator=chance) for i in range(3)}
    facts = {"encoder_spec": EncoderSpec("base")._asdict(), "place": Place(1, 2)._asdict()}
    torch.save({**facts, "state_dict": weights}, path)
    return path, lambda: read_checkpoint(path).weights


def table_case(folder: Path) -> tuple[Path, Callable[[], Any]]:
    (folder / "f.jsonl").write_bytes(BY_FORMAT["triplet"])
    patched = pytest.MonkeyPatch()

    def read() -> list:
        patched.setenv("EMBEDTUNE_CACHE", str(folder / "cache"))
        try:
            return Rows([folder / "f.jsonl"]).table["positives"][:]
        finally:
            patched.undo()

    read()
    (path,) = (folder / "cache").glob("*.arrow")
    return path, read


def written_store_case(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "t.f32"
    values = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    with TeacherWriter(path, 20, 8) as writer:
        writer.write(values)
        writer.close("d")

    def read() -> np.ndarray:
        store = TeacherStore([path], 20, None, "d")
        return np.stack([store[row] for row in range(20)])

    return path, read


def model_case(name: str) -> Callable[[Path], tuple[Path, Callable[[], Any]]]:
    def build(folder: Path) -> tuple[Path, Callable[[], Any]]:
        shutil.copytree(EXPORTED[0], folder / "model")

        def read() -> np.ndarray:
            model = load_sentence_transformer(str(folder / "model"), device="cpu")
            return model.encode(["a text", "b"], show_progress_bar=False)

        return folder / "model" / name, read

    return build


EXPORTED: list[Path] = []
"""The folder that is broken."""


@pytest.fixture(scope="module", autouse=True)
def _exported(tiny_bert, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_encoder(Encoder(EncoderSpec(str(tiny_bert))), folder)
    EXPORTED.append(folder)


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
    "checkpoint": checkpoint_case,
    "table": table_case,
    "written store": written_store_case,
    **{
        name: model_case(name)
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "modules.json",
            "1_Pooling/config.json",
            "config_sentence_transformers.json",
        )
    },
}
SEALED = {"scored.jsonl.gz", "triplet.jsonl.zst", "checkpoint", "table", "written store"} | {
    "model.safetensors"
}
"""Kinds with digests, of their own format or ours: what is read of them is what was written."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        count = metafunc.config.getoption("--mutations")
        metafunc.parametrize("seed", range(math.ceil(count / (len(KINDS) + 1) / len(WAYS))))


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return np.array_equal(found, expected)
    if isinstance(expected, dict):
        return all(torch.equal(found[name], value) for name, value in expected.items())
    return found == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_accepted_or_one_line(tmp_path, kind, way, seed):
    path, read = KINDS[kind](tmp_path)
    whole = read()
    rng = random.Random(f"{kind} {way} {seed}")
    path.write_bytes(WAYS[way](path.read_bytes(), rng))
    said = None
    with time_limit():
        try:
            found = read()
        except InputError as error:
            said = str(error)
    assert said is None or (tmp_path.name in said and "\n" not in said)
    assert said is not None or kind not in SEALED or same(found, whole)


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
