"""Compare models on test sets, at several widths and with quantised documents."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from embedtune.data.beir import RetrievalSet
from embedtune.data.scored_pairs import ScoredPairs
from embedtune.errors import InputError
from embedtune.evaluation.intervals import Interval, PerQuery, intervals
from embedtune.evaluation.measure import main_metric, measure
from embedtune.evaluation.metrics import TITLES
from embedtune.evaluation.quantise import as_stored
from embedtune.models.embedding import with_tokens
from embedtune.models.loading import load_sentence_transformer
from embedtune.models.similarity import compared_by
from embedtune.models.unsupported import refuse_unsupported

log = logging.getLogger("embedtune")


class Result(NamedTuple):
    """The quality of one model on one test set at one width.

    Attributes:
        model: As given.
        data: The test set, as given.
        width: Numbers of an embedding.
        metrics: Those of :data:`~embedtune.evaluation.metrics.TITLES`; and the main metric with
            quantised documents, such as ``ndcg@10/int8``.
        intervals: In which each metric's difference from the first model lies, where both were
            measured, see ``evaluation.intervals``; None of the first model itself.
        own_width: Numbers of an embedding that is not cut; None where it is not known.
    """

    model: str
    data: str
    width: int
    metrics: dict[str, float]
    intervals: dict[str, Interval] | None = None
    own_width: int | None = None

    @property
    def main(self) -> str:
        """Name of the main metric; a loss where there is no other."""
        return next((name for name in TITLES if name in self.metrics), "loss")

    def quality(self, precision: str = "float32") -> float:
        """Return the main metric with documents in ``precision``."""
        return self.metrics[self.main + f"/{precision}" * (precision != "float32")]


def evaluate_models(
    models: Sequence[str],
    data: Mapping[str, RetrievalSet | ScoredPairs],
    dims: Sequence[int] | None = None,
    trust_remote_code: bool = False,
    results: list[Result] | None = None,
) -> list[Result]:
    """Measure each model on each test set at each of ``dims``, by default at the model's own width.

    The others are compared with the first model where that has the width.

    Texts are compared by each model's own similarity, documents stored as codes, which have length
    1, by cosine. A model's query prompt is used for queries and the first texts of pairs, its
    document prompt for documents and the second. Widths above a model's own are left out for that
    model.

    Args:
        models: Hub names or folders of sentence-transformers models.
        data: The test sets by name.
        dims: Widths that embeddings are cut to.
        trust_remote_code: Run code that the models bring along.
        results: An empty list that is filled as sets are measured, for a later model may fail.

    Raises:
        InputError: A model cannot be loaded, or a width is not positive or too large for all.
    """
    for width in dims or ():
        if width < 1:
            raise InputError(f"dims: expected widths of at least 1, found {width}")
    results = [] if results is None else results
    firsts: dict[tuple[str, int], PerQuery] = {}
    for model in dict.fromkeys(models):
        for result, values in _evaluate(model, data, dims, trust_remote_code):
            place = result.data, result.width
            if model == models[0]:
                firsts[place] = values
            else:
                between = intervals(firsts[place], values) if place in firsts else {}
                result = result._replace(intervals=between)
            results.append(result)
    if not results:
        raise InputError(f"dims: expected a width that a model has, found only {list(dims or ())}")
    return results


def _evaluate(
    name: str,
    data: Mapping[str, RetrievalSet | ScoredPairs],
    dims: Sequence[int] | None,
    trust_remote_code: bool,
) -> Iterator[tuple[Result, PerQuery]]:
    """Yield what a model reaches, and what its metrics sum up."""
    model = load_sentence_transformer(name, trust_remote_code=trust_remote_code)
    refuse_unsupported(model, name)
    own = model.get_embedding_dimension() or model.encode_query(["unknown"]).shape[1]
    asked = {own} if dims is None else set(dims)
    if missing := sorted(width for width in asked if width > own):
        log.warning("%s has width %s: left out at %s", name, own, ", ".join(map(str, missing)))
    widths = sorted((width for width in asked if width <= own), reverse=True)
    similarity = compared_by(model.similarity_fn_name, isinstance(model[-1], Normalize))
    if similarity != "cosine":
        log.info("%s compares by %s", name, similarity)
    for set_as_given, texts in data.items() if widths else ():
        as_queries, as_documents, *_ = texts
        prompts = [model.prompts.get(role) for role in ("query", "document")]
        queries = _encode(model.encode_query, with_tokens(model, as_queries, prompts[0]))
        documents = _encode(model.encode_document, with_tokens(model, as_documents, prompts[1]))
        for width in widths:
            cut = queries[:, :width], documents[:, :width]
            metrics, values = _measure(texts, *cut, model.device, similarity)
            yield Result(name, set_as_given, width, metrics, own_width=own), values


def _encode(encode: Callable[..., Any], texts: Sequence[str]) -> Tensor:
    """Return float32 embeddings ``[n, d]`` on the CPU; a text that occurs twice is encoded once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    embeddings = torch.from_numpy(encode(list(rows), show_progress_bar=True)).float()
    return embeddings if len(rows) == len(texts) else embeddings[[rows[text] for text in texts]]


def _measure(
    data: RetrievalSet | ScoredPairs,
    queries: Tensor,
    documents: Tensor,
    device: torch.device,
    similarity: str,
) -> tuple[dict[str, float], PerQuery]:
    """Return the metrics of embeddings ``[q, d]`` and ``[n, d]``, or ``[n, d]`` both for pairs."""
    widths, main = {"": queries.shape[1]}, main_metric(data)
    metrics, _, per_query = measure(data, queries, documents, widths, device, similarity=similarity)
    values = dict(per_query.values)
    for precision in ("int8", "binary"):
        stored = as_stored(documents, precision)
        found = measure(data, queries, stored, widths, device)
        metrics[f"{main}/{precision}"] = found.metrics[main]
        values[f"{main}/{precision}"] = found.per_query.values[main]
    return metrics, per_query._replace(values=values)
