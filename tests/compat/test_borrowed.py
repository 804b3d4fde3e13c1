"""What the package leans on and does not own: private and undocumented names of its dependencies.

docs/architecture.md lists them. Each has a test here that fails by its name when a release changes
it, so that an upgrade says at once what has to be looked at.
"""

import importlib.util
import inspect
import re
import zipfile
import zlib
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import datasets
import lightning.pytorch as pl
import pyarrow as pa
import pytest
import torch
import torch.distributed.checkpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from embedtune.checkpoints.resume import OFTEN

DOCS = Path(__file__).parents[2] / "docs" / "architecture.md"
BORROWED: dict[str, Callable[[Path, Path], None]] = {}


def borrows(name: str) -> Callable[[Callable[[Path, Path], None]], Callable[[Path, Path], None]]:
    """Register a check under the name that the documentation lists."""

    def register(check: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        assert name not in BORROWED
        BORROWED[name] = check
        return check

    return register


def takes(function: Callable, *names: str) -> bool:
    """Tell whether a function has parameters of these names."""
    return set(names) <= set(inspect.signature(function).parameters)


def has_default(module: str, attribute: str, value: object) -> bool:
    return getattr(import_module(module), attribute) == value


def source_of(thing: object) -> str:
    return inspect.getsource(thing)


@pytest.mark.parametrize("name", BORROWED)
def test_a_borrowed_name_is_what_it_was(name, tmp_path, tiny_bert):
    if name.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    BORROWED[name](tmp_path, tiny_bert)


def test_the_documentation_lists_each():
    table = DOCS.read_text(encoding="utf-8").partition("## What is borrowed")[2]
    listed = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(BORROWED)


# --- torch ----------------------------------------------------------------------------------------


@borrows("torch: save writes zip files with a CRC32 of each part, also within .distcp")
def _(folder, model):
    tensor = torch.arange(100.0)
    torch.save(tensor, folder / "a.pt")
    torch.distributed.checkpoint.save({"a": tensor}, checkpoint_id=folder / "shards")
    for path in (folder / "a.pt", folder / "shards" / "__0_0.distcp"):
        with zipfile.ZipFile(path) as parts:
            (part,) = (p for p in parts.infolist() if p.filename.endswith("/data/0"))
            assert zlib.crc32(tensor.numpy().tobytes()) == part.CRC


@borrows("torch: AdamW._step_supports_amp_scaling")
def _(folder, model):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
    assert optimizer._step_supports_amp_scaling is True
    scaler = import_module("torch.amp.grad_scaler").GradScaler
    assert "_step_supports_amp_scaling" in source_of(scaler.step)


@borrows("torch: AdamW.found_inf")
def _(folder, model):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for is_bad in (False, True, False):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), float("nan") if is_bad else 1.0)
        optimizer.found_inf = torch.tensor(float(is_bad))
        optimizer.step()
        assert torch.equal(before, weight) == is_bad
    assert optimizer.state[weight]["step"] == 2
    assert weight.isfinite().all()


