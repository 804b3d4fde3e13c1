"""What the module settles from its data, and what it computes in a step."""

import json
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import zoo_models
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from transformers import T5Config

from embedtune import EmbeddingDataModule, EmbeddingModule, ExportModel, InputError
from embedtune.callbacks.baseline import Baseline
from embedtune.callbacks.throughput import Throughput
from embedtune.data.collate import Collator
from embedtune.distributed import named_strategy
from embedtune.losses import CoSENT, Distillation, InfoNCE, ListwiseKL, Matryoshka
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec
from embedtune.training.start_projection import sample_embeddings

ROWS = {
    "pair": [{"query": f"query {i}", "pos": [f"document {i} " + "x " * i]} for i in range(12)],
    "triplet": [
        {
            "query": f"query {i}",
            "pos": [f"document {i}"],
            "neg": [f"wrong {i} {j}" for j in range(4)],
        }
        for i in range(12)
    ],
    "scored": [
        {"query": f"query {i}", "pos": [f"a {i}", f"b {i}"], "scores": [0.8, 0.1]}
        for i in range(12)
    ],
    "distill": [{"query": f"text {i}"} for i in range(12)],
}


def write(folder: Path, name: str, rows: list[dict] | None = None) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[name]))
    return str(path)


def teacher(folder: Path, width: int, rows: int = 12) -> str:
    path = folder / f"teacher-{width}.f32"
    generator = torch.Generator().manual_seed(width)
    torch.randn(rows, width, generator=generator).numpy().tofile(path)
    return str(path)


def trainer(folder: Path, **kwargs) -> pl.Trainer:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
        **kwargs,
    }
    return pl.Trainer(**settings)


def fit(folder, model, name, data=None, trainer_kwargs=None, **module):
    """Train one run; return the module and the weights it started from."""
    pl.seed_everything(1, verbose=False)
    module = module.pop("kind", EmbeddingModule)(str(model), **module)
    data = EmbeddingDataModule(write(folder, name), **{"batch_size": 4, **(data or {})})
    start = {k: v.clone() for k, v in module.encoder.state_dict().items()}
    trainer(folder, **(trainer_kwargs or {})).fit(module, data)
    return module, start


def movement(module, start):
    return max(
        (value - start[name]).abs().max().item()
        for name, value in module.encoder.state_dict().items()
        if name in start and value.is_floating_point()
    )


class Misspelt(InfoNCE):
    def __init__(self):
        super().__init__()
        self.scope = "ranks"


