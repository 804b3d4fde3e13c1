"""Compare models on a retrieval test set: nDCG@10 and more, at several embedding widths."""

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor

from embedtune.encoder import load_sentence_transformer
from embedtune.errors import InputError
from embedtune.records import read_lines

log = logging.getLogger("embedtune")

METRICS = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@100": "recall@100"}
"""The reported metrics, by sentence-transformers' names, and how they are written."""

BATCH_SIZE = 64


class RetrievalSet(NamedTuple):
    """A retrieval test set.

    Attributes:
        queries: Query texts by query id; every one has a relevant document.
        corpus: Document texts by document id.
        relevant: For each query id the relevant document ids and their grades (1 and above).
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, dict[str, int]]


class Result(NamedTuple):
    """The quality of one model at one width; ``metrics`` has the keys of :data:`METRICS`."""

    model: str
    width: int
    metrics: dict[str, float]


# --- Test sets -------------------------------------------------------------------------------------


def read_beir(folder: Path, split: str = "test") -> RetrievalSet:
    """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv`` of a BEIR folder.

    Queries without a relevant document in the split are left out: BEIR keeps those of all splits
    in one file.

    Raises:
        InputError: A file is missing, cannot be read, or names ids that are not there.
    """
    folder = Path(folder)
    qrels = folder / "qrels" / f"{split}.tsv"
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        if not path.is_file():
            raise InputError(f"{path}: expected a file of a BEIR test set, found none")
    corpus = _read_texts(folder / "corpus.jsonl")
    queries = _read_texts(folder / "queries.jsonl")
    relevant: dict[str, dict[str, int]] = {}
    for place, query, document, grade in _read_qrels(qrels):
        for known, name, file in ((queries, query, "queries"), (corpus, document, "corpus")):
            if name not in known:
                raise InputError(f"{place}: expected an _id of {file}.jsonl, found {name!r}")
        if grade > 0:
            relevant.setdefault(query, {})[document] = grade
    if not relevant:
        raise InputError(f"{qrels}: expected relevant documents (score 1 and above), found none")
    return RetrievalSet({name: queries[name] for name in relevant}, corpus, relevant)


def _read_texts(path: Path) -> dict[str, str]:
    """Read the texts of a jsonl file by their ``_id``; a title goes before its text."""
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line in read_lines([path]):
        for field in ("_id", "text"):
            if not isinstance(line.fields.get(field), str):
                found = json.dumps(line.fields[field]) if field in line.fields else "no such field"
                raise line.error(f"{field}: expected a string, found {found}")
        name, title = line.fields["_id"], line.fields.get("title") or ""
        if not isinstance(title, str):
            raise line.error(f"title: expected a string, found {json.dumps(title)}")
        if name in texts:
            raise line.error(f"_id: expected each once, found {name!r} of line {lines[name]} again")
        texts[name] = f"{title} {line.fields['text']}".strip()
        lines[name] = line.number
    return texts


def _read_qrels(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield place, query id, document id and grade of every row below the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(rows, start=1):
            header = number == 1 and row[-1:] == ["score"]
            if header or not row:
                continue
            place = f"{path}:{number}"
            if len(row) != 3:
                expected = "query-id, corpus-id and score, separated by tabs"
                raise InputError(f"{place}: expected {expected}, found {len(row)} columns")
            try:
                grade = int(row[2])
            except ValueError:
                raise InputError(f"{place}: expected a whole score, found {row[2]!r}") from None
            yield place, row[0], row[1], grade


# --- Measuring -------------------------------------------------------------------------------------


class PrefixEvaluator(InformationRetrievalEvaluator):
    """sentence-transformers' evaluator, encoding every text once for all widths.

    Its own ``truncate_dim`` would encode the test set again for each width.
    """

    def __init__(self, data: RetrievalSet) -> None:
        """Prepare the measures of :data:`METRICS`."""
        super().__init__(
            queries=dict(data.queries),
            corpus=dict(data.corpus),
            relevant_docs={query: set(documents) for query, documents in data.relevant.items()},
            mrr_at_k=[10],
            ndcg_at_k=[10],
            accuracy_at_k=[10],
            precision_recall_at_k=[100],
            map_at_k=[100],
            show_progress_bar=True,
            batch_size=BATCH_SIZE,
            write_csv=False,
            # One chunk: the texts are few enough to be held at once, and are encoded in one go.
            corpus_chunk_size=max(1, len(data.corpus)),
        )
        self._full: dict[str, Tensor] = {}

    def measure(self, model: SentenceTransformer, width: int) -> dict[str, float]:
        """Return the metrics of ``model``'s embeddings cut to ``width``."""
        self.truncate_dim = width
        self.score_functions = self._model_score_functions(model)
        (scores,) = self.compute_all_metrics(model).values()
        found: dict[str, Any] = dict(scores)  # {"ndcg@k": {10: value}, ..}
        pairs = ((key, *key.split("@")) for key in METRICS)
        return {key: float(found[f"{name}@k"][int(k)]) for key, name, k in pairs}

    def embed_inputs(
        self,
        model: SentenceTransformer,
        sentences: Any,
        encode_fn_name: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the embeddings cut to the current width; the first call encodes."""
        role = str(encode_fn_name)
        if role not in self._full:
            width, self.truncate_dim = self.truncate_dim, None
            self._full[role] = super().embed_inputs(
                model, sentences, encode_fn_name, *args, **kwargs
            )
            self.truncate_dim = width
        return self._full[role][:, : self.truncate_dim]


def evaluate_models(
    models: Sequence[str], data: RetrievalSet, dims: Sequence[int] | None = None
) -> list[Result]:
    """Measure each model at each of ``dims``, by default at the model's own width.

    A model's query and document prompts are respected. Widths above a model's own are left out
    for that model.

    Args:
        models: Hub names or folders of sentence-transformers models.
        data: The test set.
        dims: Widths that embeddings are cut to.

    Raises:
        InputError: A model cannot be loaded, or a width is not positive or too large for all.
    """
    for width in dims or ():
        if width < 1:
            raise InputError(f"dims: expected widths of at least 1, found {width}")
    results = [result for model in models for result in _evaluate(model, data, dims)]
    if not results:
        raise InputError(f"dims: expected a width that a model has, found only {list(dims or ())}")
    return results


def _evaluate(name: str, data: RetrievalSet, dims: Sequence[int] | None) -> Iterator[Result]:
    model = load_sentence_transformer(name)
    own = model.get_embedding_dimension()
    assert own is not None
    widths = [own] if dims is None else sorted({dim for dim in dims if dim <= own}, reverse=True)
    for dim in sorted(set(dims or ()) - set(widths)):
        log.warning("%s has width %s: left out at width %s", name, own, dim)
    evaluator = PrefixEvaluator(data)
    for width in widths:
        yield Result(name, width, evaluator.measure(model, width))


# --- Reporting -------------------------------------------------------------------------------------


def format_table(results: Sequence[Result]) -> str:
    """Return nDCG@10 as a text table: a row per model, a column per width.

    >>> print(format_table([Result("a", 64, {"ndcg@10": 0.5}), Result("bc", 8, {"ndcg@10": 0.25})]))
    nDCG@10     64      8
    a        .5000      -
    bc           -  .2500
    """
    widths = sorted({result.width for result in results}, reverse=True)
    cells = {(r.model, r.width): f"{r.metrics['ndcg@10']:.4f}".removeprefix("0") for r in results}
    names = list(dict.fromkeys(result.model for result in results))
    rows = [["nDCG@10", *map(str, widths)]]
    rows += [[name, *(cells.get((name, width), "-") for width in widths)] for name in names]
    longest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(longest[0]), *map(str.rjust, row[1:], longest[1:])]) for row in rows
    )


def write_results(results: Sequence[Result], out: Path) -> None:
    """Write all metrics to ``OUT/evaluation.json`` and nDCG@10 against width to ``OUT/quality.png``.

    Raises:
        InputError: ``out`` is a file, or matplotlib is not installed.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{out}: expected a folder to write to, found a file") from None
    rows = [{"model": result.model, "width": result.width, **result.metrics} for result in results]
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    (out / "evaluation.json").write_text(text, encoding="utf-8")
    _draw(results, out / "quality.png")


def _draw(results: Sequence[Result], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("quality.png needs pip install 'embedtune[plots]'") from None
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for model in dict.fromkeys(result.model for result in results):
        points = sorted((r.width, r.metrics["ndcg@10"]) for r in results if r.model == model)
        axes.plot(*zip(*points, strict=True), marker="o", label=model)
    widths = sorted({result.width for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, labels=[str(width) for width in widths])
    axes.minorticks_off()
    axes.set_xlabel("embedding width")
    axes.set_ylabel("nDCG@10")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