@borrows("torch: ops.aten._flash_attention_forward, _efficient_attention_forward")
def _(folder, model):
    flash = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in flash.arguments]
    assert names[:5] == ["query", "key", "value", "cum_seq_q", "cum_seq_k"]
    assert names[5:10] == ["max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names[10:])
    efficient = torch.ops.aten._efficient_attention_forward.default._schema
    names = [argument.name for argument in efficient.arguments]
    assert names[:6] == ["query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k"]
    assert names[6:10] == ["max_seqlen_q", "max_seqlen_k", "dropout_p", "custom_mask_type"]
    assert {"compute_log_sumexp", "scale"} <= set(names[10:])


@borrows("torch: LambdaLR.base_lrs, lr_lambdas, _last_lr")
def _(folder, model):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.base_lrs == [2.0]
    assert schedule.lr_lambdas[0](schedule.last_epoch) == 0.5
    schedule._last_lr = [3.0]
    assert schedule.get_last_lr() == [3.0]


@borrows("torch: Node.next_functions, AccumulateGrad.variable")
def _(folder, model):
    weight = torch.ones(2, requires_grad=True)
    ((parent, _), *_) = (2 * weight).grad_fn.next_functions
    assert parent.variable is weight


@borrows("torch: _softmax_backward_data")
def _(folder, model):
    scores = torch.randn(2, 3, requires_grad=True)
    probabilities = scores.softmax(-1)
    gradient = torch.randn(2, 3)
    probabilities.backward(gradient)
    found = gradient.clone()
    torch._softmax_backward_data(found, probabilities.detach(), -1, torch.float32, grad_input=found)
    torch.testing.assert_close(found, scores.grad)


@borrows("torch: distributed.checkpoint.FileSystemReader.read_metadata")
def _(folder, model):
    dcp = import_module("torch.distributed.checkpoint")
    dcp.save({"model.a": torch.ones(2, 3)}, checkpoint_id=folder, no_dist=True)
    assert (folder / ".metadata").is_file()
    (facts,) = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    assert isinstance(facts, dcp.metadata.TensorStorageMetadata)
    assert (facts.size, facts.properties.dtype) == ((2, 3), torch.float32)


@borrows("torch: distributed.checkpoint pickles the classes of .metadata")
def _(folder, model):
    saved = {"model.a": torch.ones(2, 3), "model.b": torch.ones(2).half(), "lr": 0.5}
    import_module("torch.distributed.checkpoint").save(saved, checkpoint_id=folder, no_dist=True)
    import_module("embedtune.checkpoints.pickles").refuse_code_in_fsdp(folder)


@borrows("torch: distributed.checkpoint.api.CheckpointException.failures")
def _(folder, model):
    kind = import_module("torch.distributed.checkpoint.api").CheckpointException
    assert not issubclass(kind, Exception), "it has to be caught by its own name"
    error = kind("failed", {0: (ValueError("why"), None)})
    assert str(next(iter(error.failures.values()))[0]) == "why"


@borrows("torch: distributed.fsdp.sharded_grad_scaler.ShardedGradScaler")
def _(folder, model):
    module = import_module("torch.distributed.fsdp.sharded_grad_scaler")
    assert takes(module.ShardedGradScaler, "device")


# --- lightning ------------------------------------------------------------------------------------


def strategy(name: str) -> type:
    return getattr(import_module("lightning.pytorch.strategies"), name)


@borrows("lightning: FSDPStrategy._setup_model")
def _(folder, model):
    assert takes(strategy("FSDPStrategy")._setup_model, "model")
    source = source_of(strategy("FSDPStrategy")._setup_model)
    assert "isinstance(mod, FullyShardedDataParallel)" in source, "a wrapped model is left alone"


@borrows("lightning: FSDPStrategy._determine_device_ids")
def _(folder, model):
    assert "_determine_device_ids" in source_of(strategy("FSDPStrategy").barrier)


@borrows("lightning: FSDPStrategy.kwargs, mixed_precision_config, cpu_offload, sharding_strategy")
def _(folder, model):
    made = strategy("FSDPStrategy")(auto_wrap_policy={torch.nn.Linear})
    assert "auto_wrap_policy" in made.kwargs
    assert isinstance(inspect.getattr_static(type(made), "mixed_precision_config"), property)
    assert made.cpu_offload.offload_params is False
    assert made.sharding_strategy.name == "FULL_SHARD"


@borrows("lightning: FSDPPrecision.scaler, convert_input, mixed_precision_config")
def _(folder, model):
    kind = import_module("lightning.pytorch.plugins.precision").FSDPPrecision
    assert kind("32-true").scaler is None
    assert takes(kind.convert_input, "data")
    assert isinstance(inspect.getattr_static(kind, "mixed_precision_config"), property)


@borrows("lightning: Strategy._precision_plugin")
def _(folder, model):
    made = strategy("SingleDeviceStrategy")()
    plugin = object()
    made._precision_plugin = plugin
    assert made.precision_plugin is plugin


@borrows("lightning: DeepSpeedStrategy.config, deepspeed_engine, zero_stage_3")
def _(folder, model):
    kind = strategy("DeepSpeedStrategy")
    for name in ("deepspeed_engine", "zero_stage_3"):
        assert isinstance(inspect.getattr_static(kind, name), property), name
    assert "self.config" in source_of(kind.__init__)


@borrows("lightning: DeepSpeedStrategy.setup_environment checks for CUDA")
def _(folder, model):
    kind = strategy("DeepSpeedStrategy")
    assert "CUDAAccelerator" in source_of(kind.setup_environment)
    assert "super().setup_environment()" in source_of(kind.setup_environment)


@borrows("lightning: Strategy.handles_gradient_accumulation, block_backward_sync")
def _(folder, model):
    kind = strategy("DeepSpeedStrategy")
    assert isinstance(inspect.getattr_static(kind, "handles_gradient_accumulation"), property)
    loop = import_module("lightning.pytorch.loops.optimization.automatic")
    assert "handles_gradient_accumulation" in source_of(loop)
    shared = import_module("lightning.pytorch.loops.utilities")
    assert "strategy.block_backward_sync()" in source_of(shared)


@borrows("lightning: fit_loop._should_accumulate")
def _(folder, model):
    trainer = run(folder, accumulate_grad_batches=2)
    assert trainer.fit_loop._should_accumulate() in (True, False)


@borrows("lightning: _accelerator_connector.cluster_environment, SLURMEnvironment.auto_requeue")
def _(folder, model):
    trainer = run(folder)
    assert hasattr(trainer._accelerator_connector, "cluster_environment")
    assert takes(
        import_module("lightning.pytorch.plugins.environments").SLURMEnvironment, "auto_requeue"
    )
    connector = import_module("lightning.pytorch.trainer.connectors.signal_connector")
    assert "environment.auto_requeue" in source_of(connector)


@borrows("lightning: StrategyRegistry.available_strategies")
def _(folder, model):
    registry = import_module("lightning.pytorch.strategies").StrategyRegistry
    assert {"ddp", "fsdp", "deepspeed_stage_3"} <= set(registry.available_strategies())


@borrows("lightning: _MultiProcessingLauncher")
def _(folder, model):
    for name, is_copy in (("ddp_fork", True), ("ddp_spawn", True), ("ddp", False)):
        launcher = pl.Trainer(accelerator="cpu", devices=2, strategy=name).strategy.launcher
        assert isinstance(launcher, _MultiProcessingLauncher) == is_copy


@borrows("lightning: the FSDP folder's meta.pt")
def _(folder, model):
    assert has_default("lightning.fabric.utilities.load", "_METADATA_FILENAME", "meta.pt")


def run(folder: Path, **settings: object) -> pl.Trainer:
    """Train three batches of Lightning's own small model."""
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        limit_train_batches=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "limit_val_batches": 0, **settings},
    )
    trainer.fit(BoringModel())
    return trainer


