"""Measure test sets whose texts are spread over the ranks, batch by batch."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from embedtune.data.scored_pairs import ScoredPairs
from embedtune.data.testset_batches import TextBatch, TextDataset
from embedtune.distributed import exchange
from embedtune.evaluation.intervals import Interval, PerQuery, intervals
from embedtune.evaluation.measure import Measured, measure

log = logging.getLogger("embedtune")


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

    def measure(
        self, widths: Sequence[int], device: torch.device, similarity: str
    ) -> Measured | None:
        """Measure the embeddings of all ranks, which all must call it; each gets the result.

        Args:
            widths: Measured beside the full width.
            device: That of the run.
            similarity: How the model's embeddings compare.

        Returns:
            None where texts are missing, since a limit left batches out.
        """
        numbers = torch.cat(self._numbers)
        if sum(count for (count,) in exchange.gather_counts([len(numbers)], device)) != len(
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
            return measure(testset, first, second, all_widths, device, None, similarity)
        own = place[self.data.second]
        rows = (own >= 0).nonzero().flatten()
        documents = embeddings[own[rows]]
        return measure(testset, first, documents, all_widths, device, rows, similarity)


class Evaluation:
    """What the batches of an evaluation amount to, set by set.

    Attributes:
        found: What the queries of each retrieval set found last, as ``Measured.found``.
        per_query: What the last metrics of each test set sum up, on every rank.
    """

    def __init__(self) -> None:
        """Start without batches."""
        self.found: dict[str, Tensor] = {}
        self.per_query: dict[str, PerQuery] = {}
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

    def collect(
        self, widths: Sequence[int], device: torch.device, similarity: str = "cosine"
    ) -> dict[str, float]:
        """Return the metrics of all ranks' batches, such as ``val/dev/ndcg@10``, and start anew.

        All ranks must call it; each gets all.

        Args:
            widths: Measured beside the full width.
            device: That of the run.
            similarity: How the model's embeddings compare.
        """
        metrics: dict[str, float] = {}
        self.per_query = {}
        for name, (parts, total) in self._totals.items():
            *sums, queries = exchange.sum_over_ranks(total).tolist()
            metrics |= {f"{name}/{k}": v / queries for k, v in zip(parts, sums, strict=True)}
        for name, shard in self._shards.items():
            measured = shard.measure(widths, device, similarity)
            if measured is None:
                log.warning("%s: not measured, for a limit left some of its texts out", name)
                continue
            metrics |= {f"{name}/{k}": v for k, v in measured.metrics.items()}
            self.per_query[name] = measured.per_query
            if measured.found is not None:
                self.found[name] = measured.found
        self.restart()
        return metrics

    def intervals(self, base: Mapping[str, PerQuery]) -> dict[str, Interval]:
        """Return in which interval each of the last metrics lies above the base model's.

        Args:
            base: What the base model's metrics sum up, by the name of the set.
        """
        return {
            f"{name}/{metric}": interval
            for name, values in self.per_query.items()
            if name in base
            for metric, interval in intervals(base[name], values).items()
        }


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
    sizes = [count for (count,) in exchange.gather_counts([len(mine)], device)]
    found = exchange.gather_rows(embeddings[own[mine]].to(device), sizes).cpu()
    rows = exchange.gather_rows(mine.to(device), sizes).cpu()
    return torch.empty_like(found).index_copy(0, rows, found)[order]
