"""The curves of one seed through all three steps, and through DPO, against those that are kept in tests/slow/reference.

A change that shifts a curve is seen here. If the shift is wanted, say why in the commit and write the file anew:

    UPDATE_REFERENCE=1 python -m pytest tests/slow/test_reference_curve.py
"""

import json
import os
from pathlib import Path

import pytest
from helpers import read_metrics

from utils.demo.tiny_model import create_demo_model

REFERENCE = Path(__file__).parent / "reference/demo.jsonl"
# fp32 sums are ordered differently on another CPU; a sampled token changes only where two are that close.
TOLERANCE = dict(rel=2e-3, abs=2e-4)
CURVES = {
    1: ("loss", "grad_norm"),
    2: ("loss", "accuracy"),
    3: ("score", "kl", "answer_length", "actor_loss", "critic_loss", "entropy", "approx_kl", "actor_grad_norm"),
    "dpo": ("loss", "accuracy", "rewards/chosen", "rewards/rejected", "kl", "grad_norm"),
}


def test_the_three_steps_follow_the_reference_curves(run_step, tmp_path):
    base = tmp_path / "base"
    create_demo_model(base, seed=7)
    data = ["--data_path", "local/demo", "--data_split", "4,3,3", "--data_output_path", tmp_path / "data"]
    common = [*data, "--dtype", "fp32", "--seed", 7]
    flags = {
        1: f"--model_name_or_path {base} --max_seq_len 48 --per_device_train_batch_size 16 --max_train_samples 320 "
        "--max_eval_samples 16 --learning_rate 2e-3 --num_warmup_steps 5",
        2: f"--model_name_or_path {tmp_path}/step1 --max_seq_len 48 --per_device_train_batch_size 8 "
        "--max_train_samples 64 --max_eval_samples 16 --learning_rate 5e-4 --num_warmup_steps 2",
        3: f"--actor_model_name_or_path {tmp_path}/step1 --critic_model_name_or_path {tmp_path}/step2 "
        "--max_prompt_seq_len 24 --max_answer_seq_len 16 --per_device_generation_batch_size 16 "
        "--per_device_training_batch_size 8 --ppo_epochs 2 --actor_learning_rate 1e-4 --critic_learning_rate 3e-4 "
        "--num_warmup_steps 0 --normalize_reward --missing_eos_penalty 0 --max_train_samples 48",
        "dpo": f"--model_name_or_path {tmp_path}/step1 --max_seq_len 48 --per_device_train_batch_size 8 "
        "--max_train_samples 64 --max_eval_samples 16 --learning_rate 1e-4 --num_warmup_steps 2",
    }
    rows = []
    for step, names in CURVES.items():
        run_step(step, [*common, *flags[step].split(), "--output_dir", tmp_path / f"step{step}"])
        for i, row in enumerate(read_metrics(tmp_path / f"step{step}")):
            rows.append({"step": step, "row": i} | {name: row[f"train/{name}"] for name in names})
    if os.environ.get("UPDATE_REFERENCE"):
        REFERENCE.parent.mkdir(exist_ok=True)
        REFERENCE.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [json.loads(line) for line in REFERENCE.read_text().splitlines()]
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row.pop("step") == wanted.pop("step")
        assert row == pytest.approx(wanted, **TOLERANCE), "see the head of this file"
