"""Encode test sets in shards over the ranks, and measure what was found."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.utils.data
from torch import Tensor

from embedtune import gather
from embedtune.batch import Text, make_chunks
from embedtune.dataset import Rows
from embedtune.encoder import Encoder, Features, Role
from embedtune.errors import InputError
from embedtune.functional import pairwise_cosine
from embedtune.loading import UNLIMITED
from embedtune.metrics import DEPTH, RETRIEVAL_METRICS, retrieval_metrics, spearman
from embedtune.sampler import Key
from embedtune.search import merge, search
from embedtune.testsets import RetrievalSet, ScoredPairs, is_beir, set_name

log = logging.getLogger("embedtune")

TEXTS_PER_BATCH = 256
"""Texts of a test set that a rank encodes between two batches' exchanges."""


def name_sets(
    spec: str | Sequence[str] | dict[str, str | list[str]] | None, key: str
) -> dict[str, list[str]]:
    """Name the data sets that a run evaluates.

    Args:
        spec: What the user gave: a path, several, or paths by name. Every BEIR folder is a set of
            its own; files that have no name of their own are one set together.
        key: The YAML key it was given under, for messages.

    Returns:
        The paths of each set. A set that was given no name has that of its folder or first file.

    Raises:
        InputError: A name is taken twice, or cannot be part of a metric's name.
    """
    if isinstance(spec, dict):
        named = [(name, [p] if isinstance(p, str) else list(p)) for name, p in spec.items()]
    else:
        paths = [spec] if isinstance(spec, str) else list(spec or ())
        folders = [path for path in paths if is_beir(Path(path))]
        files = [path for path in paths if path not in folders]
        groups = [[path] for path in folders] + ([files] if files else [])
        named = [(set_name(Path(group[0])), group) for group in groups]
    sets: dict[str, list[str]] = {}
    for name, group in named:
        if name in sets:
            raise InputError(f"{key}: expected a name for each set, found {name!r} twice")
        if not name or "/" in name:
            raise InputError(f"{key}: expected names without '/', found {name!r}")
        if len(group) > 1 and any(is_beir(Path(path)) for path in group):
            raise InputError(f"{key}: {name}: expected one BEIR folder or files, found {group}")
        sets[name] = group
    return sets


def scored_pairs(rows: Rows) -> ScoredPairs:
    """Return every query of scored rows with each of its texts."""
    table = rows.table[:]
    lists = list(zip(table["query"], table["positives"], table["scores"], strict=True))
    return ScoredPairs(
        first=[query for query, texts, _ in lists for _ in texts],
        second=[text for _, texts, _ in lists for text in texts],
        scores=[score for *_, scores in lists for score in scores],
    )


# --- Texts in, batches out ----------------------------------------------------------------------


class TextBatch(NamedTuple):
    """One rank's share of a global batch of texts.

    Attributes:
        text: int64 ``[n]``, the numbers of the texts in their set; empty for a spare share.
        chunks: Token features, packed or padded.
        rows: int64 ``[n]``: the row of each text in the embeddings of all chunks.
    """

    text: Tensor
    chunks: list[Features]
    rows: Tensor


class TextDataset(torch.utils.data.Dataset):
    """The distinct texts of a test set.

    Attributes:
        texts: Each with its role; queries (of pairs: the first texts) and documents apart.
        first: int64: the number of the text of each query, or of the first text of each pair.
        second: int64: the same for documents, or for the second texts.
    """

    def __init__(self, testset: RetrievalSet | ScoredPairs) -> None:
        """Number the texts, the longest first: ranks and chunks get texts of about one length."""
        self.testset = testset
        first, second = (
            (testset.queries, testset.corpus)
            if isinstance(testset, RetrievalSet)
            else (testset.first, testset.second)
        )
        roles: tuple[tuple[Role, list[str]], ...] = (("query", first), ("document", second))
        distinct = {(role, text): len(text) for role, texts in roles for text in texts}
        self.texts = sorted(distinct, key=lambda text: -distinct[text])
        number = {text: i for i, text in enumerate(self.texts)}
        self.first, self.second = (
            torch.tensor([number[role, text] for text in texts]) for role, texts in roles
        )

    def __len__(self) -> int:
        """Return the number of distinct texts."""
        return len(self.texts)

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Key, Role, str]]:
        """Return several texts with their keys (the loader's fast path)."""
        return [(key, *self.texts[key.example]) for key in keys]


