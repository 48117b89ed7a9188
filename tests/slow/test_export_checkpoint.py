"""inference/export_checkpoint.py: the model of a checkpoint is, file by file, what the run itself saves at that step."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import PROJECT, flags, zero_stage
from safetensors.torch import load_file
from test_checkpoint import LORA, own_flags

from utils.run.checkpoint_files import newest_checkpoint

CASES = {
    **{f"step {step}, ZeRO-{stage}": (step, zero_stage(step, stage)) for step in (1, 2, "dpo") for stage in range(4)},
    **{f"step 3, ZeRO-{stage}, EMA": (3, f"{zero_stage(3, stage)} --enable_ema") for stage in range(4)},
    **{f"sft, bf16, ZeRO-{stage}": (1, f"--zero_stage {stage} --dtype bf16") for stage in range(4)},
    "sft, fp32 sums": (1, "--zero_stage 1 --dtype bf16 --grad_accum_dtype fp32"),
    "sft, LoRA alone": (1, LORA),
    "sft, LoRA alone at stage 3": (1, f"--zero_stage 3 {LORA}"),
    "sft, LoRA and all else": (1, "--lora_dim 2 --zero_stage 2"),
    "reward, LoRA alone": (2, LORA),
    "dpo, LoRA alone, bf16": ("dpo", f"{LORA} --dtype bf16"),
    "rlhf, LoRA alone, EMA": (3, "--actor_lora_dim 2 --critic_lora_dim 2 --enable_ema --only_optimize_lora"),
}


@pytest.fixture
def export(monkeypatch, tmp_path):
    """export(checkpoint, flags...) -> the folder of the model."""

    def run(checkpoint: Path, *more, output: str = "exported") -> Path:
        monkeypatch.syspath_prepend(str(PROJECT / "inference"))
        import export_checkpoint

        monkeypatch.setattr(sys, "argv", ["export_checkpoint.py", *map(str, (checkpoint, tmp_path / output, *more))])
        export_checkpoint.main()
        return tmp_path / output

    return run


def assert_same_files(saved: Path, exported: Path) -> None:
    names = {file.name for file in saved.iterdir() if file.is_file()} - {"README.md", "metrics.jsonl", "samples.jsonl"}
    names -= {"run_config.yaml", "best.json"}
    assert names == {file.name for file in exported.iterdir()}
    for name in names:
        if name.endswith(".safetensors"):
            want, got = load_file(saved / name), load_file(exported / name)
            assert want.keys() == got.keys()
            assert all(torch.equal(want[key], got[key]) and want[key].dtype == got[key].dtype for key in want), name
        elif name.endswith(".json"):
            assert json.loads((saved / name).read_text()) == json.loads((exported / name).read_text()), name
        else:
            assert (saved / name).read_bytes() == (exported / name).read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_the_model_of_the_last_checkpoint_is_the_model_of_the_run(
    run_step, start, small_models, tmp_path, export, case
):
    step, text = CASES[case]
    arguments = [*start(step), *own_flags(text, small_models), *flags("--num_train_epochs 1 --checkpoint_steps 1")]
    run_step(step, [*arguments, "--output_dir", tmp_path / "run"])
    checkpoints = tmp_path / "run/checkpoints"
    if step != 3:
        assert_same_files(tmp_path / "run", export(checkpoints))
        return
    for engine in ("actor", "critic", "actor_ema"):
        exported = export(newest_checkpoint(checkpoints).folder, "--engine", engine, output=engine)
        assert_same_files(tmp_path / "run" / engine, exported)
