"""What AdamW decays, and the course of the learning rate."""

import pytest
import torch

from embedtune import EmbeddingModule
from embedtune.training.optimizer import build_optimizer, build_schedule


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


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_learning_rate_rises_and_follows_its_schedule(name, last):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, name, num_steps=20, warmup_proportion=0.25)
    rates = []
    for _ in range(21):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[20] == pytest.approx(last, abs=1e-6)