class TextCollator:
    """Make a :class:`TextBatch` of texts as an exported model encodes them."""

    def __init__(self, encoder: Encoder, tokens_per_chunk: int) -> None:
        """Take the encoder's own tokenisation, prompts and longest input."""
        self.encoder, self.tokens_per_chunk = encoder, tokens_per_chunk

    def __call__(self, texts: Sequence[tuple[Key, Role, str]]) -> TextBatch:
        """Return the batch of ``texts``."""
        encoder = self.encoder
        max_len = encoder.max_seq_length or encoder.cap(UNLIMITED)
        chunks, rows = make_chunks(
            encoder,
            [Text(text, role, encoder.default_prompt(role), max_len) for _, role, text in texts],
            self.tokens_per_chunk,
        )
        counted = [key.example for key, *_ in texts if not key.spare]
        return TextBatch(torch.tensor(counted, dtype=torch.int64), chunks, rows)


# --- Embeddings in, metrics out -----------------------------------------------------------------


class Measured(NamedTuple):
    """What one model reaches on one test set.

    Attributes:
        metrics: By name, such as ``ndcg@10``, and at a smaller width ``ndcg@10/128``.
        found: For each query the rows of the documents that it finds, best first, int64
            ``[q, DEPTH]``; None for scored pairs.
    """

    metrics: dict[str, float]
    found: Tensor | None


def metric_names(testset: RetrievalSet | ScoredPairs, widths: Sequence[int]) -> list[str]:
    """Return the names of the metrics of a test set.

    >>> metric_names(ScoredPairs([], [], []), [16, 8])
    ['spearman', 'spearman/16', 'spearman/8']
    """
    names = RETRIEVAL_METRICS if isinstance(testset, RetrievalSet) else ("spearman",)
    return [f"{name}{suffix}" for suffix in ("", *(f"/{w}" for w in widths)) for name in names]


def main_metric(testset: RetrievalSet | ScoredPairs) -> str:
    """Return the metric that sums up a test set."""
    return metric_names(testset, ())[0]


class Shard:
    """The embeddings of the texts of a test set that this rank has encoded."""

    def __init__(self, data: TextDataset) -> None:
        """Start with none."""
        self.data = data
        self._numbers: list[Tensor] = []
        self._embeddings: list[Tensor] = []

    def add(self, batch: TextBatch, embeddings: Tensor) -> None:
        """Take the embeddings of a batch's chunks, ``[rows, width]``."""
        self._numbers.append(batch.text.cpu())
        # On the CPU: a corpus may need more memory than the model leaves.
        self._embeddings.append(embeddings[batch.rows[: len(batch.text)]].float().cpu())

    def measure(self, widths: Sequence[int], device: torch.device) -> Measured | None:
        """Measure the embeddings of all ranks, which all must call it; each gets the result.

        Args:
            widths: Measured beside the full width.
            device: That of the run.

        Returns:
            None where texts are missing, since a limit left batches out.
        """
        numbers = torch.cat(self._numbers)
        if sum(count for (count,) in gather.gather_counts([len(numbers)], device)) != len(
            self.data
        ):
            return None
        place = torch.full((len(self.data),), -1)
        place[numbers] = torch.arange(len(numbers))
        embeddings = torch.cat(self._embeddings)
        all_widths = {"": embeddings.shape[1], **{f"/{width}": width for width in widths}}
        first = _of_all_ranks(embeddings, place, self.data.first, device)
        testset = self.data.testset
        if isinstance(testset, ScoredPairs):
            second = _of_all_ranks(embeddings, place, self.data.second, device)
            return _measure_pairs(first, second, testset, all_widths)
        own = place[self.data.second]
        rows = (own >= 0).nonzero().flatten()
        return _measure_retrieval(first, embeddings[own[rows]], rows, testset, all_widths, device)