@borrows("lightning: fit_loop.epoch_loop.batch_progress, epoch_progress")
def _(folder, model):
    loop = run(folder, max_epochs=2).fit_loop
    assert loop.epoch_loop.batch_progress.current.ready == 3
    assert loop.epoch_progress.current.ready == 2


@borrows("lightning: checkpoint['loops']['fit_loop']")
def _(folder, model):
    trainer = run(folder, max_epochs=2)
    trainer.save_checkpoint(folder / "a.ckpt")
    loops = torch.load(folder / "a.ckpt", weights_only=True)["loops"]["fit_loop"]
    for progress in loops["epoch_progress"].values():
        assert {"ready", "processed", "completed"} <= set(progress)
    assert loops["epoch_loop.batch_progress"]["current"]["ready"] == 3


@borrows("lightning: checkpoint['callbacks']['ModelCheckpoint..']")
def _(folder, model):
    keeper = pl.callbacks.ModelCheckpoint(folder, monitor="step", save_last=True)
    trainer = run(folder, callbacks=[keeper])
    trainer.save_checkpoint(folder / "a.ckpt")
    states = torch.load(folder / "a.ckpt", weights_only=True)["callbacks"]
    (state,) = (s for name, s in states.items() if name.startswith("ModelCheckpoint"))
    assert {"monitor", "best_model_path"} <= set(state)


