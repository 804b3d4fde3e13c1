"""Going on any number of times is as never having stopped: steps, examples and weights.

`pytest tests/checkpoints/test_chains.py --chains 500` tries that many chains of stops.
"""

import json
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from embedtune import EmbeddingDataModule, EmbeddingModule
from embedtune.checkpoints import last_checkpoint, read_facts
from embedtune.losses import Loss

EXAMPLES, BATCH = 11, 2
BATCHES = 6  # of an epoch, the last of one example


class Settings(NamedTuple):
    """What all runs of a chain share."""

    every_n_train_steps: int | None  # None saves after each epoch
    accumulated: int
    validates_within: bool
    steps: bool  # whether max_steps or max_epochs ends it
    epochs: int


class Chain(NamedTuple):
    """Runs that end before their time, each after so many batches of its own, and one that ends."""

    settings: Settings
    stops: list[int]
    asks_in_between: bool  # the first run was asked for an epoch less


CHAINS = st.builds(
    Chain,
    st.builds(
        Settings,
        st.sampled_from([1, 2, 3, None]),
        st.sampled_from([1, 3]),
        st.booleans(),
        st.booleans(),
        st.sampled_from([2, 3]),
    ),
    st.lists(st.integers(1, 3 * BATCHES), min_size=1, max_size=3),
    st.booleans(),
)


class KilledError(Exception):
    """What ends a run as a kill would: nothing is saved on its account."""


class Nearer(Loss):
    """A loss that takes no time: each query is drawn to its document."""

    def forward(self, embeddings, target):
        return {"loss": (embeddings.query - embeddings.positive).square().mean()}


class Recorder(pl.Callback):
    """Remember the examples of each batch, and end the run after some."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.seen = stop, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.seen) == self.stop:
            raise KilledError
        self.seen.append((trainer.current_epoch, batch.example_id.tolist()))


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Path:
    """Return a model whose training takes next to no time: an embedding a word."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("static")
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    letters = "abcdefghijk"
    made = [
        {"query": f"{a} q", "pos": [f"{a} {b} p"]}
        for a, b in zip(letters, letters[::-1], strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made[:EXAMPLES]))
    return path


class Ended(NamedTuple):
    seen: list[tuple[int, list[int]]]
    weights: dict[str, torch.Tensor]
    step: int


def run(
    folder: Path, static: Path, rows: Path, chosen: Settings, epochs: int, stop: int | None
) -> Ended:
    """Train, from the last checkpoint where there is one, and be killed after ``stop`` batches."""
    recorder = Recorder(stop)
    every = chosen.every_n_train_steps
    saves = ModelCheckpoint(
        folder, save_last="link", every_n_train_steps=every, enable_version_counter=False
    )
    steps_per_epoch = -(-BATCHES // chosen.accumulated)
    ends = {"max_epochs": epochs}
    if chosen.steps:
        ends = {"max_epochs": -1, "max_steps": epochs * steps_per_epoch}
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[saves, recorder],
        accumulate_grad_batches=chosen.accumulated,
        val_check_interval=3 if chosen.validates_within else 1.0,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **ends,
    )
    constant = {"lr": 0.1, "lr_schedule": "constant", "warmup_proportion": 0}
    module = EmbeddingModule(str(static), loss=Nearer(), **constant)
    data = EmbeddingDataModule(
        str(rows), val_path=str(rows), batch_size=BATCH, query_max_len=8, passage_max_len=8
    )
    path = last_checkpoint(folder)
    try:
        trainer.fit(module, data, ckpt_path=path)
    except KilledError:
        assert stop is not None
    return Ended(recorder.seen, module.encoder.state_dict(), trainer.global_step)


def assert_chain_is_unbroken(tmp_path: Path, static: Path, rows: Path, chain: Chain) -> None:
    chosen = chain.settings
    whole = run(tmp_path / "whole", static, rows, chosen, chosen.epochs, None)
    assert len(whole.seen) == chosen.epochs * BATCHES
    folder = tmp_path / "chain"
    for stop in (*chain.stops, None):
        is_first = stop is not None and not folder.exists()
        epochs = chosen.epochs - (chain.asks_in_between and is_first)
        path = last_checkpoint(folder)
        place = {"epoch": 0, "batch": 0} if path is None else read_facts(path)["place"]
        start = place["epoch"] * BATCHES + place["batch"]
        ended = run(folder, static, rows, chosen, epochs, stop)
        assert ended.seen == whole.seen[start : start + len(ended.seen)]
    assert start + len(ended.seen) == len(whole.seen)
    assert ended.step == whole.step
    assert all(torch.equal(ended.weights[name], value) for name, value in whole.weights.items())


@pytest.mark.timeout(0)
def test_a_chain_of_stops_is_the_unbroken_run(tmp_path_factory, static, rows, request):
    count = request.config.getoption("--chains")

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=count <= 40,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CHAINS)
    def hold(chain: Chain) -> None:
        assert_chain_is_unbroken(tmp_path_factory.mktemp("chain"), static, rows, chain)

    hold()
