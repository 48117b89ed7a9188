"""Single steps whose gradients or divergence are not finite."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from training.step3_rlhf_finetuning.ppo_math import AdaptiveKLController
from utils.engine.steps import take_step


@pytest.mark.parametrize("scale, norm", [(2.0, None), (1.0, torch.inf)])
def test_in_fp16_an_overflow_counts_only_at_the_smallest_loss_scale(scale, norm):
    scaler = DynamicLossScaler(scale, 100, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(loss_scaler=scaler, _global_grad_norm=torch.inf),
        is_gradient_accumulation_boundary=lambda: True,
        step=lambda: None,
        get_global_grad_norm=lambda: torch.inf,
    )
    assert take_step(engine) == norm
    engine.get_global_grad_norm = lambda: 3.0
    assert take_step(engine) == 3.0


def test_a_non_finite_divergence_leaves_the_kl_controller_alone():
    controller = AdaptiveKLController(0.1, target=1.0, horizon=10)
    controller.update(torch.nan, 4)
    assert controller.value == 0.1
