"""Actor and critic that leave out a step together when the gradients of one overflow."""

import math

import pytest
import torch
from helpers import zero_stage
from test_rlhf import _experience, _trainer, _window, folders  # noqa: F401


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("broken", ["actor", "critic", "neither"])
def test_actor_and_critic_skip_together_when_one_overflows(folders, broken, stage):  # noqa: F811
    rates = "--actor_learning_rate 1e-2 --critic_learning_rate 1e-2"
    trainer = _trainer(folders, f"{zero_stage(3, stage)} --dtype bf16 --align_overflow {rates}")
    experience = _experience(trainer)
    engines = trainer.rlhf_engine.trained_engines()
    if broken != "neither":  # a gradient that is too large in an otherwise finite step
        last = [p for p in engines[broken].module.parameters() if p.requires_grad][-1]
        last.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: [p.detach().clone() for p in e.module.parameters()] for name, e in engines.items()}
    asked = []
    metrics = trainer.train_rlhf(_window(experience), lambda numbers: bool(asked.append(numbers)))
    assert (asked[-1]["actor"]["gradient norm"] == math.inf) == (broken != "neither")
    for name, engine in engines.items():
        moved = any(not torch.equal(a, b) for a, b in zip(before[name], engine.module.parameters(), strict=True))
        assert moved == (broken == "neither"), name
        assert "has_overflow" not in vars(engine.optimizer)
    assert metrics["actor_step_applied"] == (broken == "neither")