class SGDModule(EmbeddingModule):
    """Plain SGD shows a wrong gradient scale, which AdamW would hide."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("use_mrl", [False, True])
@pytest.mark.parametrize("name", ["pair", "triplet", "scored", "distill"])
def test_every_format_trains_with_and_without_mrl(tmp_path, tiny_bert, name, use_mrl):
    data = {"neg_nums": 2}
    if name == "distill":
        data = {"teacher_path": teacher(tmp_path, 48), "teacher_embedding_dim": 48}
    module, start = fit(tmp_path, tiny_bert, name, data, use_mrl=use_mrl, mrl_dims="16,40", lr=1e-3)
    assert movement(module, start) > 1e-4
    width = 48 if name == "distill" else 40 if use_mrl else 32
    assert module.encoder.width == width


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pair", InfoNCE), ("triplet", InfoNCE), ("scored", ListwiseKL), ("distill", Distillation)],
)
def test_the_default_loss_follows_the_format(tmp_path, tiny_bert, name, expected):
    data = {"teacher_path": teacher(tmp_path, 32)} if name == "distill" else None
    module, _ = fit(tmp_path, tiny_bert, name, data)
    assert type(module.loss) is expected


def test_mrl_wraps_the_loss_and_distillation_takes_the_widths_itself(tmp_path, tiny_bert):
    module, _ = fit(tmp_path, tiny_bert, "pair", use_mrl=True, mrl_dims=[8, 32])
    assert isinstance(module.loss, Matryoshka)
    data = {"teacher_path": teacher(tmp_path, 32)}
    module, _ = fit(tmp_path, tiny_bert, "distill", data, use_mrl=True, mrl_dims=[8, 32])
    assert isinstance(module.loss, Distillation)
    assert module.loss.mrl_dims == [8, 32]


@pytest.mark.parametrize(
    ("init", "texts", "starts_near"),
    [
        (None, 4 * 32, True),
        (None, 4 * 32 - 1, False),
        ("teacher", 60, True),
        ("none", 4 * 32, False),
        ("pca", 4 * 32, False),
    ],
)
def test_distillation_starts_from_the_teacher(tmp_path, tiny_bert, init, texts, starts_near):
    """A student whose axes are turned has nothing to learn but that."""
    rows = [{"query": f"{['add', 'file', 'close'][i % 3]} {i}"} for i in range(texts)]
    base = SentenceTransformer(str(tiny_bert), device="cpu")
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    embeddings = torch.from_numpy(base.encode([row["query"] for row in rows])) @ rotation
    embeddings.numpy().tofile(tmp_path / "turned.f32")
    settings = {"loss": Distillation(similarity_weight=0.0, rank_weight=0.0), "lr": 1e-12}
    pl.seed_everything(1, verbose=False)
    module = EmbeddingModule(str(tiny_bert), projection_init=init, dropout=0.0, **settings)
    path = write(tmp_path, "distill", rows)
    data = EmbeddingDataModule(path, teacher_path=str(tmp_path / "turned.f32"), batch_size=16)
    running = trainer(tmp_path)
    running.fit(module, data)
    assert (running.callback_metrics["train/cosine"] < 0.01) == starts_near
    assert (module.encoder.dense is not None) == starts_near


def test_temperature_is_that_of_the_default_loss(tmp_path, tiny_bert):
    module, _ = fit(tmp_path, tiny_bert, "pair", temperature=0.5)
    assert module.loss.temperature == 0.5
    with pytest.raises(InputError, match=r"init_args\.temperature"):
        EmbeddingModule(str(tiny_bert), loss=InfoNCE(), temperature=0.5)


def test_two_teachers_are_concatenated(tmp_path, tiny_bert):
    paths = [teacher(tmp_path, 24), teacher(tmp_path, 16)]
    module, _ = fit(tmp_path, tiny_bert, "distill", {"teacher_path": paths})
    assert module.encoder.width == 40


@pytest.mark.parametrize(
    ("name", "data", "module", "message"),
    [
        ("pair", {}, {"use_mrl": True, "mrl_dims": [64], "projection_init": "none"}, "mrl_dims"),
        ("pair", {}, {"projection_init": "teacher", "use_mrl": True}, "data.teacher_path"),
        ("pair", {}, {"loss": CoSENT()}, "CoSENT takes scored data, found pair"),
        ("pair", {}, {"loss": Matryoshka(CoSENT(), [8])}, "CoSENT takes scored data, found pair"),
        ("pair", {"teacher_path": "t"}, {}, "expected distill data"),
        ("distill", {}, {}, "data.teacher_path"),
        ("pair", {"batch_size": 0}, {}, "data.batch_size"),
        ("pair", {}, {"warmup_proportion": 2}, "warmup_proportion"),
        ("pair", {}, {"lr": 0.0}, "model.lr"),
        ("pair", {}, {"weight_decay": -1.0}, "model.weight_decay: expected a number from 0 on"),
        ("pair", {}, {"temperature": 0.0}, "model.temperature: expected a positive number"),
        ("pair", {"query_max_len": 2}, {}, "data.query_max_len: expected more tokens than begin"),
        ("distill", {"teacher_path": []}, {}, "data.teacher_path: .* found an empty list"),
    ],
)
def test_settings_that_do_not_fit_are_an_error(tmp_path, tiny_bert, name, data, module, message):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, tiny_bert, name, data, **module)


def test_a_dropout_that_the_model_has_no_place_for_is_refused(tmp_path):
    """Before the base model is measured; T5 has one rate for all of its own."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    zoo_models.transformer(zoo_models.configured(T5Config, sizes), tmp_path / "t5")
    given = {"dropout": 0.2, "attention_dropout": 0.0}
    module = EmbeddingModule(str(tmp_path / "t5"), pooling="mean", **given)
    with pytest.raises(InputError, match=r"model\.attention_dropout: expected a model whose"):
        trainer(tmp_path).fit(module, EmbeddingDataModule(write(tmp_path, "pair")))


def test_a_loss_that_does_not_take_the_data_is_refused_before_a_text_is_embedded(
    tmp_path, tiny_bert
):
    module = EmbeddingModule(str(tiny_bert), loss=ListwiseKL(), use_mrl=True, mrl_dims=[8])
    with pytest.raises(InputError, match="ListwiseKL takes scored data, found pair"):
        trainer(tmp_path).fit(module, EmbeddingDataModule(write(tmp_path, "pair")))
    assert module.encoder.dense is None


def test_prompts_of_rows_that_fill_the_longest_query_are_refused(tmp_path, tiny_bert):
    rows = [row | {"prompt": "p " * 9 * (i % 2)} for i, row in enumerate(ROWS["pair"])]
    path = write(tmp_path, "prompted", rows)
    data = EmbeddingDataModule(path, query_max_len=11)
    with pytest.raises(InputError, match=r"query_max_len: expected more tokens than the query"):
        trainer(tmp_path).fit(EmbeddingModule(str(tiny_bert)), data)
    data = EmbeddingDataModule(path, query_max_len=16)
    trainer(tmp_path, max_steps=1).fit(EmbeddingModule(str(tiny_bert)), data)