class Evaluation:
    """What the batches of an evaluation amount to, set by set.

    Attributes:
        found: What the queries of each retrieval set found last, as ``Measured.found``.
    """

    def __init__(self) -> None:
        """Start without batches."""
        self.found: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the batches of an evaluation that did not end."""
        self._totals: dict[str, tuple[list[str], Tensor]] = {}
        self._shards: dict[str, Shard] = {}

    def add_loss(self, name: str, parts: list[str], values: Tensor, queries: int) -> None:
        """Take the parts of a loss, ``[n]``, of this rank's batch of so many queries."""
        weighed = torch.cat([values, values.new_ones(1)]) * queries
        _, total = self._totals.get(name, (parts, torch.zeros_like(weighed)))
        self._totals[name] = parts, total + weighed

    def add_texts(self, name: str, data: TextDataset, batch: TextBatch, embedded: Tensor) -> None:
        """Take the embeddings of this rank's batch of texts."""
        self._shards.setdefault(name, Shard(data)).add(batch, embedded)

    def collect(self, widths: Sequence[int], device: torch.device) -> dict[str, float]:
        """Return the metrics of all ranks' batches, such as ``val/dev/ndcg@10``, and start anew.

        All ranks must call it; each gets all.

        Args:
            widths: Measured beside the full width.
            device: That of the run.
        """
        metrics: dict[str, float] = {}
        for name, (parts, total) in self._totals.items():
            *sums, queries = gather.sum_over_ranks(total).tolist()
            metrics |= {f"{name}/{k}": v / queries for k, v in zip(parts, sums, strict=True)}
        for name, shard in self._shards.items():
            measured = shard.measure(widths, device)
            if measured is None:
                log.warning("%s: not measured, for a limit left some of its texts out", name)
                continue
            metrics |= {f"{name}/{k}": v for k, v in measured.metrics.items()}
            if measured.found is not None:
                self.found[name] = measured.found
        self.restart()
        return metrics


def _measure_pairs(
    first: Tensor, second: Tensor, testset: ScoredPairs, widths: dict[str, int]
) -> Measured:
    scores = torch.tensor(testset.scores, dtype=torch.float64)
    cosines = {k: pairwise_cosine(first[:, :w], second[:, :w]) for k, w in widths.items()}
    return Measured({f"spearman{k}": spearman(c, scores) for k, c in cosines.items()}, None)


def _measure_retrieval(
    queries: Tensor,
    documents: Tensor,
    rows: Tensor,
    testset: RetrievalSet,
    widths: dict[str, int],
    device: torch.device,
) -> Measured:
    """Search the documents of all ranks, of which this one has those at ``rows`` of the corpus."""
    metrics: dict[str, float] = {}
    by_width: list[Tensor] = []
    for suffix, width in widths.items():
        own = search(queries[:, :width], documents[:, :width], rows, DEPTH, device)
        by_width.append(merge(own, DEPTH).rows.cpu())
        values = retrieval_metrics(by_width[-1], testset.relevant)
        metrics |= {f"{name}{suffix}": value for name, value in values.items()}
    return Measured(metrics, by_width[0])


def _of_all_ranks(
    embeddings: Tensor, place: Tensor, numbers: Tensor, device: torch.device
) -> Tensor:
    """Return the embeddings of some texts, float32 ``[len(numbers), width]``, on the CPU.

    Args:
        embeddings: Those of this rank.
        place: The row of each text among them, -1 where another rank has it.
        numbers: The texts.
        device: Where ranks exchange tensors.
    """
    distinct, order = numbers.unique(return_inverse=True)
    own = place[distinct]
    mine = (own >= 0).nonzero().flatten()
    sizes = [count for (count,) in gather.gather_counts([len(mine)], device)]
    found = gather.gather_rows(embeddings[own[mine]].to(device), sizes).cpu()
    rows = gather.gather_rows(mine.to(device), sizes).cpu()
    return torch.empty_like(found).index_copy(0, rows, found)[order]
