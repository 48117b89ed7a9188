"""Whole runs that must give one trajectory: ZeRO stages, ranks, accumulation, micro-batches, checkpointing.

Two launches in all, with one rank and with two; each makes every run of its list in one process group.
"""

from pathlib import Path

import pytest
import torch
from helpers import flags, make_model, make_reward_model, read_metrics, run_in_one_launch, write_pairs
from safetensors.torch import load_file

STAGES = (0, 1, 2, 3)
# name -> (ranks, rows per device, accumulation, stage, other flags); 8 rows per optimizer step in every one.
SUPERVISED = {
    **{f"1 rank, stage {stage}": (1, 4, 2, stage, "") for stage in STAGES},
    **{f"2 ranks, stage {stage}": (2, 4, 1, stage, "") for stage in STAGES},
    "1 rank, rows one by one": (1, 1, 8, 0, ""),
    "1 rank, all rows at once": (1, 8, 1, 2, ""),
    "2 ranks, accumulated at stage 3": (2, 1, 4, 3, ""),
    "1 rank, checkpointing": (1, 4, 2, 0, "--gradient_checkpointing"),
    "2 ranks, checkpointing at stage 3": (2, 2, 2, 3, "--gradient_checkpointing"),
}
DPO = {
    "2 ranks, precomputed at stage 3": (2, 4, 1, 3, "--precompute_ref_log_probs"),
    "2 ranks, the reference in host memory": (2, 4, 1, 2, "--offload_reference_model"),
}
LORA = "--lora_dim 4 --only_optimize_lora --lora_learning_rate 1e-2"
DPO_LORA = {"1 rank, LoRA alone": (1, 8, 1, 0, LORA), "2 ranks, LoRA alone at stage 3": (2, 4, 1, 3, LORA)}
RLHF = {  # name: (stage of the actor, of the critic, other flags)
    "stages 0 and 0": (0, 0, ""),
    "stages 3 and 0": (3, 0, ""),
    "stages 2 and 3": (2, 3, ""),
    "stages 3 and 3, generating layer by layer": (3, 3, "--unpin_actor_parameters"),
    "stages 1 and 2, checkpointing": (1, 2, "--actor_gradient_checkpointing --critic_gradient_checkpointing"),
}
GROUPS = "--advantage_estimator grpo --num_generations_per_prompt 2 --loss_mean answer --drop_groups_without_spread"
GROUPS += " --clip_reward_value 0.05"  # most groups are alike
GRPO = {"groups, stage 0": (0, 0, GROUPS), "groups, stage 3": (3, 0, GROUPS)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of every run, under ``step/name``."""
    folder = tmp_path_factory.mktemp("runs")
    base = make_model(folder / "base")
    reward = make_reward_model(folder / "reward", base, seed=3)
    (folder / "pairs").mkdir()
    write_pairs(folder / "pairs" / "train.jsonl", 72)
    write_pairs(folder / "pairs" / "eval.jsonl", 12)
    common = "--data_split 1,1,1 --dtype fp32 --max_eval_samples 4"
    places = dict(data_path=folder / "pairs", data_output_path=folder / "cache")
    lists = {1: [], 2: []}
    for step, start in ((1, base), (2, reward), ("dpo", base)):
        for name, (ranks, rows, accumulation, stage, more) in (
            SUPERVISED | (DPO | DPO_LORA if step == "dpo" else {})
        ).items():
            text = f"""
                {common} --max_seq_len 48 --learning_rate 1e-3 --zero_stage {stage} {more}
                --per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}
            """
            output = folder / str(step) / name
            lists[ranks].append((step, flags(text, model_name_or_path=start, output_dir=output, **places)))
    models = dict(actor_model_name_or_path=base, critic_model_name_or_path=reward)
    for name, (actor_stage, critic_stage, more) in (RLHF | GRPO).items():
        text = f"""
            {common} --max_prompt_seq_len 32 --max_answer_seq_len 8 --num_warmup_steps 0 --enable_hybrid_engine
            --per_device_generation_batch_size 4 --per_device_training_batch_size 4 --actor_learning_rate 1e-3
            --critic_learning_rate 1e-3 --actor_dropout 0 --actor_zero_stage {actor_stage}
            --critic_zero_stage {critic_stage} {more}
        """
        lists[2].append((3, flags(text, output_dir=folder / "3" / name, **models, **places)))
    for ranks, wanted in lists.items():
        run_in_one_launch(wanted, folder, ranks)
    return folder


def _trajectory(folder: Path, names) -> list[list[float]]:
    return [[row[f"train/{name}"] for name in names] for row in read_metrics(folder)]


CASES = [(step, name) for step in (1, 2, "dpo") for name in list(SUPERVISED)[1:]] + [("dpo", name) for name in DPO]


@pytest.mark.parametrize("step, name", CASES)
def test_steps_1_and_2_give_one_trajectory_and_one_model(runs, step, name):
    reference, run = runs / str(step) / next(iter(SUPERVISED)), runs / str(step) / name
    wanted, got = (torch.tensor(_trajectory(folder, ["loss", "grad_norm", "lr"])) for folder in (reference, run))
    assert len(wanted) == 3
    assert wanted[-1, 0] < wanted[0, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        # Adam's first steps are lr * sign(gradient): where a gradient is nearly zero, rounding decides its sign.
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=5e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_dpo_against_the_policy_without_adapters_gives_one_trajectory_on_two_ranks_at_stage_3(runs):
    wanted, got = (torch.tensor(_trajectory(runs / "dpo" / name, ["loss", "kl", "grad_norm"])) for name in DPO_LORA)
    assert wanted[-1, 0] < wanted[0, 0] and abs(wanted[-1, 1]) > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", list(RLHF)[1:])
def test_step_3_gives_one_trajectory_for_every_pair_of_stages(runs, name):
    names = ["score", "kl", "actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm", "answer_length"]
    wanted, got = (torch.tensor(_trajectory(runs / "3" / run, names)) for run in (next(iter(RLHF)), name))
    assert len(wanted) == 3
    assert abs(wanted[-1, 1]) > 1e-4  # the policy has moved
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4)


def test_groups_without_spread_and_means_over_answers_on_two_ranks_whatever_the_stage(runs):
    names = ["score", "kl", "groups_without_spread", "actor_grad_norm"]
    wanted, got = (torch.tensor(_trajectory(runs / "3" / run, names)) for run in GRPO)
    assert (wanted[:, 2] == 3).any(), "of four groups: one of the ranks has nothing to learn from"
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4)