def test_a_teacher_is_that_of_one_set_and_as_wide_as_the_trained(tmp_path, tiny_bert):
    path = write(tmp_path, "distill")
    settings = {"teacher_path": teacher(tmp_path, 24), "batch_size": 4}
    for val_path, width, message in (
        ({"a": path, "b": path}, 24, "expected one set of distill rows, found val/a, val/b"),
        ({"a": path}, 16, "expected embeddings as wide as .*, 24, found 16"),
    ):
        store = teacher(tmp_path, width)
        data = EmbeddingDataModule(path, val_path=val_path, val_teacher_path=store, **settings)
        with pytest.raises(InputError, match=f"data.val_teacher_path: {message}"):
            trainer(tmp_path).fit(EmbeddingModule(str(tiny_bert)), data)


def test_a_second_fit_tells_nothing_of_the_first(tmp_path, tiny_bert):
    val = write(tmp_path, "scored")
    first = EmbeddingDataModule(write(tmp_path, "pair"), val_path=val, batch_size=4)
    module = EmbeddingModule(str(tiny_bert))
    running = {"callbacks": [Baseline()]}
    trainer(tmp_path, **running).fit(module, first)
    assert module.metrics
    assert module.base_metrics
    again = trainer(tmp_path, **running)
    again.fit(module, EmbeddingDataModule(write(tmp_path, "pair"), batch_size=4))
    assert (module.metrics, module.base_metrics, module.place.epoch) == ({}, {}, 0)
    assert again.global_step == 3


@pytest.mark.parametrize("use_mrl", [False, True])
def test_a_second_fit_is_compared_with_the_base_model(tmp_path, tiny_bert, use_mrl):
    """Not with what the first has made of it; also where a checkpoint has brought that."""
    settings = {"use_mrl": use_mrl, "mrl_dims": [8, 16], "lr": 1e-2}
    module, found = EmbeddingModule(str(tiny_bert), **settings), []
    paths = {"pairs": write(tmp_path, "pair"), "lists": write(tmp_path, "scored")}
    for again in (False, False, True):
        if again:
            kept = {"model_name_or_path": str(tiny_bert), "weights_only": False, **settings}
            module = EmbeddingModule.load_from_checkpoint(tmp_path / "kept.ckpt", **kept)
        data = EmbeddingDataModule(paths["pairs"], val_path=paths, batch_size=4)
        running = trainer(tmp_path, callbacks=[Baseline()])
        running.fit(module, data)
        running.save_checkpoint(tmp_path / "kept.ckpt")
        found.append(module.base_metrics)
    first, *others = found
    expected = {k: v for k, v in first.items() if k.startswith("val/lists/spearman")}
    assert len(expected) == (3 if use_mrl else 1)
    assert first.keys() - expected.keys(), "losses are known of the first"
    assert others == [expected, expected]
    assert module.metrics["val/lists/spearman"] != expected["val/lists/spearman"]


def test_a_second_fit_on_other_rows_is_settled_for_those(tmp_path, tiny_bert):
    """Longest input and the spread of scores are theirs."""
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    model.max_seq_length = 16
    model.save_pretrained(str(tmp_path / "short"))
    module = EmbeddingModule(str(tmp_path / "short"))
    found = []
    for scale, words in ((1, 2), (10, 40)):
        rows = [
            {**row, "scores": [scale * 0.8, scale * 0.1], "query": f"{row['query']} " * words}
            for row in ROWS["scored"]
        ]
        data = EmbeddingDataModule(write(tmp_path, f"rows{words}", rows), batch_size=4)
        trainer(tmp_path).fit(module, data)
        found.append((module.encoder.max_seq_length, module.loss.teacher_temperature))
    (first, cool), (second, hot) = found
    assert (first, second) == (16, 64)
    assert module.encoder.spec.max_seq_length == 64
    assert hot == pytest.approx(10 * cool)


def test_a_fit_after_one_that_failed_is_settled_as_the_first(tmp_path, tiny_bert, monkeypatch):
    mrl = {"use_mrl": True, "mrl_dims": [8, 16]}
    expected, _ = fit(tmp_path, tiny_bert, "pair", **mrl)
    module = EmbeddingModule(str(tiny_bert), **mrl)
    settings = {"val_path": write(tmp_path, "pair"), "batch_size": 4}
    for name in ("start_projection._embed_sample", "settled_loss.derive_temperature"):
        with monkeypatch.context() as patch:
            patch.setattr(f"embedtune.training.{name}", fail)
            data = EmbeddingDataModule(write(tmp_path, "pair"), **settings)
            with pytest.raises(MemoryError):
                trainer(tmp_path).fit(module, data)
    trainer(tmp_path).validate(module, EmbeddingDataModule(val_path=settings["val_path"]))
    trainer(tmp_path).fit(module, EmbeddingDataModule(write(tmp_path, "pair"), **settings))
    assert module.encoder.spec.projection_dim == expected.encoder.spec.projection_dim == 16
    assert module.loss.loss.temperature == expected.loss.loss.temperature


