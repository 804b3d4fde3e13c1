"""What AdamW decays, and the course of the learning rate."""

import csv
import json
import logging
import re
from pathlib import Path

import pytest
from forks import Ranks, embedtune
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import MPNetConfig, MPNetModel

from embedtune import EmbeddingModule
from embedtune.cli import main
from embedtune.data.records import Format
from embedtune.models.encoder import Encoder
from embedtune.models.spec import EncoderSpec
from embedtune.training.optimizer import build_optimizer, plan_rates, usual_lr


def test_biases_and_norms_are_not_decayed(tiny_bert, tiny_qwen):
    for model in (tiny_bert, tiny_qwen):
        module = EmbeddingModule(str(model))
        optimizer = build_optimizer(module, lr=1e-3, weight_decay=0.1)
        decayed, undecayed = (
            {id(parameter) for parameter in group["params"]} for group in optimizer.param_groups
        )
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        assert decayed | undecayed == set(names)
        assert all(
            name.endswith("bias") or "norm" in name.lower() for name in map(names.get, undecayed)
        )
        assert not any(
            name.endswith("bias") or "norm" in name.lower() for name in map(names.get, decayed)
        )


def test_nor_are_biases_of_relative_positions():
    """Which are a layer's weight."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    model = MPNetModel(MPNetConfig(intermediate_size=32, **sizes))
    decayed, undecayed = build_optimizer(model, lr=1e-3, weight_decay=0.1).param_groups
    bias = model.encoder.relative_attention_bias.weight
    assert any(parameter is bias for parameter in undecayed["params"])
    assert not any(parameter is bias for parameter in decayed["params"])


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_learning_rate_rises_and_follows_its_schedule(name, last):
    share = plan_rates(name, num_steps=20, warmup_proportion=0.25)
    rates = [share(step) for step in range(21)]
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[20] == pytest.approx(last, abs=1e-6)


def test_the_usual_rate_falls_with_the_width_of_the_layers(tiny_bert, tiny_qwen):
    for folder in (tiny_bert, tiny_qwen):
        encoder = Encoder(EncoderSpec(str(folder), pooling="mean"))
        width = encoder.model[0].config.hidden_size
        assert usual_lr(encoder, Format.PAIR) == pytest.approx(2e-5 * 768 / width)
        encoder.append_projection(3 * width)  # says nothing of the layers
        assert usual_lr(encoder, Format.PAIR) == pytest.approx(2e-5 * 768 / width)
        assert usual_lr(encoder, Format.DISTILL) == pytest.approx(5 * 2e-5 * 768 / width)


def test_the_usual_rate_without_a_transformer(tiny_bert, tmp_path):
    tokenizer = SentenceTransformer(str(tiny_bert), device="cpu").tokenizer
    static = StaticEmbedding(tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(tmp_path))
    assert usual_lr(Encoder(EncoderSpec(str(tmp_path))), Format.PAIR) == 2e-3


def test_a_given_rate_is_the_rate(tiny_bert, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"query": "a", "pos": ["b"]}\n{"query": "c", "pos": ["d"]}\n')
    arguments = [
        *("fit", f"--model.model_name_or_path={tiny_bert}", "--data.train_path=train.jsonl"),
        *("--trainer.accelerator=cpu", "--save_on_epoch_end=false", "--trainer.max_epochs=1"),
    ]
    caplog.set_level(logging.INFO, logger="embedtune")
    main(arguments)
    assert "0.00048 at its peak, cosine, by the model's width and the format" in caplog.text
    assert "steps: 1: a model hardly" in caplog.text
    caplog.clear()
    main([*arguments, "--model.lr=1e-3", "--trainer.default_root_dir=other"])
    assert "0.001 at its peak, cosine\n" in caplog.text
    assert "model.lr:" not in caplog.text
    for far, said in (("1e-2", "may ruin"), ("1e-6", "hardly moves")):
        main([*arguments, f"--model.lr={far}", f"--trainer.default_root_dir={far}"])
        assert f"model.lr: {float(far):.3g} {said}" in caplog.text


OTHER_STEPS = {
    "larger batches": (["--data.batch_size=16"], 4 + 2 * 1),
    "accumulated": (["--trainer.accumulate_grad_batches=3"], 4 + 2 * 2),
    "a limit": (["--trainer.limit_train_batches=2"], 4 + 2 * 2),
    "other data": (["--data.train_path=[train.jsonl,train.jsonl]"], 4 + 2 * 8),
    "steps": (["--trainer.max_epochs=-1", "--trainer.max_steps=7"], 7),
    "the same": ([], 3 * 4),
}
"""Flags that a fit goes on with after an epoch of 4 steps, and the steps that it then has."""
WAYS = [("auto", name) for name in OTHER_STEPS] + [("fsdp", "larger batches")]


@pytest.mark.parametrize(("strategy", "name"), WAYS)
def test_a_fit_that_goes_on_ends_where_its_schedule_does(tiny_bert, tmp_path, strategy, name):
    """Though the epoch before had other steps than those to come."""
    rows = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *("fit", f"--model.model_name_or_path={tiny_bert}", "--data.train_path=train.jsonl"),
        *("--trainer.accelerator=cpu", "--save_on_epoch_end=false", "--data.batch_size=4"),
        *("--model.lr=1e-3", f"--trainer.strategy={strategy}", "--trainer.default_root_dir=run"),
    ]
    flags, steps = OTHER_STEPS[name]
    for more in (
        ["--trainer.max_epochs=1"],
        ["--trainer.max_epochs=3", "--ckpt_path=last", *flags],
    ):
        fit = Ranks(embedtune, [*command, *more], folder=tmp_path)
        assert fit.wait() == [0], fit.output()
    assert f"  steps          {steps} (" in fit.output()
    assert re.findall(r"steps: (\d+): a model hardly", fit.output()) in ([], [str(steps)])
    assert f"| Steps | `{steps}` |" in (tmp_path / "run/model/README.md").read_text()
    with (tmp_path / "run/metrics.csv").open() as file:
        logged = [row["train/lr"] for row in csv.DictReader(file) if row["train/lr"]]
    share = plan_rates("cosine", steps, warmup_proportion=0.1)
    rates = [1e-3 * share(step) for step in range(4, steps)]
    assert [float(rate) for rate in logged[4:]] == pytest.approx(rates)
