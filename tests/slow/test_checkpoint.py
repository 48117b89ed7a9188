"""Checkpoints: a run that is killed and resumed gives bit for bit what an undisturbed one gives; nothing half-written,
of another run or of a stranger is taken up."""

from pathlib import Path

import pytest
from helpers import assert_same_run, flags, killed_after, zero_stage

from utils.run.checkpoint_files import newest_checkpoint

STAGES = range(4)
EVERY_STAGE = {
    # name: (step, flags)
    **{f"step {step}, ZeRO-{stage}": (step, zero_stage(step, stage)) for step in (1, 2, "dpo", 3) for stage in STAGES},
    **{f"step 3, ZeRO-{s}, hybrid engine": (3, f"{zero_stage(3, s)} --enable_hybrid_engine") for s in STAGES},
}
LORA = "--lora_dim 2 --only_optimize_lora --lora_dropout 0.1"
ON_ONE_RANK = EVERY_STAGE | {
    "sft, packing, accumulation": (1, "--zero_stage 1 --packing --gradient_accumulation_steps 2"),
    "sft, bf16": (1, "--zero_stage 2 --dtype bf16"),
    "sft, QLoRA": (1, f"--quantize nf4 {LORA}"),
    "sft, a soft prompt": (1, "--soft_prompt prompt_tuning --num_virtual_tokens 4"),
    "reward, LoRA alone": (2, LORA),
    "dpo, LoRA alone, with an SFT term": ("dpo", f"{LORA} --rpo_alpha 0.5"),
    "dpo, precomputed": ("dpo", "--precompute_ref_log_probs --gradient_accumulation_steps 2"),
    "rlhf, ptx, EMA": (
        3,
        "--actor_zero_stage 1 --critic_zero_stage 1 --enable_ema --unsupervised_dataset_name TEXT "
        "--per_device_generation_batch_size 4 --num_train_epochs 2",
    ),
    "rlhf, rloo, LoRA alone, EMA": (
        3,
        "--advantage_estimator rloo --num_generations_per_prompt 2 --actor_lora_dim 2 --enable_ema "
        "--only_optimize_lora --enable_hybrid_engine",
    ),
}


def own_flags(text: str, models: Path) -> list[str]:
    return flags(text.replace("TEXT", str(models / "text.txt")))


@pytest.mark.parametrize("case", ON_ONE_RANK)
def test_a_killed_and_resumed_run_is_bit_equal_to_an_undisturbed_one(
    run_step, start, small_models, tmp_path, case, capsys
):
    """Supervised runs are killed in the middle of an epoch, five steps in; PPO after three; the checkpoint is older."""
    step, text = ON_ONE_RANK[case]
    steps = 3 if step == 3 or "packing" in case else 5
    arguments = [*start(step), *own_flags(text, small_models)]
    run_step(step, [*arguments, "--output_dir", tmp_path / "plain"])
    saving = [*arguments, "--output_dir", tmp_path / "resumed", "--checkpoint_steps", 2]
    with killed_after(steps):
        run_step(step, saving)
    assert f"step-{steps // 2 * 2:08d}" == newest_checkpoint(tmp_path / "resumed/checkpoints").folder.name
    run_step(step, [*saving, "--resume", "auto"])
    assert f"{steps // 2 * 2} steps are done" in capsys.readouterr().out
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")