def fail(*args):
    raise MemoryError


def test_paths_may_be_objects(tmp_path, tiny_bert):
    rows, store = Path(write(tmp_path, "distill")), Path(teacher(tmp_path, 32))
    for paths in ((rows, store), ([rows], [store])):
        module = EmbeddingModule(Path(tiny_bert))
        data = EmbeddingDataModule(paths[0], teacher_path=paths[1], predict_path=rows)
        trainer(tmp_path, callbacks=[ExportModel()]).fit(module, data)
        (found,) = trainer(tmp_path).predict(module, data)
        assert found.shape == (12, 32)


class KeepRates(pl.Callback):
    """Keep the rate of each step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class DecayingModule(EmbeddingModule):
    """Takes the optimizer and the schedule, and decays more."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["optimizer"].param_groups[0]["weight_decay"] = 0.5
        return configured


class SteppingModule(EmbeddingModule):
    """Takes the optimizer without the schedule."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()["optimizer"]
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class GroupingModule(EmbeddingModule):
    """Adds weights of its own to those that the schedule knows."""

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        added = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}
        configured["optimizer"].add_param_group(added)
        return configured


def test_a_subclass_may_change_the_optimizer(tmp_path, tiny_bert):
    keep = KeepRates()
    module, _ = fit(
        *(tmp_path, tiny_bert, "pair"), trainer_kwargs={"callbacks": [keep]}, kind=DecayingModule
    )
    (optimizer,) = [module.optimizers().optimizer]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert keep.rates[0] == pytest.approx(module.lr)  # 3 steps have no warm-up


def test_a_subclass_may_have_a_schedule_of_its_own(tmp_path, tiny_bert):
    keep = KeepRates()
    running, settings = {"callbacks": [keep], "max_epochs": 5}, {"kind": SteppingModule, "lr": 1e-3}
    fit(tmp_path, tiny_bert, "pair", None, running, **settings)
    assert keep.rates[::3] == pytest.approx([1e-3 * 0.5**epoch for epoch in range(5)])


def test_weights_that_the_schedule_does_not_know_are_refused(tmp_path, tiny_bert):
    with pytest.raises(InputError, match=r"configure_optimizers: .* found 1 without a rate"):
        fit(tmp_path, tiny_bert, "pair", kind=GroupingModule)


def test_the_rate_that_a_callback_finds_is_trained_with(tmp_path, tiny_bert):
    keep, finder = KeepRates(), LearningRateFinder(1e-6, 1e-2, num_training_steps=20)
    rows = [ROWS["pair"][i % 12] for i in range(48)]
    data = EmbeddingDataModule(write(tmp_path, "rows", rows), batch_size=2)
    module = EmbeddingModule(str(tiny_bert), lr=1e-3, lr_schedule="constant")
    trainer(tmp_path, callbacks=[finder, keep]).fit(module, data)
    assert module.lr == finder.optimal_lr.suggestion() != 1e-3
    assert keep.rates[-1] == pytest.approx(module.lr)


class KeepProjections(pl.Callback):
    """Keep the projection at the start of each epoch and after each step."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts = [*getattr(self, "starts", []), weight(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps = [*getattr(self, "steps", []), weight(pl_module)]


def weight(module):
    return module.encoder.dense.linear.weight.detach().clone()


@pytest.mark.parametrize(
    ("average", "kept"),
    [(StochasticWeightAveraging(1e-2, 1), "starts"), (WeightAveraging(), "steps")],
)
def test_a_projection_is_averaged_with_the_rest(tmp_path, tiny_bert, average, kept):
    """Callbacks copy a module before it has one."""
    keep = KeepProjections()
    running = {"max_epochs": 3, "callbacks": [keep, average, ExportModel()]}
    mrl = {"use_mrl": True, "mrl_dims": [8, 16], "lr": 1e-2}
    data = {"val_path": write(tmp_path, "pair")}
    module, _ = fit(tmp_path, tiny_bert, "pair", data, running, **mrl)
    torch.testing.assert_close(weight(module), torch.stack(getattr(keep, kept)).mean(dim=0))
    saved = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert torch.equal(saved[2].linear.weight, weight(module))


