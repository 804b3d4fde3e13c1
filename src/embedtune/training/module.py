"""The LightningModule: encoder, projection and loss."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from embedtune.checkpoints.resume import Place, refuse_other_weights, start_epoch
from embedtune.data.batch import Batch
from embedtune.data.records import Format
from embedtune.data.sampler import step_seed
from embedtune.data.testset_batches import TextBatch
from embedtune.distributed import exchange
from embedtune.distributed.exchange import refuse_other_ranks
from embedtune.distributed.strategies import shards_parameters
from embedtune.errors import InputError, require_not_negative, require_positive
from embedtune.evaluation.intervals import Interval, PerQuery
from embedtune.evaluation.sharded import Evaluation
from embedtune.losses.contract import Loss, require_parts
from embedtune.losses.inputs import Embeddings
from embedtune.losses.matryoshka import unwrapped
from embedtune.losses.scope import Shares, in_scope
from embedtune.models import freed_memory
from embedtune.models.encoder import Encoder
from embedtune.models.projection import ProjectionInit, parse_dims
from embedtune.models.spec import EncoderSpec, Features, PoolingMode
from embedtune.models.trial import prepare_training
from embedtune.training.accumulation import (
    StepMeans,
    accumulated_in,
    batches_of_step,
    loss_factor,
)
from embedtune.training.before_fit import (
    average_all,
    compare_directions,
    has_other_weights,
    refuse_another_base,
    refuse_long_interval,
    refuse_long_prompts,
    refuse_what_fails_later,
    tell_of_few_steps,
)
from embedtune.training.choose_loss import at_widths, refuse_no_loss, refuse_other_format
from embedtune.training.facts import told_by_all, training_facts
from embedtune.training.fit_settings import FitSettings
from embedtune.training.going_on import Validation, go_on, tell_of_another_base
from embedtune.training.gradient_cache import GradientCache
from embedtune.training.loss_inputs import target_of
from embedtune.training.optimizer import (
    Schedule,
    build_optimizer,
    count_steps,
    plan_rates,
    refuse_schedule,
)
from embedtune.training.precision import autocast_dtype
from embedtune.training.settled_loss import SettledLoss
from embedtune.training.start_projection import start_projection
from embedtune.training.temperature import set_temperatures, temperatures_of


class EmbeddingModule(pl.LightningModule):
    """Fine-tune a text-embedding model with one loss on one format of data.

    What depends on the data (the default loss, the width of a distillation) is settled in
    :meth:`setup`, when the data module knows its format.
    """

    def __init__(
        self,
        model_name_or_path: str,
        pooling: PoolingMode | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        dropout: float | None = None,
        attention_dropout: float | None = None,
        grad_cache: bool = False,
        compile: bool = False,
        loss: Loss | None = None,
        temperature: float | None = None,
        use_mrl: bool = False,
        mrl_dims: list[int] | str = "128,256,512,768,1024,1280,1536,1792",
        projection_init: ProjectionInit | None = None,
        lr: float | None = None,
        weight_decay: float = 0.01,
        warmup_proportion: float = 0.1,
        lr_schedule: Schedule = "cosine",
    ) -> None:
        """Load the encoder.

        Args:
            model_name_or_path: Hub name or folder of a sentence-transformers model or a bare
                transformers checkpoint.
            pooling: Pooling over tokens, by sentence-transformers' names; the default is the
                model's own.
            trust_remote_code: Run code that the model brings along.
            attn_implementation: How attention is computed, by transformers' names, such as
                ``sdpa`` or ``flash_attention_2``; the default is attention without
                padding where the model allows it, else ``sdpa``.
            dropout: Share that every dropout of the model drops; the default is the model's own.
            attention_dropout: The same for attention probabilities alone; 0 leaves the faster
                fused attention usable.
            grad_cache: Keep one chunk's activations at a time and compute the others again in
                backward: any batch size in the memory of one chunk, for about 1.3 times the time.
            compile: Compile the model's layers for training: half a minute before the first step
                for a GPU's later ones (docs/benchmarks.md).
            loss: A loss by ``class_path`` and ``init_args``; the default is InfoNCE (pair,
                triplet), ListwiseKL (scored) or Distillation (distill).
            temperature: Temperature of the default loss, where it has one; the default follows from
                how alike texts are to the base model (:mod:`~embedtune.training.temperature`).
            use_mrl: Train every width of ``mrl_dims`` (Matryoshka representation learning).
            mrl_dims: Widths, as a list or as numbers with commas between; widths above the
                encoder's own widen its projection.
            projection_init: How the projection starts; the default is ``pca``, and for distillation
                of at least four texts for each coordinate of the encoder ``teacher``. none adds no
                projection, and MRL cuts the encoder's own embedding.
            lr: Peak learning rate of AdamW; the default is 2e-5 for layers of width 768, falls as
                layers are wider, is 2e-3 without a transformer, and 5 times that for distillation.
            weight_decay: Decay of AdamW; biases and norm layers are not decayed.
            warmup_proportion: Share of the optimiser steps in which the rate rises.
            lr_schedule: Course of the learning rate after the warm-up.

        Raises:
            InputError: A value is out of its range, or the model cannot be loaded.
        """
        super().__init__()
        self.use_mrl, self.mrl_dims = use_mrl, parse_dims(mrl_dims)
        self.projection_init, self.temperature = projection_init, temperature
        self.lr = lr if lr is None else require_positive("model.lr", lr)
        self.derives_lr = lr is None
        self.weight_decay = require_not_negative("model.weight_decay", weight_decay)
        refuse_schedule(lr_schedule, warmup_proportion)
        self.warmup_proportion, self.lr_schedule = warmup_proportion, lr_schedule
        if temperature is not None:
            require_positive("model.temperature", temperature)
        if loss is not None and temperature is not None:
            raise InputError(
                "model.temperature: is that of the default loss; give it as "
                "model.loss.init_args.temperature beside model.loss"
            )
        refuse_no_loss(loss)
        # From the start: a checkpoint names the weights of a loss as a fit does.
        self.loss = at_widths(loss, self.mrl_dims) if loss is not None and use_mrl else loss
        self._settled, self._has_started_projection = SettledLoss(), False
        self._settings: FitSettings | None = None
        self.evaluation = Evaluation()
        self.base_metrics: dict[str, float] = {}
        self.base_per_query: dict[str, PerQuery] = {}
        self.changed_sets: list[str] = []  # since the checkpoint that a fit goes on from
        self._measured = Validation(-1, {}, {})
        self._start, self._place, self._step_means = Place(), Place(), StepMeans()
        self.compiles, self.grad_cache, self._cache = compile, grad_cache, GradientCache()
        spec = EncoderSpec(
            str(model_name_or_path),  # which Python may have as a Path
            pooling,
            trust_remote_code,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
        self.encoder = Encoder(spec, attn_implementation)
        self.own_longest_inputs = self.encoder.longest_inputs
        self.num_parameters = self.encoder.num_parameters
        self.is_base = True  # as long as no step and no checkpoint has changed its weights

    # --- What depends on the data -------------------------------------------------------

    @property
    def loss_formats(self) -> frozenset[Format] | None:
        """Formats of data that the loss takes, None as long as it is to be chosen for the data."""
        inner = unwrapped(self.loss)
        return None if inner is None else inner.formats

    @property
    def data(self) -> Any:
        """The :class:`~embedtune.data.datamodule.EmbeddingDataModule` of the running Trainer."""
        return cast(Any, self.trainer).datamodule

    def setup(self, stage: str) -> None:
        """Settle the loss and the projection for the data's format."""
        refuse_what_fails_later(self.trainer, self)
        strategy: Any = self.trainer.strategy
        device = strategy.root_device
        if stage == "fit":
            self._start = self._place = Place()  # not those of a fit before
            self._measured, self.changed_sets = Validation(-1, {}, {}), []
            batches = self.data.batches_per_epoch
            refuse_long_interval(self.trainer, batches)
            count_steps(self.trainer, batches, self.lr_schedule)  # refuses what has no end
            prepare_training(self.encoder)
            if self.is_base:
                refuse_another_base(self.encoder, device)
        self.encoder.pack(device, autocast_dtype(str(self.trainer.precision)))
        if stage == "fit" and device.type == "cpu":
            freed_memory.keep_freed()
        self._set_prompts()
        if stage == "predict":
            refuse_long_prompts(self.encoder, self.data, "predict")
            return
        if self.data.format is not None:
            refuse_other_format(self.loss, self.data.format)
        mrl_dims = self.mrl_dims if self.use_mrl else None
        if stage == "fit":
            if not self._has_started_projection:
                start_projection(
                    self.encoder,
                    *(self.projection_init, mrl_dims, self.data, device, strategy.broadcast),
                )
                self._has_started_projection = True
            self.encoder.raise_max_seq_length(self.data.longest_text(self.encoder))
            compare_directions(self.encoder)
            refuse_long_prompts(self.encoder, self.data)
            self.num_parameters = self.encoder.num_parameters
        if self.data.format is not None:
            self._settled.settle(self, is_fit=stage == "fit")
        average_all(self.trainer, self, stage)

    def teardown(self, stage: str) -> None:
        """Forget what was chosen to evaluate alone."""
        self._settled.forget(self)

    def _set_prompts(self) -> None:
        """Make the prompts of the data the model's own: the base was measured with its own."""
        for role, prompt in self.data.prompts.items():
            if prompt is not None:
                self.encoder.set_prompt(role, prompt)

    # --- Steps --------------------------------------------------------------------------

    def forward(self, chunks: list[Features]) -> Tensor:
        """Encode chunks of texts; float32 ``[n, d]``, not normalised.

        With ``grad_cache`` in the memory of one chunk (:class:`GradientCache`).
        """
        if self.grad_cache:
            return self._cache.encode(self.encoder, chunks)
        return torch.cat([self.encoder(features) for features in chunks])

    def _encode_in_step(self, chunks: list[Features], by_rank: Sequence[int]) -> Tensor:
        """Encode this rank's chunks, of which each rank has so many."""
        if shards_parameters(self.trainer.strategy):
            # Every forward gathers parameters, hence all ranks must run as many: the last chunk
            # once more, and nobody looks at the result.
            chunks = chunks + chunks[-1:] * (max(by_rank) - len(chunks))
        return self(chunks)

    def embeddings(self, batch: Batch, shares: Shares) -> Embeddings:
        """Encode this rank's share and sort the embeddings by their part in the loss."""
        encoded = self._encode_in_step(batch.chunks, shares.chunks)
        return Embeddings(
            query=encoded[batch.query],
            positive=encoded[batch.positive] if len(batch.positive) else None,
            negative=encoded[batch.negative] if len(batch.negative) else None,
        )

    def _compute_loss(self, batch: Batch) -> tuple[Embeddings, dict[str, Tensor], float]:
        """Return this rank's embeddings, the loss and its parts, and the weight of this rank."""
        assert self.loss is not None
        shares = Shares.exchange(batch.counts, self.device)
        own = self.embeddings(batch, shares)
        embeddings, target = in_scope(self.loss.scope, own, target_of(batch), shares)
        # Similarities divided by a temperature of 0.02 need all of float32's digits.
        with torch.autocast(self.device.type, enabled=False):
            parts = require_parts(self.loss, self.loss(embeddings, target))
        return own, parts, 1.0 if self.loss.scope == "global" else shares.weight

    def on_fit_start(self) -> None:
        """Switch dropout on: models come out of ``from_pretrained`` in eval mode."""
        self.train()
        if self.compiles:
            self.encoder.compile_layers()
        refuse_other_ranks(told_by_all(self.trainer, self), self.device)
        if self._settings is not None:
            self._settings.keep(self.trainer, cast(float, self.lr))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember where in the data this batch is: what is saved is saved after it."""
        self._place = self._place._replace(epoch=self.trainer.current_epoch, batch=batch_idx + 1)

    @property
    def place(self) -> Place:
        """Where the fit is in its data: of batches being accumulated, where the first one starts.

        No checkpoint holds their gradients, so that a run that goes on trains on them once more.
        """
        start, batch = self.data.start, self._place.batch
        if batch != start.batches:
            batch -= batch % self.trainer.accumulate_grad_batches
        return start._replace(epoch=self._place.epoch, batch=batch, step=self.trainer.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss, weighted so that a step's is the mean over all its queries.

        Those of all ranks, and of all accumulated batches.
        """
        # Dropout depends on the step alone: nothing to restore when a run resumes.
        step = self.trainer.current_epoch, batch_idx
        torch.manual_seed(step_seed(self.data.seed, *step, self.global_rank))
        _, parts, weight = self._compute_loss(batch)
        total = exchange.sum_over_ranks(self._stack(parts) * weight)
        means = dict(zip(parts, total / self.trainer.world_size, strict=True))
        order, accumulated = self.data.sampler("train"), self.trainer.accumulate_grad_batches
        of_step = batches_of_step(batch_idx, accumulated, self.data.batches_per_epoch)
        queries, is_first = order.examples_in(batch_idx), batch_idx == of_step.start
        for name, value in self._step_means.add(means, queries, is_first=is_first).items():
            self.log(f"train/{name}", value, batch_size=1)
        # Numbers would be copied to a GPU, which waits for it; a tensor stays where it is.
        rate = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("train/lr", rate, batch_size=1)
        weight *= loss_factor(batch_idx, of_step, accumulated, order)
        return parts["loss"] if weight == 1 else parts["loss"] * weight

    # --- Evaluation ---------------------------------------------------------------------

    @property
    def widths(self) -> list[int]:
        """Matryoshka widths, which are measured beside the full width."""
        return list(self.mrl_dims) if self.use_mrl else []

    @property
    def metrics(self) -> dict[str, float]:
        """What the last validation logged, if the weights are still those."""
        is_of_step = self._measured.step == self.trainer.global_step
        return self._measured.metrics if is_of_step and not has_other_weights(self.trainer) else {}

    @property
    def last_measured(self) -> Validation:
        """What was last measured, whatever was trained since; no metrics: nothing is known."""
        return self._measured

    @property
    def intervals(self) -> dict[str, Interval]:
        """In which interval each of these metrics lies above the base model's, where known."""
        return self._measured.intervals if self.metrics else {}

    def on_validation_start(self) -> None:
        """Check the widths, which a checkpoint may have brought."""
        widest = max(self.mrl_dims)
        if self.use_mrl and widest > self.encoder.width:
            raise InputError(
                f"model.mrl_dims: expected widths up to the model's {self.encoder.width}, "
                f"found {widest}"
            )
        self._settled.tell(self)
        self.evaluation.restart()

    on_test_start = on_validation_start

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the means of a loss, or to the texts of a test set."""
        self._evaluation_step(self.data.evaluated("val")[dataloader_idx], batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do the same for the sets of ``data.test_path``."""
        self._evaluation_step(self.data.evaluated("test")[dataloader_idx], batch)

    def _evaluation_step(self, name: str, batch: Batch | TextBatch) -> None:
        if isinstance(batch, TextBatch):
            counts = exchange.gather_counts([len(batch.chunks)], self.device)
            encoded = self._encode_in_step(batch.chunks, [chunks for (chunks,) in counts])
            embedded = self.encoder.as_exported(encoded)
            self.evaluation.add_texts(name, self.data.testsets[name], batch, embedded)
        else:
            _, parts, _ = self._compute_loss(batch)
            self.evaluation.add_loss(name, list(parts), self._stack(parts), batch.counts[0])

    def _stack(self, parts: dict[str, Any]) -> Tensor:
        """Return scalars of any type, float32 ``[n]``, without gradient."""
        values = [torch.as_tensor(value, device=self.device) for value in parts.values()]
        return torch.stack([value.detach().float() for value in values])

    def on_validation_epoch_end(self) -> None:
        """Log the means over all queries of all ranks, and the metrics of the test sets."""
        if self.trainer.sanity_checking:
            return
        compared_by = self.encoder.compared_by
        metrics = self.evaluation.collect(self.widths, self.device, compared_by)
        intervals = self.evaluation.intervals(self.base_per_query)
        self._measured = Validation(self.trainer.global_step, metrics, intervals)
        is_fit = self.trainer.state.fn == TrainerFn.FITTING
        for name, value in metrics.items():
            is_shown = name.endswith("/loss")
            self.log(name, value, prog_bar=is_shown, logger=not is_fit, batch_size=1)
        if is_fit:
            self._log_after_step(metrics)

    def _log_after_step(self, metrics: dict[str, float]) -> None:
        """Log at the last step that was done, counted from 0 as Lightning counts.

        Its own count is that of the next step where no step has just ended: in the middle of
        accumulated batches, and before the first step of a run that goes on.
        """
        for logger in self.trainer.loggers:
            row = {**metrics, "epoch": self.trainer.current_epoch}
            logger.log_metrics(row, step=self.trainer.global_step - 1)
            logger.save()

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the embeddings of the queries as the exported model gives them, ``[b, d]``."""
        query = self.embeddings(batch, Shares.exchange(batch.counts, self.device)).query
        return self.encoder.as_exported(query)

    # --- Optimisation -------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run, those before a checkpoint included."""
        batches = self.data.batches_per_epoch
        return count_steps(self.trainer, batches, self.lr_schedule, self._start)

    def configure_optimizers(self) -> Any:
        """Return AdamW and a schedule that moves every step."""
        assert self.lr is not None, "settled with the loss"
        optimizer = build_optimizer(self, self.lr, self.weight_decay)
        schedule = LambdaLR(optimizer, self._plan_rates())
        for group in optimizer.param_groups:
            # A subclass may leave the schedule, whose first rate is 0; it is set in on_train_start.
            group["lr"] = group["initial_lr"]
        self._settings = FitSettings(schedule, self.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _plan_rates(self) -> Callable[[int], float]:
        return plan_rates(self.lr_schedule, self.num_steps, self.warmup_proportion)

    def on_train_start(self) -> None:
        """Let the configuration win over the rates and the decay that a checkpoint remembers."""
        self.is_base = False
        if self.trainer.max_steps < 0:
            tell_of_few_steps(self.num_steps)  # which a checkpoint may have changed
        if not self._place.batch:
            start_epoch(self.trainer)
        # In the middle of an epoch no callback sets it, and before this hook it refuses another.
        accumulated = accumulated_in(self.trainer, self._place.epoch)
        self.trainer.accumulate_grad_batches = accumulated
        if self._settings is not None:  # not a subclass's own
            self._settings.restore(self.trainer, cast(float, self.lr), self._plan_rates())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the structure that the checkpoint's weights fit."""
        self.encoder.match(EncoderSpec(**checkpoint["encoder_spec"]))
        self.is_base = False
        is_strict = self._trainer is not None and self.strict_loading
        if is_strict and "state_dict" in checkpoint:  # shards are not here
            refuse_other_weights(checkpoint["state_dict"], self.state_dict())
        self._settled.brought = checkpoint.get("temperatures", {})  # the loss may come later
        set_temperatures(self.loss, self._settled.brought, self._settled.derived)
        if self._trainer is not None and self.trainer.training:
            before = go_on(checkpoint, self.trainer, self.data)
            self._start = self._place = before.place
            self._measured, self.changed_sets = before.measured, before.changed_sets
            self.base_metrics = {**before.base_losses, **self.base_metrics}
            base = self._kept_spec().model_name_or_path
            tell_of_another_base(checkpoint["encoder_spec"], base)

    def _kept_spec(self) -> EncoderSpec:
        return self.encoder.spec.kept_in(Path(self.trainer.default_root_dir))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep beside the weights what rebuilds the encoder, and what its model card tells."""
        checkpoint["encoder_spec"] = self._kept_spec()._asdict()
        checkpoint["evaluated"] = self.data.digests("val")
        checkpoint["place"] = self.place._asdict()
        checkpoint["temperatures"] = temperatures_of(self.loss)
        checkpoint["training_facts"] = training_facts(self.trainer, self)._asdict()
