"""Count what two ranks exchange in a training step, in multiples of the trained parameters N.

    torchrun --standalone --nproc_per_node 2 benchmarks/traffic.py MODEL

prints a row for each strategy, precision and number of chunks: the elements all-reduced,
all-gathered and reduce-scattered per N, the bytes that a rank sends per N by ring algorithms, and
how much of the model FSDP has gathered at once while it runs backward. No figure depends on the
machine's speed. docs/scaling.md has the results.
"""

import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.distributed import exchange
from embedtune.distributed.strategies import NAMED, named_strategy
from embedtune.distributed.zero import ZeRO

PAIRS, TOKENS = 8, 16  # a rank; every text is 16 tokens long
KINDS = {"allreduce": "reduced", "allgather": "gathered", "reduce_scatter": "scattered"}


class Exchanges(TorchDispatchMode):
    """Add up elements and ring bytes of the collectives that run below it.

    A batch's own, its embeddings and counts, are among them: under a thousandth of N here.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.elements: Counter[str] = Counter()
        self.sent = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function.namespace == "c10d":
            kind = next((k for k in KINDS if k in function._opname), None)
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            elements = sum(tensor.numel() for tensor in tensors)
            if kind is not None:
                self._count(kind, elements, tensors[0].element_size())
        return function(*args, **(kwargs or {}))

    def _count(self, kind: str, elements: int, size: int) -> None:
        if kind != "allreduce":  # the whole and a rank's part of it were counted
            elements = elements * self.ranks // (self.ranks + 1)
        self.elements[KINDS[kind]] += elements
        passes = 2 if kind == "allreduce" else 1
        self.sent += passes * elements * size * (self.ranks - 1) / self.ranks


class Count(pl.Callback):
    """Count the second step: in the first, strategies look at the order of the layers."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start counting."""
        self.chunks, self.gathered_at_once = len(batch.chunks), 0
        self.exchanges = Exchanges(trainer.world_size)
        units = FullyShardedDataParallel.fsdp_modules(trainer.strategy.model)
        self.hooks = [
            layer.register_full_backward_hook(lambda *_: self._look(units))
            for layer in pl_module.encoder.modules()
            if units and isinstance(layer, torch.nn.Linear)
        ]
        self.exchanges.__enter__()

    def _look(self, units: list[FullyShardedDataParallel]) -> None:
        gathered = 0
        for unit in units:
            flat: Any = unit._handle.flat_param
            is_whole = flat.data_ptr() != flat._local_shard.data_ptr()
            if is_whole and flat.untyped_storage().size():
                gathered += flat._unpadded_unsharded_size.numel()
        self.gathered_at_once = max(self.gathered_at_once, gathered)

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop counting."""
        self.exchanges.__exit__(None, None, None)
        for hook in self.hooks:
            hook.remove()


def count(model: str, strategy: str, precision: Any, chunks: int, data: Path) -> str:
    """Return one row."""
    chosen = named_strategy(strategy)
    if isinstance(chosen, ZeRO) and chosen.stage == 3:
        chosen.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    module, callback = EmbeddingModule(model), Count()
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=chosen,
        precision=precision,
        max_steps=2,
        callbacks=[callback],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = 2 * PAIRS * TOKENS // chunks
    trainer.fit(module, EmbeddingDataModule(str(data), batch_size=PAIRS, tokens_per_chunk=tokens))
    found, sent = callback.exchanges.elements, callback.exchanges.sent
    assert callback.chunks == chunks
    return (
        f"| {strategy} | {precision} | {chunks} "
        + "".join(f"| {found[kind] / size:.2f} " for kind in KINDS.values())
        + f"| {sent / size:.1f} | {callback.gathered_at_once / size:.2f} |"
    )


def main(model: str) -> None:
    """Print the table."""
    folder = Path(tempfile.gettempdir()) / f"traffic-{os.environ['TORCHELASTIC_RUN_ID']}"
    folder.mkdir(exist_ok=True)
    data = folder / f"pairs-{exchange.launched_rank()}.jsonl"
    texts = (" ".join(letters) for letters in itertools.product("abcd", repeat=TOKENS - 2))
    rows = ({"query": next(texts), "pos": [next(texts)]} for _ in range(4 * PAIRS))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        "| strategy | precision | chunks | reduced | gathered | scattered | sent | at once |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for strategy in ("ddp", *(name for name in NAMED if name != "zero3_offload")):
        for precision in ("32-true", "bf16-mixed"):
            lines += [count(model, strategy, precision, chunks, data) for chunks in (1, 2, 4, 8)]
    if exchange.rank() == 0:
        sys.stdout.write("\n".join(lines) + "\n")
    exchange.leave()


if __name__ == "__main__":
    main(sys.argv[1])
