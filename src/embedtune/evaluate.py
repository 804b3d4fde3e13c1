"""Compare models on test sets, at several widths and with quantised documents."""

import json
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor
from torch.nn import functional as F

from embedtune.errors import InputError
from embedtune.functional import pairwise_cosine
from embedtune.loading import load_sentence_transformer
from embedtune.metrics import DEPTH, retrieval_metrics, spearman
from embedtune.search import search
from embedtune.testsets import RetrievalSet, ScoredPairs, set_name

log = logging.getLogger("embedtune")

TITLES = {"ndcg@10": "nDCG@10", "spearman": "Spearman"}
"""The main metric of a retrieval set and of scored pairs, as a reader knows them."""
PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}
"""Bits a number of a stored document takes."""
BLOCK = 8192
"""Documents that are quantised at once."""
NAME = 40
"""Characters of a model's name in a line of the table or the legend."""


class Result(NamedTuple):
    """The quality of one model on one test set at one width.

    Attributes:
        model: As given.
        data: The test set, as given.
        width: Numbers of an embedding.
        metrics: Those of :data:`~embedtune.metrics.RETRIEVAL_METRICS`, or ``spearman``; and the
            main metric with quantised documents, such as ``ndcg@10/int8``.
    """

    model: str
    data: str
    width: int
    metrics: dict[str, float]

    @property
    def main(self) -> str:
        """Name of the main metric."""
        return _main(self.metrics)

    def quality(self, precision: str = "float32") -> float:
        """Return the main metric with documents in ``precision``."""
        return self.metrics[self.main + f"/{precision}" * (precision != "float32")]


def _main(metrics: Mapping[str, float]) -> str:
    return next(name for name in TITLES if name in metrics)


# --- Measuring ------------------------------------------------------------------------------------


def evaluate_models(
    models: Sequence[str],
    data: Mapping[str, RetrievalSet | ScoredPairs],
    dims: Sequence[int] | None = None,
) -> list[Result]:
    """Measure each model on each test set at each of ``dims``, by default at the model's own width.

    Texts are compared by cosine. A model's query prompt is used for queries and the first texts
    of pairs, its document prompt for documents and the second. Widths above a model's own are
    left out for that model.

    Args:
        models: Hub names or folders of sentence-transformers models.
        data: The test sets by name.
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


def _evaluate(
    name: str, data: Mapping[str, RetrievalSet | ScoredPairs], dims: Sequence[int] | None
) -> Iterator[Result]:
    model = load_sentence_transformer(name)
    own = model.get_embedding_dimension() or model.encode_query(["unknown"]).shape[1]
    asked = {own} if dims is None else set(dims)
    if missing := sorted(width for width in asked if width > own):
        log.warning("%s has width %s: left out at %s", name, own, ", ".join(map(str, missing)))
    widths = sorted((width for width in asked if width <= own), reverse=True)
    for set_as_given, texts in data.items() if widths else ():
        as_queries, as_documents, *_ = texts
        queries = _encode(model.encode_query, as_queries)
        documents = _encode(model.encode_document, as_documents)
        for width in widths:
            metrics = _measure(texts, queries[:, :width], documents[:, :width], model.device)
            yield Result(name, set_as_given, width, metrics)


def _encode(encode: Callable[..., Any], texts: Sequence[str]) -> Tensor:
    """Return float32 embeddings ``[n, d]`` on the CPU; a text that occurs twice is encoded once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    embeddings = torch.from_numpy(encode(list(rows), show_progress_bar=True)).float()
    return embeddings if len(rows) == len(texts) else embeddings[[rows[text] for text in texts]]


def _measure(
    data: RetrievalSet | ScoredPairs, queries: Tensor, documents: Tensor, device: torch.device
) -> dict[str, float]:
    """Return the metrics of embeddings ``[q, d]`` and ``[n, d]``, or ``[n, d]`` both for pairs."""

    def score(documents: Tensor) -> dict[str, float]:
        if isinstance(data, ScoredPairs):
            cosines = pairwise_cosine(queries, documents)
            return {"spearman": spearman(cosines, torch.tensor(data.scores, dtype=torch.float64))}
        found = search(queries, documents, torch.arange(len(documents)), DEPTH, device)
        return retrieval_metrics(found.rows, data.relevant)

    metrics = score(documents)
    main = _main(metrics)
    for precision in ("int8", "binary"):
        metrics[f"{main}/{precision}"] = score(as_stored(documents, precision))[main]
    return metrics


def as_stored(documents: Tensor, precision: str) -> Tensor:
    """Return documents as an index of codes has them, for float32 queries to be compared with.

    Embeddings of length 1 are coded by sentence-transformers' ``quantize_embeddings``. A code of
    ``int8`` stands for the middle of its 255th of the coordinate's range over all documents, one
    of ``binary`` for its sign.

    Args:
        documents: float32 ``[n, d]``.
        precision: ``int8`` or ``binary``.

    Returns:
        float32 ``[n, d]``.
    """
    stored = F.normalize(documents, dim=-1)
    ranges = torch.stack([stored.amin(dim=0), stored.amax(dim=0)]).numpy()
    step = (ranges[1] - ranges[0]) / 255
    for block in stored.split(BLOCK):  # views
        if precision == "int8":
            codes = np.asarray(quantize_embeddings(block, "int8", ranges=ranges))
            values = ranges[0] + (codes + np.float32(128.5)) * step
        else:
            bits = np.unpackbits(quantize_embeddings(block, "ubinary"), axis=1, count=len(step))
            values = bits * np.float32(2) - 1
        block.copy_(torch.from_numpy(values))
    return stored