@pytest.mark.parametrize("average", [StochasticWeightAveraging(1e-2, 1), WeightAveraging()])
def test_metrics_are_told_of_the_weights_that_they_were_measured_of(tmp_path, tiny_bert, average):
    """One of them validates each epoch's average, the other no average at all."""
    running = {"max_epochs": 3, "callbacks": [average, ExportModel()]}
    data = {"val_path": {"sts": write(tmp_path, "scored")}}
    module, _ = fit(tmp_path, tiny_bert, "pair", data, running, lr=1e-2)
    told = [epoch for epoch in (1, 2, 3) if "value: " in card(tmp_path, epoch)]
    assert told == ([1, 2, 3] if isinstance(average, WeightAveraging) else [1, 2])
    for epoch in told:
        exported = EmbeddingModule(str(tmp_path / f"checkpoints/epoch-{epoch}"))
        sets = EmbeddingDataModule(val_path=data["val_path"])
        found = trainer(tmp_path).validate(exported, sets, verbose=False)[-1]
        assert f"value: {round(found['val/sts/spearman'], 4)}\n" in card(tmp_path, epoch)
    assert bool(module.metrics) == (3 in told)


def card(folder: Path, epoch: int) -> str:
    return (folder / f"checkpoints/epoch-{epoch}/README.md").read_text()


@pytest.mark.parametrize("average", [StochasticWeightAveraging(1e-2), WeightAveraging()])
def test_parts_of_weights_are_not_averaged(tmp_path, tiny_bert, average):
    """Before anything is trained, and not when it ends."""
    running = {"callbacks": [average], "strategy": named_strategy("fsdp"), "devices": 1}
    with pytest.raises((InputError, MisconfigurationException), match=r"averages whole|sharded"):
        fit(tmp_path, tiny_bert, "pair", trainer_kwargs=running)


def test_what_is_averaged_afterwards_is_not_exported_before(tmp_path, tiny_bert):
    running = {"callbacks": [ExportModel(), WeightAveraging()]}
    with pytest.raises(InputError, match="callbacks: expected ExportModel after WeightAveraging"):
        fit(tmp_path, tiny_bert, "pair", trainer_kwargs=running)


def test_a_validation_before_it_changes_nothing_of_a_fit(tmp_path, tiny_bert):
    settings = {"val_path": write(tmp_path, "pair"), "batch_size": 4}
    data = EmbeddingDataModule(write(tmp_path, "pair"), **settings)
    fits = [EmbeddingModule(str(tiny_bert)) for _ in range(2)]
    trainer(tmp_path).validate(fits[0], data)
    assert (fits[0].loss, fits[0].lr) == (None, None)
    for module in fits:
        trainer(tmp_path).fit(module, EmbeddingDataModule(write(tmp_path, "pair"), **settings))
    assert fits[0].loss.temperature == fits[1].loss.temperature != InfoNCE().temperature
    trainer(tmp_path).validate(fits[0], data)
    assert fits[0].loss.temperature == fits[1].loss.temperature


def test_a_validation_after_it_keeps_what_a_fit_has_derived(tmp_path, tiny_bert):
    module, _ = fit(tmp_path, tiny_bert, "scored")
    derived = module.loss.teacher_temperature
    rows = [{**row, "scores": [50, -50]} for row in ROWS["scored"]]
    steep = EmbeddingDataModule(val_path=write(tmp_path, "steep", rows))
    trainer(tmp_path).validate(module, steep, verbose=False)
    assert module.loss.teacher_temperature == derived


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Distillation(mrl_dims=[8]), r"expected mrl_dims \[16, 32\] as model.mrl_dims"),
        (Matryoshka(Distillation(), [16, 32]), "leave Matryoshka out"),
    ],
)
def test_widths_of_distillation_are_its_own(tmp_path, tiny_bert, loss, message):
    data, mrl = {"teacher_path": teacher(tmp_path, 32)}, {"use_mrl": True, "mrl_dims": [16, 32]}
    with pytest.raises(InputError, match=message):
        fit(tmp_path, tiny_bert, "distill", data, loss=loss, **mrl)


def test_a_loss_chosen_for_one_format_is_not_trained_on_another(tmp_path, tiny_bert):
    module, _ = fit(tmp_path, tiny_bert, "pair")
    with pytest.raises(InputError, match="InfoNCE takes pair or triplet data, found scored"):
        trainer(tmp_path).fit(module, EmbeddingDataModule(write(tmp_path, "scored")))


def test_singleton_lists_are_refused_and_cosent_is_named(tmp_path, tiny_bert):
    rows = [*ROWS["scored"], {"query": "q", "pos": ["p"], "scores": [0.5]}]
    path = write(tmp_path, "lists", rows)
    with pytest.raises(InputError, match=r"lists.jsonl:13: .*CoSENT"):
        trainer(tmp_path).fit(EmbeddingModule(str(tiny_bert)), EmbeddingDataModule(path))


def test_a_wider_reused_dense_is_an_error(tmp_path, tiny_bert):
    module, _ = fit(tmp_path, tiny_bert, "pair", use_mrl=True, mrl_dims=[8, 16])
    module.encoder.model.save_pretrained(str(tmp_path / "dense"))
    again, _ = fit(tmp_path, tmp_path / "dense", "pair", use_mrl=True, mrl_dims=[4, 16])
    assert len(again.encoder.model) == len(module.encoder.model)
    with pytest.raises(InputError, match="it ends in a Dense"):
        fit(tmp_path, tmp_path / "dense", "pair", use_mrl=True, mrl_dims=[8, 32])


