"""On two ranks too: a run that is killed and resumed gives bit for bit what an undisturbed one gives."""

import pytest
from helpers import assert_same_run, flags, run_in_one_launch, step_arguments
from test_checkpoint import EVERY_STAGE, LORA, own_flags

ON_TWO_RANKS = EVERY_STAGE | {
    "sft, LoRA alone at stage 3": (1, f"--zero_stage 3 {LORA}"),
    "reward, offload": (2, "--zero_stage 2 --offload"),
    # The checkpoint of step 2 counts when that of step 3 is due, which is still being written when the run dies.
    "sft, beside training": (1, "--zero_stage 2 --async_checkpoint --checkpoint_steps 1"),
    "rlhf, EMA, beside training": (
        3,
        "--actor_zero_stage 3 --critic_zero_stage 2 --enable_ema --async_checkpoint --checkpoint_steps 1",
    ),
    "rlhf, EMA and ptx at stage 3": (
        3,
        "--actor_zero_stage 3 --critic_zero_stage 0 --enable_ema --enable_hybrid_engine "
        "--unsupervised_dataset_name TEXT --ppo_epochs 2",
    ),
}


@pytest.fixture(scope="module")
def two_ranks(small_models, tmp_path_factory, pairs_folder, cache_folder):
    """The folder of all ON_TWO_RANKS, made in one launch: each has ``plain`` and ``resumed``, killed after step 3."""
    folder, runs = tmp_path_factory.mktemp("two_ranks"), []
    for name, (step, text) in ON_TWO_RANKS.items():
        arguments = step_arguments(step, small_models, pairs_folder, cache_folder) + flags("--num_train_epochs 1")
        saving = [*arguments, *flags("--checkpoint_steps 2", output_dir=folder / name / "resumed")]
        arguments, saving = (given + own_flags(text, small_models) for given in (arguments, saving))
        runs += [
            (step, [*arguments, "--output_dir", folder / name / "plain"]),
            (step, saving, 3),  # of 4
            (step, [*saving, "--resume", "auto"]),
        ]
    console = run_in_one_launch(runs, folder)
    assert console.count("2 steps are done") == len(ON_TWO_RANKS)
    return folder


@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_on_two_ranks_too(two_ranks, case):
    assert_same_run(two_ranks / case / "plain", two_ranks / case / "resumed")
