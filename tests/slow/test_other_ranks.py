"""A run that is resumed on another number of ranks, or at another ZeRO stage: its losses are those of the undisturbed
run, but for the order of sums.

In fp32, without dropout; step 3 with greedy answers. The number of rows on each rank fits both; accumulation follows.
"""

import json

import pytest
from deepspeed.accelerator import get_accelerator
from helpers import flags, read_metrics, run_in_one_launch, step_arguments, write_pairs, zero_stage

from utils.run.saved_engine import SavedEngine

TOLERANCE, SAVED_AT = 1e-4, 4
LONG = "--max_train_samples 48 --num_train_epochs 2"  # 24 steps of 4 rows
SUPERVISED = f"{LONG} --dropout 0 --learning_rate 1e-3 --per_device_train_batch_size"
RLHF = (
    f"{LONG} --actor_dropout 0 --no-do_sample --enable_ema --actor_learning_rate 1e-4 --critic_learning_rate 1e-4 "
    "--per_device_generation_batch_size {0} --per_device_training_batch_size {0}"
)
FIGURES = ("train/loss", "train/critic_loss", "train/reward_score")
LAYOUTS = [(1, stage, 2, other) for stage in range(4) for other in range(4)]  # ranks and ZeRO stage, then and later
LAYOUTS += [(2, stage, 1, other) for stage in range(4) for other in range(4)]
LAYOUTS += [(1, stage, 1, other) for stage in range(4) for other in range(4) if stage != other]
FOUR_RANKS = [(1, 0, 4, 3), (1, 2, 4, 2), (2, 3, 4, 1), (2, 1, 4, 0), (4, 3, 4, 2)]
FOUR_RANKS += [(4, 3, 1, 0), (4, 2, 1, 2), (4, 1, 2, 3), (4, 0, 2, 1), (4, 2, 4, 3)]


def name_of(*layout: int) -> str:
    return "_to_".join(f"{ranks}_ranks_zero_{stage}" for ranks, stage in zip(layout[::2], layout[1::2], strict=True))


@pytest.fixture(scope="module")
def arguments_of(small_models, tmp_path_factory, cache_folder):
    """(step, ranks, stage) -> the arguments of a run whose steps have four rows."""
    pairs = tmp_path_factory.mktemp("many_pairs")
    write_pairs(pairs / "train.jsonl", 150)
    write_pairs(pairs / "eval.jsonl", 16)

    def arguments(step, ranks, stage):
        rows = RLHF.format(4 // ranks) if step == 3 else f"{SUPERVISED} {4 // ranks}"
        return [*step_arguments(step, small_models, pairs, cache_folder), *flags(f"{rows} {zero_stage(step, stage)}")]

    return arguments


def run_layouts(arguments_of, folder, step, layouts) -> None:
    """Undisturbed runs of all layouts that are left, in one launch for each number of ranks; then all that go on."""
    saving = flags(f"--checkpoint_steps {SAVED_AT} --keep_checkpoints 9")
    for ranks in sorted({layout[0] for layout in layouts}):
        stages = sorted({layout[1] for layout in layouts if layout[0] == ranks})
        runs = [
            (step, [*arguments_of(step, ranks, stage), *saving, "--output_dir", folder / name_of(ranks, stage)])
            for stage in stages
        ]
        run_in_one_launch(runs, folder, ranks)
    for ranks in sorted({layout[2] for layout in layouts}):
        runs = []
        for layout in (layout for layout in layouts if layout[2] == ranks):
            checkpoint = folder / name_of(*layout[:2]) / f"checkpoints/step-{SAVED_AT:08d}"
            more = flags(resume=checkpoint, output_dir=folder / name_of(*layout))
            runs.append((step, [*arguments_of(step, *layout[2:]), *more]))
        console = run_in_one_launch(runs, folder, ranks)
        assert console.count("a step has the same rows as before") == len(runs)


def largest_difference(plain, other) -> float:
    """Of all figures and steps, relative to the largest value that the figure has."""
    want, got = ({row["step"]: row for row in read_metrics(folder)} for folder in (plain, other))
    assert sorted(got) == sorted(want)[SAVED_AT:]
    differences = []
    for name in (name for name in FIGURES if name in want[max(want)]):
        largest = max(abs(want[step][name]) for step in got)
        differences += [abs(want[step][name] - got[step][name]) / largest for step in got]
    return max(differences)


def test_two_ranks_go_on_from_one(run_step, arguments_of, tmp_path):
    """The short one: from a stage without parts to one in which each rank has its own part of each weight."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    short = flags("--num_train_epochs 1")
    saving = flags(f"--checkpoint_steps {SAVED_AT} --keep_checkpoints 9", output_dir=plain)
    run_step(1, [*arguments_of(1, 1, 0), *short, *saving])
    more = flags(resume=plain / f"checkpoints/step-{SAVED_AT:08d}", output_dir=other)
    console = run_in_one_launch([(1, [*arguments_of(1, 2, 3), *short, *more])], tmp_path)
    assert "2 ranks instead of 1, --zero_stage 3 instead of 0: a step has the same rows as before" in console
    assert largest_difference(plain, other) < TOLERANCE


@pytest.mark.parametrize("stages", [(2, 3), (3, 1), pytest.param((1, 2), marks=pytest.mark.nightly)])
def test_the_loss_scale_of_fp16_goes_on_at_another_stage(run_step, start, tmp_path, monkeypatch, stages):
    """DeepSpeed is told that the CPU has fp16; the scale is too high at first, and soon up again."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    scaling = {"initial_scale_power": 22, "loss_scale_window": 2, "hysteresis": 1}
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000000}, "fp16": scaling}))
    text = f"--dtype fp16 --dropout 0 --learning_rate 1e-3 --checkpoint_steps {SAVED_AT} --keep_checkpoints 9"
    arguments = [*start(1), *flags(text, deepspeed_config_overrides=settings)]
    plain, other = (tmp_path / name for name in ("plain", "other"))
    run_step(1, [*arguments, *flags(zero_stage=stages[0], output_dir=plain)])
    resume = plain / f"checkpoints/step-{SAVED_AT:08d}"
    more = flags(zero_stage=stages[1], output_dir=other, resume=resume, checkpoint_dir=tmp_path / "checkpoints")
    run_step(1, [*arguments, *more])
    for step in (2 * SAVED_AT, 4 * SAVED_AT):
        folders = (plain / "checkpoints", tmp_path / "checkpoints")
        then, now = (SavedEngine(folder / f"step-{step:08d}/model") for folder in folders)
        assert then.loss_scale == now.loss_scale and then.loss_scale["cur_iter"] == step
        assert then.counters == now.counters and then.counters["skipped_steps"] > 0
    assert largest_difference(plain, other) < 1e-2  # half precision


@pytest.mark.nightly
@pytest.mark.parametrize("layouts", [LAYOUTS, FOUR_RANKS], ids=["1 and 2 ranks", "4 ranks"])
@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_all_layouts_go_on_from_each_other(arguments_of, tmp_path, step, layouts):
    run_layouts(arguments_of, tmp_path, step, layouts)
    found = {
        layout: largest_difference(tmp_path / name_of(*layout[:2]), tmp_path / name_of(*layout)) for layout in layouts
    }
    print("\n".join(f"step {step}: {name_of(*layout)}: {value:.1e}" for layout, value in found.items()))
    assert max(found.values()) < TOLERANCE