def test_pca_starts_from_the_training_texts(tmp_path, tiny_bert):
    module, _ = fit(
        tmp_path, tiny_bert, "pair", trainer_kwargs={"max_steps": 0}, use_mrl=True, mrl_dims=[32]
    )
    weight = module.encoder.dense.linear.weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(32), atol=1e-5, rtol=0)
    embeddings = sample_embeddings(module.encoder, module.data, module.device, 512)
    energy = torch.nn.functional.normalize(embeddings, dim=-1).var(dim=0)
    assert energy[:8].sum() > 0.5 * energy.sum()


def test_flash_attention_in_float32_is_an_error(tmp_path, tiny_bert):
    class Flash(EmbeddingModule):
        def setup(self, stage):
            self.encoder.attn_implementation = "flash_attention_2"
            super().setup(stage)

    with pytest.raises(InputError, match=r"trainer.precision: .*flash_attention_2 needs bf16"):
        fit(tmp_path, tiny_bert, "pair", kind=Flash)


def test_the_time_of_a_validation_is_not_waited_for(tmp_path, tiny_bert):
    class SlowValidation(pl.Callback):
        def on_validation_start(self, trainer, module):
            time.sleep(1)

    callbacks = [SlowValidation(), Throughput()]
    settings = {"callbacks": callbacks, "val_check_interval": 1, "max_epochs": 1}
    validated = {"val_path": write(tmp_path, "pair")}
    module, _ = fit(tmp_path, tiny_bert, "pair", validated, trainer_kwargs=settings)
    logged = module.trainer.callback_metrics
    assert logged["train/input_wait"] < 0.5
    assert logged["train/padding_efficiency"] == 1


def test_a_router_s_texts_are_not_tokenised_ahead(tiny_bert, tmp_path):
    routes = [list(SentenceTransformer(str(tiny_bert), device="cpu")) for _ in range(2)]
    router = Router.for_query_document(query_modules=routes[0], document_modules=routes[1])
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path))
    assert Collator(Encoder(EncoderSpec(str(tmp_path))), 8, 8, 64).tokens_key is None
    assert Collator(Encoder(EncoderSpec(str(tiny_bert))), 8, 8, 64).tokens_key is not None


def test_towers_take_texts_as_long_as_asked(tiny_bert, tmp_path):
    """And the export takes them, too."""
    routes = [list(SentenceTransformer(str(tiny_bert), device="cpu")) for _ in range(2)]
    for modules, length in zip(routes, (16, 24), strict=True):
        modules[0].max_seq_length = length
    router = Router.for_query_document(query_modules=routes[0], document_modules=routes[1])
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "towers"))
    rows = [{**row, "query": row["query"] + " word" * 40} for row in ROWS["pair"]]
    data = EmbeddingDataModule(write(tmp_path, "long", rows), query_max_len=32, batch_size=4)
    module = EmbeddingModule(str(tmp_path / "towers"))
    running = trainer(tmp_path, callbacks=[ExportModel(save_on_epoch_end=False)])
    running.fit(module, data)
    assert module.own_longest_inputs == [16, 24]
    assert module.encoder.longest_inputs == [32, 32]
    exported = Encoder(EncoderSpec(str(tmp_path / "model")))
    assert exported.longest_inputs == [32, 32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_schedule": "bogus"}, "model.lr_schedule: expected one of cosine, linear"),
        ({"lr": float("inf")}, "model.lr: expected a positive number, found inf"),
        ({"use_mrl": True, "projection_init": "bogus"}, "model.projection_init: expected one of"),
        ({"mrl_dims": [8.7, 16]}, r"model.mrl_dims: expected different widths .* \[8.7, 16\]"),
        ({"mrl_dims": "8,8,16"}, "model.mrl_dims: expected different widths"),
        ({"mrl_dims": 8}, "model.mrl_dims: expected different widths"),
        ({"warmup_proportion": 1.0}, "model.warmup_proportion: expected less than half"),
        ({"loss": InfoNCE}, "model.loss: expected a loss .* found <class"),
        ({"loss": torch.nn.MSELoss()}, r"model.loss: expected a loss .* found MSELoss\(\)"),
        ({"loss": Misspelt()}, "model.loss: Misspelt.scope: expected one of rank, .* 'ranks'"),
    ],
)
def test_python_s_settings_are_checked_as_well(tmp_path, tiny_bert, settings, message):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, tiny_bert, "pair", trainer_kwargs={"max_steps": 1}, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "data.seed: expected a number from 0 on, found -1"),
        ({"format": "bogus"}, "data.format: expected auto, pair, .*found 'bogus'"),
    ],
)
def test_those_of_data_are_checked_as_well(settings, message):
    with pytest.raises(InputError, match=message):
        EmbeddingDataModule("train.jsonl", **settings)


