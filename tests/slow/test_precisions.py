"""Training in fp16, which DeepSpeed is told that the CPU has, and in bf16 with gradients that are added up in fp32."""

import itertools
import json
import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers import flags, read_metrics, zero_stage

from utils.ds_utils import get_train_ds_config, initialize, with_batch_sizes
from utils.engine import update
from utils.engine.steps import take_step
from utils.engine.update import Update
from utils.process.launch import init_distributed

SCALING = {"initial_scale_power": 22, "loss_scale_window": 2, "hysteresis": 1}  # too high at first, and soon up again


@pytest.fixture
def scales(monkeypatch):
    """Loss scale and number of skipped steps of each engine, after every step."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    seen: dict[int, list[tuple[float, int]]] = {}

    def recording(engine):
        norm = take_step(engine)
        seen.setdefault(id(engine), []).append((engine.optimizer.loss_scaler.cur_scale, engine.skipped_steps))
        return norm

    monkeypatch.setattr(update, "take_step", recording)
    return seen


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.nightly), 3])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_fp16_trains_while_its_loss_scale_finds_its_place(run_step, start, scales, tmp_path, step, stage):
    settings = {"zero_optimization": {"reduce_bucket_size": 1000000}, "fp16": SCALING}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    text = f"{zero_stage(step, stage)} --dtype fp16 --num_warmup_steps 0"
    text += " --align_overflow" if step == 3 else " --learning_rate 1e-3"
    run_step(
        step, [*start(step), *flags(text, output_dir=tmp_path, deepspeed_config_overrides=tmp_path / "settings.json")]
    )
    assert len(scales) == (2 if step == 3 else 1)
    skipped = [[count for _, count in engine] for engine in scales.values()]
    assert all(counts == skipped[0] for counts in skipped)  # actor and critic together
    assert 0 < skipped[0][-1] < len(skipped[0])
    for engine in scales.values():
        pairs = list(itertools.pairwise(engine))
        assert any(after[0] < before[0] for before, after in pairs)
        assert any(after[0] > before[0] for before, after in pairs)
    losses = [row["train/actor_loss" if step == 3 else "train/loss"] for row in read_metrics(tmp_path)]
    assert all(math.isfinite(loss) for loss in losses)
    half = len(losses) // 2
    assert step == 3 or fmean(losses[half:]) < fmean(losses[:half])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_sums_in_fp32_keep_what_bf16_rounds_away(stage, offload):
    """Gradients of 256 and, eight times, 0.5, which is a quarter of what bf16 can tell from 256."""
    init_distributed(SimpleNamespace(local_rank=-1, comm_timeout=60))
    norms = {}
    for sums in ("bf16", "fp32"):
        config = with_batch_sizes(get_train_ds_config(offload, "bf16", stage, grad_accum_dtype=sums), 1, 9)
        config["zero_optimization"]["reduce_bucket_size"] = 1000
        model = torch.nn.Linear(4, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        allowed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        engine = initialize(model, config | allowed, optimizer)
        steps = Update({"model": engine})
        for size in steps.micro_batches([256.0] + [0.5] * 8):
            steps.backward(engine(torch.full((1, 4), size, dtype=torch.bfloat16)).sum())
        norms[sums] = steps.step()["grad_norm"]
    assert norms == {"bf16": 2 * 256.0, "fp32": 2 * 260.0}


@pytest.mark.parametrize("step, stages", [(1, "0"), (2, "3"), (3, "1")])
def test_a_step_trains_with_sums_in_fp32(run_step, start, tmp_path, capsys, step, stages):
    more = "--gradient_accumulation_steps 2" if step < 3 else ""
    text = f"{zero_stage(step, int(stages))} --dtype bf16 --grad_accum_dtype fp32 {more}"
    run_step(step, [*start(step), *flags(text, output_dir=tmp_path)])
    assert ("runs as stage 2 in bf16 with --grad_accum_dtype fp32" in capsys.readouterr().out) == (stages != "3")
    losses = [row["train/actor_loss" if step == 3 else "train/loss"] for row in read_metrics(tmp_path)]
    assert len(losses) > 1 and all(math.isfinite(loss) for loss in losses)