# --- Reporting ------------------------------------------------------------------------------------


def format_table(results: Sequence[Result]) -> str:
    """Return the main metric as text, for each test set a row per model and a column per width.

    >>> print(format_table([Result("a", "sts", 64, {"spearman": 0.5})]))
    sts, Spearman     64
    a              .5000
    """
    labels = {name: textwrap.wrap(label, NAME) for name, label in _labels(results).items()}
    sets, widths = _sets(results), sorted({result.width for result in results}, reverse=True)
    cells = {(r.data, r.model, r.width): _decimals(r.quality()) for r in results}
    rows: list[list[str]] = []
    for data, title in sets.items():
        rows += [[], [title, *map(str, widths)]] if rows else [[title, *map(str, widths)]]
        for model, (*above, last) in labels.items():
            rows += [[line] for line in above]
            rows.append([last, *(cells.get((data, model, width), "-") for width in widths)])
    first = max(len(row[0]) for row in rows if row)
    longest = max(5, *(len(cell) for row in rows for cell in row[1:]))
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(longest) for cell in row[1:])]).rstrip()
        if row
        else ""
        for row in rows
    )


def _decimals(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1)


def _labels(results: Sequence[Result]) -> dict[str, str]:
    """Return a short name of each model: the last parts of its path, as many as tell it apart."""
    parts = {result.model: Path(result.model).parts for result in results}
    for count in range(2, max(map(len, parts.values()), default=0)):
        labels = {model: "/".join(path[-count:]) for model, path in parts.items()}
        if len(set(labels.values())) == len(parts):
            return labels
    return {model: model for model in parts}


def _sets(results: Sequence[Result]) -> dict[str, str]:
    """Return a title of each test set: a name that tells it apart, and its main metric."""
    metrics = {result.data: TITLES[result.main] for result in results}
    names = {data: set_name(Path(data)) for data in metrics}
    if len(set(names.values())) < len(names):
        names = {data: data for data in metrics}
    return {data: f"{names[data]}, {metric}" for data, metric in metrics.items()}


def megabytes(width: int, precision: str) -> int:
    """Return the MB (10^6 bytes) of a million embeddings, which is the bytes of one.

    >>> megabytes(384, "float32"), megabytes(384, "binary")
    (1536, 48)
    """
    return -(-width * PRECISIONS[precision] // 8)


def write_results(results: Sequence[Result], out: Path) -> None:
    """Write ``OUT/evaluation.json`` (all metrics) and ``OUT/quality.png`` (the main ones).

    The json is a list with an object per :class:`Result`: ``model``, ``data``, ``width``, each
    metric, and ``mb_per_million``, the MB of a million embeddings in each precision.

    Raises:
        InputError: ``out`` is a file, or matplotlib is not installed.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{out}: expected a folder to write to, found a file") from None
    rows = [
        {
            "model": result.model,
            "data": result.data,
            "width": result.width,
            **result.metrics,
            "mb_per_million": {name: megabytes(result.width, name) for name in PRECISIONS},
        }
        for result in results
    ]
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    (out / "evaluation.json").write_text(text, encoding="utf-8")
    _draw(results, out / "quality.png")


def _draw(results: Sequence[Result], path: Path) -> None:
    """Draw a row of two charts per test set: quality by width, and by MB in each precision."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("quality.png needs pip install 'embedtune[plots]'") from None
    sets, labels = _sets(results), _labels(results)
    figure = Figure(figsize=(10, 0.8 + 3.4 * len(sets)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(sets), 2, sharex="col", sharey="row", squeeze=False)
    styles = dict(zip(PRECISIONS, ("o-", "s--", "^:"), strict=True))
    for (data, title), (by_width, by_size) in zip(sets.items(), grid, strict=True):
        for number, (model, label) in enumerate(labels.items()):
            own = [r for r in results if (r.data, r.model) == (data, model)]
            widths, colour = [r.width for r in own], f"C{number}"
            name = textwrap.fill(label, NAME)
            by_width.plot(widths, [r.quality() for r in own], "o-", color=colour, label=name)
            for precision, style in styles.items():
                sizes = [megabytes(width, precision) for width in widths]
                values = [r.quality(precision) for r in own]
                by_size.plot(sizes, values, style, color=colour, markersize=5)
        by_width.set_ylabel(title)
    ticks = sorted({result.width for result in results})
    _scale(grid[-1, 0], ticks, "embedding width")
    _scale(grid[-1, 1], [4**power for power in range(1, 7)], "MB per million documents")
    for precision, style in styles.items():
        grid[0, 1].plot([], [], style, color="grey", label=precision)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    grid[0, 1].legend(title="documents")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    figure.savefig(path)


def _scale(axes: Any, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    slant = 45 if len(ticks) > 6 else 0  # or long labels overlap
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks], rotation=slant)
    axes.minorticks_off()
    axes.set_xlabel(label)