def test_a_last_batch_of_one_pair_is_told(tmp_path, tiny_bert, caplog):
    fit(tmp_path, tiny_bert, "pair", {"batch_size": 11}, trainer_kwargs={"max_steps": 1})
    assert "the last batch of an epoch is one pair" in caplog.text


@pytest.mark.parametrize("has_train", [True, False])
@pytest.mark.parametrize("order", [("pairs", "lists"), ("lists", "pairs")])
def test_scored_sets_have_a_loss_where_lists_are_trained(tmp_path, tiny_bert, order, has_train):
    """Whatever their order, and whether the rows that are trained on are known."""
    paths = {"pairs": write(tmp_path, "pair"), "lists": write(tmp_path, "scored")}
    sets = {name: paths[name] for name in order}
    data = EmbeddingDataModule(paths["pairs"] if has_train else None, val_path=sets)
    running = trainer(tmp_path)
    running.validate(EmbeddingModule(str(tiny_bert)), data, verbose=False)
    assert set(running.callback_metrics) == {"val/pairs/loss", "val/lists/spearman"}


def test_a_module_that_was_trained_on_pairs_measures_scored_sets(tmp_path, tiny_bert):
    module, _ = fit(tmp_path, tiny_bert, "pair")
    running = trainer(tmp_path)
    running.validate(module, EmbeddingDataModule(val_path=write(tmp_path, "scored")), verbose=False)
    assert set(running.callback_metrics) == {"val/scored/spearman"}


def test_the_encoder_trains_with_dropout(tmp_path, tiny_bert):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(all(layer.training for layer in module.encoder.modules()))

    fit(tmp_path, tiny_bert, "pair", trainer_kwargs={"callbacks": [Watch()]})
    assert seen == [True] * 3


def test_the_loss_is_computed_in_float32_outside_autocast(tmp_path, tiny_bert):
    seen = []

    class Watched(InfoNCE):
        def forward(self, embeddings, target):
            seen.append((embeddings.query.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(embeddings, target)

    fit(
        tmp_path,
        tiny_bert,
        "pair",
        loss=Watched(),
        trainer_kwargs={"precision": "bf16-mixed"},
    )
    assert set(seen) == {(torch.float32, False)}


def test_two_accumulated_batches_give_the_gradient_of_one(tmp_path, tiny_bert):
    """Lists that are compared alone have no coupling, so halves must average to the whole."""

    def weights(batch_size, accumulate):
        module, start = fit(
            tmp_path,
            no_dropout(tiny_bert, tmp_path),
            "scored",
            {"batch_size": batch_size, "shuffle": False},
            {"accumulate_grad_batches": accumulate},
            kind=SGDModule,
            loss=ListwiseKL(in_batch_negatives=False),
        )
        assert module.trainer.global_step == 3
        return module, start

    (whole, start), (halves, _) = weights(4, 1), weights(2, 2)
    moved = movement(whole, start)
    assert moved > 1e-3
    assert movement(halves, whole.encoder.state_dict()) < 1e-4 * moved


def no_dropout(model, folder):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig

    out = folder / "no_dropout"
    if not out.exists():
        st = SentenceTransformer(str(model), device="cpu")
        st[0].auto_model.config.hidden_dropout_prob = 0.0
        st[0].auto_model.config.attention_probs_dropout_prob = 0.0
        st.save_pretrained(str(out))
    assert AutoConfig.from_pretrained(str(out)).hidden_dropout_prob == 0.0
    return out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"max_epochs": 5, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 7}, 7),
    ],
)
def test_the_schedule_ends_with_the_run(tmp_path, tiny_bert, settings, expected):
    module, _ = fit(tmp_path, tiny_bert, "pair", trainer_kwargs=settings)
    assert module.num_steps == expected == module.trainer.global_step
    assert module.lr_schedulers().get_last_lr()[0] == pytest.approx(0, abs=1e-7)


def test_a_checkpoint_loads_without_a_trainer(tmp_path, tiny_bert):
    settings = {"enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    module, _ = fit(
        tmp_path, tiny_bert, "pair", trainer_kwargs=settings, use_mrl=True, mrl_dims=[8, 40]
    )
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = EmbeddingModule.load_from_checkpoint(path, model_name_or_path=str(tiny_bert))
    assert movement(loaded, module.encoder.state_dict()) == 0


