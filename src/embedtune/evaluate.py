"""Compare models on a retrieval test set: nDCG@10 and more, at several embedding widths."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor

from embedtune.errors import InputError
from embedtune.loading import load_sentence_transformer
from embedtune.records import read_lines

log = logging.getLogger("embedtune")

METRICS = ("ndcg@10", "mrr@10", "recall@100")


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
    """The quality of one model at one width; ``metrics`` has a value for each of METRICS."""

    model: str
    width: int
    metrics: dict[str, float]


# --- Test sets ------------------------------------------------------------------------------------


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
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found {error.reason}") from None
    for number, line in enumerate(lines, start=1):
        place, columns = f"{path}:{number}", line.rstrip("\r").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 3:
            expected = "query-id, corpus-id and score, separated by tabs"
            raise InputError(f"{place}: expected {expected}, found {len(columns)} column(s)")
        query, document, score = columns
        if re.fullmatch(r"-?\d+", score):
            yield place, query, document, int(score)
        elif number > 1:  # line 1 is the header, whatever its words
            raise InputError(f"{place}: expected a whole score, found {score!r}")


# --- Measuring ------------------------------------------------------------------------------------


class PrefixEvaluator(InformationRetrievalEvaluator):
    """sentence-transformers' evaluator for one model, which encodes each text once for all widths.

    With its own ``truncate_dim`` the test set would be encoded again for every width. Its nDCG is
    binary: whatever is relevant counts alike.
    """

    def __init__(self, model: SentenceTransformer, data: RetrievalSet) -> None:
        """Encode the test set with the model's own query and document prompts."""
        super().__init__(
            queries=dict(data.queries),
            corpus=dict(data.corpus),
            relevant_docs={query: set(documents) for query, documents in data.relevant.items()},
            ndcg_at_k=[10],
            mrr_at_k=[10],
            precision_recall_at_k=[100],
            corpus_chunk_size=len(data.corpus),  # one chunk, hence one slice of the embeddings
        )
        self.model = model
        self.score_functions = self._model_score_functions(model)
        options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": True}
        self.embeddings: dict[str | None, Tensor] = {
            "query": model.encode_query(self.queries, **options),
            "document": model.encode_document(self.corpus, **options),
        }

    def at_width(self, width: int) -> dict[str, float]:
        """Return the metrics of the embeddings cut to ``width``, by the names in METRICS."""
        self.truncate_dim = width
        (scores,) = self.compute_all_metrics(self.model).values()
        found: Any = scores  # {"ndcg@k": {10: value}, ..}, declared as a number
        split = {metric: metric.split("@") for metric in METRICS}
        return {metric: float(found[f"{name}@k"][int(k)]) for metric, (name, k) in split.items()}

    def embed_inputs(
        self,
        model: SentenceTransformer,
        sentences: Any,
        encode_fn_name: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the stored embeddings of a role at the current width."""
        return self.embeddings[encode_fn_name][:, : self.truncate_dim]


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
    results = [result for model in dict.fromkeys(models) for result in _evaluate(model, data, dims)]
    if not results:
        raise InputError(f"dims: expected a width that a model has, found only {list(dims or ())}")
    return results


def _evaluate(name: str, data: RetrievalSet, dims: Sequence[int] | None) -> Iterator[Result]:
    model = load_sentence_transformer(name)
    own = model.get_embedding_dimension() or model.encode_query(["unknown"]).shape[1]
    asked = {own} if dims is None else set(dims)
    if missing := sorted(width for width in asked if width > own):
        log.warning("%s has width %s: left out at %s", name, own, ", ".join(map(str, missing)))
    if widths := sorted((width for width in asked if width <= own), reverse=True):
        evaluator = PrefixEvaluator(model, data)
        yield from (Result(name, width, evaluator.at_width(width)) for width in widths)


# --- Reporting ------------------------------------------------------------------------------------


def format_table(results: Sequence[Result]) -> str:
    """Return nDCG@10 as a text table: a row per model, a column per width.

    >>> print(format_table([Result("a", 64, {"ndcg@10": 0.5}), Result("bc", 8, {"ndcg@10": 0.25})]))
    nDCG@10     64      8
    a        .5000      -
    bc           -  .2500
    """
    labels = _labels(results)
    widths = sorted({result.width for result in results}, reverse=True)
    cells = {(r.model, r.width): f"{r.metrics['ndcg@10']:.4f}".removeprefix("0") for r in results}
    rows = [["nDCG@10", *map(str, widths)]]
    for model, label in labels.items():
        rows.append([label, *(cells.get((model, width), "-") for width in widths)])
    first, *longest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], longest)]) for row in rows
    )


def _labels(results: Sequence[Result]) -> dict[str, str]:
    """Return a short name of each model: the last parts of its path, as many as tell it apart."""
    parts = {result.model: Path(result.model).parts for result in results}
    for count in range(2, max(map(len, parts.values()), default=0)):
        labels = {model: "/".join(path[-count:]) for model, path in parts.items()}
        if len(set(labels.values())) == len(parts):
            return labels
    return {model: model for model in parts}


def write_results(results: Sequence[Result], out: Path) -> None:
    """Write ``OUT/evaluation.json`` (all metrics) and ``OUT/quality.png`` (nDCG@10 by width).

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
    for model, label in _labels(results).items():
        points = sorted((r.width, r.metrics["ndcg@10"]) for r in results if r.model == model)
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    widths = sorted({result.width for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, labels=[str(width) for width in widths])
    axes.minorticks_off()
    axes.set_xlabel("embedding width")
    axes.set_ylabel("nDCG@10")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