@borrows("lightning: Trainer.ckpt_path set; ModelCheckpoint keeps what a fit went on from")
def _(folder, model):
    run(folder, callbacks=[pl.callbacks.ModelCheckpoint(folder, filename="first")])
    first = folder / "first.ckpt"

    class GoesOnFrom(pl.Callback):
        def __init__(self, path):
            self.path = path

        def on_train_start(self, trainer, pl_module):
            trainer.ckpt_path = self.path

    for name, stays in (("first", True), ("last", False)):
        keeper = pl.callbacks.ModelCheckpoint(folder, filename="later")
        keeper.best_model_path = str(first)
        run(folder, callbacks=[keeper, GoesOnFrom(str(folder / f"{name}.ckpt"))])
        assert first.exists() == stays


@borrows("lightning: ModelCheckpoint._last_global_step_saved, state_key")
def _(folder, model):
    keeper = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1)
    keeper._last_global_step_saved = 1  # which is not saved again
    run(folder, callbacks=[keeper], max_steps=2)
    assert [path.name for path in folder.glob("*.ckpt")] == ["epoch=0-step=2.ckpt"]
    rarer = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=2)
    keys = [callback.state_key.partition(OFTEN)[0] for callback in (keeper, rarer)]
    assert keys == ["ModelCheckpoint{'monitor': None, 'mode': 'min'"] * 2


@borrows("lightning: ModelCheckpoint.on_train_batch_end comes last, and saves a step once")
def _(folder, model):
    class SavesBefore(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            keeper = trainer.callbacks[-1]
            assert trainer.checkpoint_callbacks == [keeper]
            assert not list(folder.glob(f"*-step={trainer.global_step}.ckpt"))
            keeper.on_train_batch_end(trainer, pl_module, *args)
            saved.append(*folder.glob(f"*-step={trainer.global_step}.ckpt"))
            saved[-1].unlink()

    saved: list[Path] = []
    keeper = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1)
    run(folder, callbacks=[keeper, SavesBefore()])
    assert len(saved) == 3
    assert not list(folder.glob("*.ckpt"))


