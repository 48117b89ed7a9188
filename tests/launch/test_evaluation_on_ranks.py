"""Evaluations on two ranks: no trace in the training, and each held-out prompt counted once."""

import pytest
import torch
from helpers import MEASURED, flags, read_metrics, run_in_one_launch, step_arguments, zero_stage
from safetensors.torch import load_file

RUNS = {1: "--zero_stage 3 --eval_iters 1", 2: "--zero_stage 2 --eval_iters 1"}
RUNS[3] = f"{zero_stage(3, 3)} --enable_hybrid_engine --eval_prompts 5"  # one rank has two of them, and a filler
WATCHING = "--eval_interval 2 --save_best --save_interval 2 --save_total_limit 1"


@pytest.fixture(scope="module")
def two_ranks(small_models, pairs_folder, cache_folder, tmp_path_factory):
    """The folder of all runs: step and "plain" or "watched"."""
    folder = tmp_path_factory.mktemp("two_ranks")
    runs = []
    for step, text in RUNS.items():
        arguments = step_arguments(step, small_models, pairs_folder, cache_folder)
        runs.append((step, [*arguments, *flags(text, output_dir=folder / f"{step}plain")]))
        runs.append((step, [*arguments, *flags(f"{text} {WATCHING}", output_dir=folder / f"{step}watched")]))
    one = flags(f"{RUNS[3]} --eval_interval 4 --eval_prompts 1", output_dir=folder / "3one")  # for two ranks
    runs.append((3, [*arguments, *one]))
    run_in_one_launch(runs, folder)
    return folder


@pytest.mark.parametrize("step", [1, 2, 3])
def test_evaluations_on_two_ranks_leave_no_trace_in_the_training(two_ranks, step):
    plain, watched = two_ranks / f"{step}plain", two_ranks / f"{step}watched"
    rows = [
        [{name: row[name] for name in row if not any(m in name for m in MEASURED)} for row in read_metrics(folder)]
        for folder in (plain, watched)
    ]
    assert rows[0] and rows[0] == rows[1]
    for file in plain.rglob("*.safetensors"):
        want, got = load_file(file), load_file(watched / file.relative_to(plain))
        assert all(torch.equal(want[name], got[name]) for name in want), file
    assert len(list(watched.glob("step-*"))) == 1 and list((watched / "best").rglob("model.safetensors"))


@pytest.mark.parametrize("run, prompts", [("watched", 5), ("one", 1)])
def test_each_held_out_prompt_is_answered_once_whatever_the_ranks(two_ranks, run, prompts):
    rows = read_metrics(two_ranks / f"3{run}", "eval")
    assert rows and {row["eval/used_answers"] + row["eval/unused_answers"] for row in rows} == {prompts}