class Scaled(InfoNCE):
    """A loss with a weight and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, embeddings, target):
        self.seen += 1
        return {"loss": super().forward(embeddings, target)["loss"] * self.scale}


@pytest.mark.parametrize("mrl", [{}, {"use_mrl": True, "mrl_dims": [8, 32]}])
def test_so_do_the_weights_of_its_loss(tmp_path, tiny_bert, mrl):
    module, _ = fit(tmp_path, tiny_bert, "pair", loss=Scaled(), **mrl)
    module.trainer.save_checkpoint(tmp_path / "kept.ckpt")
    kept = {"model_name_or_path": str(tiny_bert), "weights_only": False, **mrl}
    loaded = EmbeddingModule.load_from_checkpoint(tmp_path / "kept.ckpt", loss=Scaled(), **kept)
    for name, value in module.loss.state_dict().items():
        assert torch.equal(loaded.loss.state_dict()[name], value)
    path = write(tmp_path, "pair")
    module = EmbeddingModule(str(tiny_bert), loss=Scaled(), **mrl)
    running = trainer(tmp_path)
    running.predict(module, EmbeddingDataModule(predict_path=path), tmp_path / "kept.ckpt")


@pytest.mark.parametrize("name", ["pair", "scored"])
def test_such_a_module_is_measured_with_the_temperatures_of_its_checkpoint(
    tmp_path, tiny_bert, name
):
    module, _ = fit(tmp_path, tiny_bert, name)
    module.trainer.save_checkpoint(tmp_path / "kept.ckpt")
    kept = {"model_name_or_path": str(tiny_bert), "weights_only": False}
    loaded = EmbeddingModule.load_from_checkpoint(tmp_path / "kept.ckpt", **kept)
    path = write(tmp_path, name)
    losses = []
    for measured in (module, loaded, loaded):  # as often as asked
        data = EmbeddingDataModule(path, val_path=path, batch_size=4)
        running = trainer(tmp_path)
        running.validate(measured, data, verbose=False)
        losses.append(float(running.callback_metrics[f"val/{name}/loss"]))
    assert losses == [losses[0]] * 3


def test_known_positives_are_not_pushed_away(tmp_path, tiny_bert):
    """Two rows of one query: with identity-aware targets each keeps the other's positive."""
    rows = [{"query": "same", "pos": ["first", "second"]}, {"query": "same", "pos": ["third"]}]
    module = EmbeddingModule(str(tiny_bert))
    data = EmbeddingDataModule(write(tmp_path, "same", rows), batch_size=3)
    losses = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    trainer(tmp_path, callbacks=[Watch()]).fit(module, data)
    assert losses == [0.0]


def test_validation_logs_loss_and_spearman(tmp_path, tiny_bert):
    module = EmbeddingModule(str(tiny_bert), loss=CoSENT())
    rows = [{"query": f"q {i}", "pos": [f"p {i}"], "scores": [i / 10]} for i in range(10)]
    path = write(tmp_path, "val", rows)
    run = trainer(tmp_path)
    metrics = run.validate(module, EmbeddingDataModule(val_path=path, batch_size=4), verbose=False)[
        0
    ]
    assert set(metrics) == {"val/val/loss", "val/val/spearman"}

    from scipy.stats import spearmanr

    embeddings = [
        torch.as_tensor(module.encoder.model.encode([row[side] for row in flat]))
        for flat in [[{"q": r["query"], "p": r["pos"][0]} for r in rows]]
        for side in ("q", "p")
    ]
    cosine = torch.nn.functional.cosine_similarity(*embeddings)
    expected = spearmanr(cosine, [row["scores"][0] for row in rows]).statistic
    assert metrics["val/val/spearman"] == pytest.approx(expected, abs=1e-5)


def test_one_data_module_serves_fit_validate_and_predict(tmp_path, tiny_bert):
    path = write(tmp_path, "triplet")
    module = EmbeddingModule(str(tiny_bert), use_mrl=True, mrl_dims=[8, 16])
    data = EmbeddingDataModule(path, val_path=path, predict_path=path, neg_nums=2)
    run = trainer(tmp_path)
    run.validate(module, data, verbose=False)
    run.fit(module, data)
    assert module.encoder.width == 16
    (embeddings,) = run.predict(module, data)
    assert embeddings.shape == (12, 16)
    run.fit(module, data)


def test_workers_give_the_batches_of_the_main_process(tmp_path, tiny_bert):
    runs = [
        fit(tmp_path, tiny_bert, "triplet", {"num_workers": workers, "neg_nums": 2})[0]
        for workers in (0, 2)
    ]
    states = [run.encoder.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("data", "found"), [({}, "none"), ({"datamodule": pl.LightningDataModule()}, "LightningDataM")]
)
def test_a_module_without_its_data_module_is_refused(tiny_bert, data, found):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", **quiet)
    loaders = {} if data else {"train_dataloaders": [0]}
    with pytest.raises(InputError, match=f"expected an EmbeddingDataModule .*found {found}"):
        trainer.fit(EmbeddingModule(str(tiny_bert)), **loaders, **data)