@borrows("lightning: val_loop.run before the first step; val_check_batch, _val_check_time_interval")
def _(folder, model):
    ended: list[tuple[int, int]] = []

    class Measured(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert trainer._val_check_time_interval is None
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

        def on_validation_end(self, trainer, pl_module):
            ended.append((trainer.global_step, trainer.val_check_batch))

    run(folder, callbacks=[Measured()], limit_val_batches=1, num_sanity_val_steps=0)
    assert ended == [(0, 3), (3, 3)]


@borrows("lightning: callbacks.EarlyStopping.load_state_dict, wait_count, patience; should_stop")
def _(folder, model):
    stopping = pl.callbacks.EarlyStopping("x", patience=4)
    stopping.load_state_dict({**stopping.state_dict(), "wait_count": 2, "patience": 3})
    assert (stopping.wait_count, stopping.patience) == (2, 3)

    class Ended(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.should_stop = True

    assert run(folder, callbacks=[Ended()]).global_step == 0


@borrows("lightning: Trainer.callbacks, the order of its hooks")
def _(folder, model):
    order: list[str] = []

    class First(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            order.append("first")

    class Second(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            order.append("second")

    run(folder, callbacks=[Second(), First()])
    assert order == ["second", "first"]


@borrows("lightning: Trainer.lr_scheduler_configs")
def _(folder, model):
    (config,) = run(folder).lr_scheduler_configs
    assert isinstance(config.scheduler, torch.optim.lr_scheduler.LRScheduler)


@borrows("lightning: Precision.val_step_context")
def _(folder, model):
    trainer = run(folder, precision="bf16-mixed")
    with trainer.precision_plugin.val_step_context():
        assert torch.is_autocast_enabled("cpu")


@borrows("lightning: rank_zero_only.rank")
def _(folder, model):
    assert import_module("lightning.pytorch.utilities").rank_zero_only.rank == 0


@borrows("lightning: what the observer of launched ranks logs, launcher.procs")
def _(folder, model):
    from embedtune.cli import lost_ranks

    module = import_module(lost_ranks.OBSERVER)
    launcher = module._SubprocessScriptLauncher(None, 1, 1)
    assert launcher.procs == []
    observer = source_of(module._ChildProcessObserver)
    assert (
        'f"Child process with PID {proc.pid} terminated with code {proc.returncode}."' in observer
    )
    assert "_logger.info(message)" in observer
    said = "[rank: 2] Child process with PID 7 terminated with code -9. Forcefully"
    assert lost_ranks.DIED.search(said).groups() == ("2", "-9")


@borrows("lightning: DDPStrategy._timeout, FSDPStrategy._timeout, DeepSpeedStrategy._timeout")
def _(folder, model):
    from embedtune.distributed.strategies import named_strategy, set_timeout

    for strategy in (pl.strategies.DDPStrategy(), named_strategy("fsdp"), named_strategy("zero2")):
        set_timeout(strategy, 7)
        assert strategy._timeout.total_seconds() == 7


@borrows("torch: what gloo and torch.distributed raise of a lost rank")
def _(folder, model):
    from embedtune.distributed.exchange import is_rank_lost

    assert issubclass(torch.distributed.DistBackendError, torch.distributed.DistError)
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(milliseconds=50))
    with pytest.raises(torch.distributed.DistError) as caught:  # nobody sets it
        store.get("never")
    assert is_rank_lost(caught.value)
    assert not is_rank_lost(RuntimeError("size mismatch"))


@borrows("lightning: where the number of a rank is looked for")
def _(folder, model):
    from embedtune.cli.processes import RANK_VARIABLES

    source = source_of(import_module("lightning.fabric.utilities.rank_zero"))
    source += source_of(import_module("lightning_utilities.core.rank_zero"))
    assert f"rank_keys = {RANK_VARIABLES!r}".replace("'", '"') in source


@borrows("lightning: LightningCLI._parse_ckpt_path, _parser, callback_keys, config_init")
def _(folder, model):
    module = import_module("lightning.pytorch.cli")
    cli = source_of(module.LightningCLI)
    assert "self._parse_ckpt_path()" in cli
    assert "self._parser(self.subcommand).callback_keys" in cli
    assert "self.config_init = self.parser.instantiate_classes(self.config)" in cli


@borrows("lightning: loggers.logger.DummyExperiment")
def _a_logger_that_writes_nothing(tmp_path, tiny_bert):
    writes_nothing = import_module("lightning.pytorch.loggers.logger").DummyExperiment()
    assert writes_nothing.log_hparams({}) is None
    assert writes_nothing.save() is None


@borrows("lightning: SaveConfigCallback.save_config, parser, config")
def _(folder, model):
    kind = import_module("lightning.pytorch.cli").SaveConfigCallback
    assert takes(kind.save_config, "trainer", "pl_module", "stage")
    assert takes(kind, "parser", "config", "save_to_log_dir")


# --- jsonargparse ---------------------------------------------------------------------------------


@borrows("jsonargparse: ArgumentParser._actions, error")
def _(folder, model):
    parser = import_module("jsonargparse").ArgumentParser()
    parser.add_argument("--known.key", type=int)
    assert "known.key" in [action.dest for action in parser._actions]
    assert takes(parser.error, "message", "ex")


@borrows("jsonargparse: how it says that it does not know a key")
def _(folder, model):
    from embedtune.cli.parser import UNKNOWN_KEY

    jsonargparse = import_module("jsonargparse")
    parser, command = (jsonargparse.ArgumentParser(exit_on_error=False) for _ in range(2))
    command.add_argument("--group.known", type=int)
    command.add_argument("--config", action="config")
    parser.add_subcommands().add_subcommand("fit", command)
    (folder / "a.yaml").write_text("group:\n  unknown: 1\n")
    for argv, key in (
        (["fit", "--unknwon", "1"], "unknwon"),
        (["fit", "--config", str(folder / "a.yaml")], "group.unknown"),
    ):
        with pytest.raises(jsonargparse.ArgumentError) as caught:
            parser.parse_args(argv)
        assert UNKNOWN_KEY.search(str(caught.value))[1] == key


# --- transformers ---------------------------------------------------------------------------------


@borrows("transformers: integrations.sdpa_attention.sdpa_attention_forward")
def _(folder, model):
    module = import_module("transformers.integrations.sdpa_attention")
    names = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")
    assert takes(module.sdpa_attention_forward, *names)


@borrows("transformers: masking_utils.sdpa_mask")
def _(folder, model):
    interface = import_module("transformers").AttentionMaskInterface()
    assert interface["sdpa"] is import_module("transformers.masking_utils").sdpa_mask


def bert() -> torch.nn.Module:
    transformers = import_module("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertModel(
        transformers.BertConfig(vocab_size=9, intermediate_size=8, **sizes)
    )


@borrows("transformers: PreTrainedModel.set_attn_implementation, config._attn_implementation")
def _(folder, model):
    model = bert()
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@borrows("transformers: PreTrainedModel.is_backend_compatible")
def _(folder, model):
    assert bert().is_backend_compatible() is True


@borrows("transformers: PreTrainedModel._no_split_modules")
def _(folder, model):
    named = set(bert()._no_split_modules)
    assert named & {type(module).__name__ for module in bert().modules()}


@borrows("transformers: a mask of four dimensions is taken as it is")
def _(folder, model):
    masks = import_module("transformers.masking_utils")
    config = import_module("transformers").BertConfig(attn_implementation="sdpa")
    given, states = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 7, 32)
    for make in (masks.create_bidirectional_mask, masks.create_causal_mask):
        more = {"past_key_values": None} if make is masks.create_causal_mask else {}
        assert make(config, states, given, **more) is given


@borrows("transformers: cu_seq_lens_q and position_ids reach attention")
def _(folder, model):
    from embedtune.models.packing import PACKED_INPUTS

    flash = source_of(import_module("transformers.modeling_flash_attention_utils"))
    assert all(name in flash for name in PACKED_INPUTS)
    seen = {}

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.update(kwargs)
        return torch.zeros_like(query.transpose(1, 2)), None

    transformers = import_module("transformers")
    transformers.AttentionInterface.register("remembers", attention)
    transformers.AttentionMaskInterface.register("remembers", lambda *_, **__: None)
    model = bert()
    model.set_attn_implementation("remembers")
    ids = torch.ones(1, 5, dtype=torch.long)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    model(input_ids=ids, position_ids=torch.arange(5)[None], cu_seq_lens_q=starts)
    assert seen["cu_seq_lens_q"] is starts


@borrows("transformers: config.layer_types, sliding_window")
def _(folder, model):
    transformers = import_module("transformers")
    config = transformers.Qwen3Config(num_hidden_layers=2, use_sliding_window=True)
    assert set(config.layer_types) <= {"full_attention", "sliding_attention"}
    assert config.sliding_window


@borrows("transformers: embeddings.position_embeddings.padding_idx")
def _(folder, model):
    transformers = import_module("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(vocab_size=9, intermediate_size=8, **sizes)
    model = transformers.RobertaModel(config)
    assert model.embeddings.position_embeddings.padding_idx == config.pad_token_id
    assert bert().embeddings.position_embeddings.padding_idx is None


@borrows("transformers: config.rope_parameters")
def _(folder, model):
    from embedtune.models.packing import turning_point

    transformers = import_module("transformers")
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Phi3Config(
        **sizes,
        rope_parameters={**rope, "rope_theta": 1e4},
        original_max_position_embeddings=5,
        max_position_embeddings=9,
        sliding_window=None,
    )
    layer = torch.nn.Module()
    layer.config = config
    assert turning_point(layer) == 5


@borrows("transformers: PreTrainedModel._hf_peft_config_loaded, peft_config, _weight_conversions")
def _(folder, model):
    peft = pytest.importorskip("peft")
    inner = bert()
    assert inner._hf_peft_config_loaded is False
    inner.save_pretrained(folder / "base")
    config = peft.LoraConfig(target_modules=["query"])
    kind = type(inner)
    peft.get_peft_model(kind.from_pretrained(folder / "base"), config).save_pretrained(folder / "a")
    adapted = kind.from_pretrained(folder / "a")
    assert adapted._hf_peft_config_loaded is True
    assert [c.peft_type.value for c in adapted.peft_config.values()] == ["LORA"]
    assert adapted._weight_conversions


@borrows("peft: BaseTunerLayer.merge, get_base_layer, ModulesToSaveWrapper.modules_to_save")
def _(folder, model):
    pytest.importorskip("peft")
    layer = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    assert takes(layer.merge, "safe_merge")
    assert callable(layer.get_base_layer)
    wrapper = import_module("peft.utils").ModulesToSaveWrapper
    made = wrapper(torch.nn.Linear(2, 2), "default")
    assert isinstance(made.modules_to_save[made.active_adapters[0]], torch.nn.Linear)


@borrows("transformers: PreTrainedTokenizerFast.backend_tokenizer.to_str")
def _(folder, model):
    tokenizers = import_module("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    fast = import_module("transformers").PreTrainedTokenizerFast(tokenizer_object=backend)
    assert '"a":0' in fast.backend_tokenizer.to_str()


# --- sentence-transformers ------------------------------------------------------------------------


@borrows("sentence_transformers: base.modules, sentence_transformer.modules")
def _(folder, model):
    modules = import_module("sentence_transformers.base.modules")
    assert {"Dense", "Normalize", "Router", "Transformer"} <= set(dir(modules))
    assert hasattr(import_module("sentence_transformers.sentence_transformer.modules"), "Pooling")


@borrows("sentence_transformers: Transformer.can_flatten_inputs, model_forward_params, backend")
def _(folder, model):
    kind = import_module("sentence_transformers.base.modules").Transformer
    source = source_of(kind)
    assert "self.can_flatten_inputs" in source
    assert "self.model_forward_params" in source
    assert "self.backend" in source
    assert hasattr(kind, "auto_model") or "def auto_model" in source


def load(folder: Path) -> torch.nn.Module:
    return import_module("sentence_transformers").SentenceTransformer(str(folder), device="cpu")


@borrows("sentence_transformers: Router.sub_modules, route_mappings, default_route")
def _(folder, model):
    modules = import_module("sentence_transformers.base.modules")
    routes = {name: [modules.Dense(2, 2)] for name in ("small", "document")}
    mappings = {("query", None): "small"}
    router = modules.Router(routes, route_mappings=mappings, default_route="document")
    assert router.default_route == "document"
    assert set(router.sub_modules) == set(routes)
    assert router.route_mappings == {("query", None): "small"}


@borrows("sentence_transformers: Transformer.config_keys, do_lower_case")
def _(folder, model):
    transformer = load(model)[0]
    assert transformer.do_lower_case is False
    transformer.config_keys = [*transformer.config_keys, "do_lower_case"]
    assert transformer.get_config_dict()["do_lower_case"] is False


@borrows("sentence_transformers: WordEmbeddings.emb_layer, sentence_lengths, WordTokenizer.vocab")
def _(folder, model):
    modules = import_module("sentence_transformers.sentence_transformer.modules")
    tokenizers = import_module("sentence_transformers.sentence_transformer.modules.tokenizer")
    tokenizer = tokenizers.WhitespaceTokenizer(["", "a", "b"], set())
    words = modules.WordEmbeddings(tokenizer, torch.zeros(3, 2))
    assert isinstance(tokenizer, tokenizers.WordTokenizer)
    assert list(tokenizer.vocab) == ["", "a", "b"]
    features = words.preprocess(["a b", "b"])
    assert features["sentence_lengths"].tolist() == [2, 1]
    assert features["input_ids"].tolist() == [[1, 2], [2, 0]]
    assert words.emb_layer.padding_idx is None


@borrows("sentence_transformers: util.load_file_path")
def _(folder, model):
    load_file_path = import_module("sentence_transformers.util").load_file_path
    found = load_file_path(str(model), "modules.json", local_files_only=True)
    assert Path(found) == model / "modules.json"
    assert load_file_path(str(model), "nothing.json", local_files_only=True) is None


@borrows("sentence_transformers: SentenceTransformer.preprocess(max_length, task)")
def _(folder, model):
    features = load(model).preprocess(["a b c d"], prompt="e ", max_length=4, task="query")
    assert features["input_ids"].shape == (1, 4)
    assert features["attention_mask"].all()


@borrows("sentence_transformers: encode(processing_kwargs)")
def _(folder, model):
    loaded = load(model)
    cut = loaded.encode(["a b c d"], processing_kwargs={"text": {"max_length": 4}})
    assert abs(cut - loaded.encode(["a b"])).max() < 1e-6


@borrows("sentence_transformers: util.quantization.quantize_embeddings")
def _(folder, model):
    quantize = import_module("sentence_transformers.util.quantization").quantize_embeddings
    ranges = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).numpy()
    codes = quantize(torch.tensor([[0.0, 1.0]]), "int8", ranges=ranges)
    assert codes.tolist() == [[-128, 126]]  # 255 levels


# --- DeepSpeed ------------------------------------------------------------------------------------


@borrows("deepspeed: DeepSpeedEngine._config.load_universal_checkpoint")
def _(folder, model):
    engine = import_module("deepspeed.runtime.engine").DeepSpeedEngine
    assert "self._config.load_universal_checkpoint" in source_of(engine.load_universal_checkpoint)


@borrows("deepspeed: DeepSpeedEngine.set_gradient_accumulation_boundary, backward(scale_wrt_gas)")
def _(folder, model):
    engine = import_module("deepspeed.runtime.engine").DeepSpeedEngine
    assert takes(engine.set_gradient_accumulation_boundary, "is_boundary")
    assert "scale_wrt_gas" in source_of(import_module("deepspeed.runtime.engine"))


@borrows("deepspeed: zero_force_ds_cpu_optimizer")
def _(folder, model):
    config = import_module("deepspeed.runtime.config")
    assert "zero_force_ds_cpu_optimizer" in source_of(config)


@borrows("deepspeed: accelerator.cpu_accelerator.CPU_Accelerator, set_accelerator")
def _(folder, model):
    kind = import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator
    assert kind().device_name() == "cpu"
    assert callable(import_module("deepspeed.accelerator").set_accelerator)


@borrows("deepspeed: the names of the files of a ZeRO checkpoint")
def _(folder, model):
    engine = source_of(import_module("deepspeed.runtime.engine").DeepSpeedEngine)
    for name in ("_model_states.pt", "_optim_states.pt", '"zero_pp_rank_{}"', "'latest'"):
        assert name in engine.replace('"latest"', "'latest'"), name


@borrows("deepspeed: the classes in the files of a ZeRO checkpoint")
def _(folder, model):
    for name in import_module("embedtune.checkpoints.pickles").DEEPSPEED:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__module__ == module


@borrows("deepspeed: checkpoint.ds_to_universal")
def _(folder, model):
    module = import_module("deepspeed.checkpoint.ds_to_universal")
    source = source_of(module)
    for name in ("--input_folder", "--output_folder", "--inject_missing_state"):
        assert f"'{name}'" in source.replace('"', "'"), name
    assert "latest_universal" in source


@borrows("deepspeed: zero.GatheredParameters, ds_tensor")
def _(folder, model):
    zero = import_module("deepspeed").zero
    assert takes(zero.GatheredParameters, "params", "modifier_rank")


# --- datasets, huggingface_hub --------------------------------------------------------------------


@borrows("datasets: Dataset.from_file reads a stream of Arrow to its own end")
def _(folder, model):
    schema = pa.schema({"a": pa.int32()})
    with (folder / "t.arrow").open("wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array([1, 2], pa.int32())], schema=schema))
        file.write(b"what follows")
    assert datasets.Dataset.from_file(str(folder / "t.arrow"))["a"][:] == [1, 2]


@borrows("datasets: config.HF_DATASETS_CACHE, Dataset.data")
def _(folder, model):
    datasets = import_module("datasets")
    assert Path(datasets.config.HF_DATASETS_CACHE).name == "datasets"
    table = datasets.Dataset.from_dict({"a": [[1, 2], [3]]}).data
    (values, *_) = table.column("a")
    assert values.values.to_pylist() == [1, 2]


@borrows("huggingface_hub: repocard.metadata_load, utils.validate_repo_id")
def _(folder, model):
    (folder / "README.md").write_text("---\nlicense: mit\n---\ntext\n")
    load = import_module("huggingface_hub.repocard").metadata_load
    assert load(folder / "README.md") == {"license": "mit"}
    utilities = import_module("huggingface_hub.utils")
    with pytest.raises(utilities.HFValidationError):
        utilities.validate_repo_id("a/b/c")
