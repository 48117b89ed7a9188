"""Checkpoints: a run that is killed and resumed gives bit for bit what an undisturbed one gives; nothing half-written,
of another run or of a stranger is taken up."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, assert_same_run, killed_after, run_command, step_arguments

from utils import checkpoint
from utils.checkpoint import newest_checkpoint, read_checkpoint
from utils.distributed import EndOfRun, UserError


def _stages(step: int, stage: int) -> list:
    return ["--zero_stage", stage] if step < 3 else ["--actor_zero_stage", stage, "--critic_zero_stage", stage]


HYBRID = ["--enable_hybrid_engine"]
EVERY_STAGE = {
    # name: (step, flags)
    **{f"step {step}, ZeRO-{stage}": (step, _stages(step, stage)) for step in (1, 2, 3) for stage in range(4)},
    **{f"step 3, ZeRO-{stage}, hybrid engine": (3, [*_stages(3, stage), *HYBRID]) for stage in range(4)},
}
LORA = ["--lora_dim", 2, "--only_optimize_lora", "--lora_dropout", 0.1]
ON_ONE_RANK = EVERY_STAGE | {
    "sft, packing, accumulation": (1, ["--zero_stage", 1, "--packing", "--gradient_accumulation_steps", 2]),
    "sft, bf16": (1, ["--zero_stage", 2, "--dtype", "bf16"]),
    "sft, QLoRA": (1, ["--quantize", "nf4", *LORA]),
    "sft, a soft prompt": (1, ["--soft_prompt", "prompt_tuning", "--num_virtual_tokens", 4]),
    "reward, LoRA alone": (2, LORA),
    "rlhf, ptx, EMA": (
        3,
        [
            *("--actor_zero_stage", 1, "--critic_zero_stage", 1, "--enable_ema", "--unsupervised_dataset_name", "TEXT"),
            *("--per_device_generation_batch_size", 4, "--num_train_epochs", 2),
        ],
    ),
    "rlhf, rloo, LoRA alone, EMA": (
        3,
        [
            *("--advantage_estimator", "rloo", "--num_generations_per_prompt", 2, "--actor_lora_dim", 2),
            *("--enable_ema", "--only_optimize_lora", "--enable_hybrid_engine"),
        ],
    ),
}
ON_TWO_RANKS = EVERY_STAGE | {
    "sft, LoRA alone at stage 3": (1, ["--zero_stage", 3, *LORA]),
    "reward, offload": (2, ["--zero_stage", 2, "--offload"]),
    "rlhf, EMA and ptx at stage 3": (
        3,
        [
            *("--actor_zero_stage", 3, "--critic_zero_stage", 0, "--enable_ema", "--enable_hybrid_engine"),
            *("--unsupervised_dataset_name", "TEXT", "--ppo_epochs", 2),
        ],
    ),
}


def _resolved(flags, models):
    return [models / "text.txt" if flag == "TEXT" else flag for flag in flags]


@pytest.mark.parametrize("case", ON_ONE_RANK)
def test_a_killed_and_resumed_run_is_bit_equal_to_an_undisturbed_one(
    run_step, start, small_models, tmp_path, case, capsys
):
    """Supervised runs are killed in the middle of an epoch, five steps in; PPO after three; the checkpoint is older."""
    step, flags = ON_ONE_RANK[case]
    steps = 3 if step == 3 or "packing" in case else 5
    arguments = [*start(step), *_resolved(flags, small_models)]
    run_step(step, [*arguments, "--output_dir", tmp_path / "plain"])
    saving = [*arguments, "--output_dir", tmp_path / "resumed", "--checkpoint_steps", 2]
    with killed_after(steps):
        run_step(step, saving)
    assert f"step-{steps // 2 * 2:08d}" == newest_checkpoint(tmp_path / "resumed/checkpoints").folder.name
    run_step(step, [*saving, "--resume", "auto"])
    assert f"{steps // 2 * 2} steps are done" in capsys.readouterr().out
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


@pytest.fixture(scope="module")
def two_ranks(small_models, tmp_path_factory, pairs_folder, cache_folder):
    """The folder of all ON_TWO_RANKS, made in one launch: each has ``plain`` and ``resumed``, killed after step 3."""
    folder, runs = tmp_path_factory.mktemp("two_ranks"), []
    for name, (step, flags) in ON_TWO_RANKS.items():
        arguments = [*step_arguments(step, small_models, pairs_folder, cache_folder), *_resolved(flags, small_models)]
        arguments += ["--num_train_epochs", 1]
        saving = [*arguments, "--output_dir", folder / name / "resumed", "--checkpoint_steps", 2]
        runs += [
            [step, [*arguments, "--output_dir", folder / name / "plain"]],
            [step, saving, 3],  # of 4
            [step, [*saving, "--resume", "auto"]],
        ]
    runs = [[step, [str(argument) for argument in arguments], *killed] for step, arguments, *killed in runs]
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node=2"]
    code, console = run_command([*torchrun, PROJECT / "tests/runs_in_one_launch.py", folder / "runs.json"], 600)
    assert code == 0, console[-6000:]
    assert console.count("2 steps are done") == len(ON_TWO_RANKS)
    return folder


@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_on_two_ranks_too(two_ranks, case):
    assert_same_run(two_ranks / case / "plain", two_ranks / case / "resumed")


# ---------------------------------------------------------------- what is refused, what is left alone


@pytest.fixture
def stopped(run_step, start, tmp_path):
    """(arguments, folder of checkpoints) of a run of step 1 that was killed after step 5, with checkpoints 2 and 4."""
    arguments = [*start(1), "--output_dir", tmp_path / "out", "--checkpoint_steps", 2]
    with killed_after(5):
        run_step(1, arguments)
    return arguments, tmp_path / "out/checkpoints"


def test_a_run_that_is_not_the_same_is_refused_with_flag_and_values(run_step, stopped, pairs_folder, monkeypatch):
    arguments, folder = stopped
    resuming = [*arguments, "--resume", "auto"]
    for flags, message in (
        (["--learning_rate", 0.1], r"--learning_rate is 0\.1, and was 0\.001"),
        (["--seed", 5], "--seed is 5, and was 1234"),
        (["--zero_stage", 1], "--zero_stage is 1, and was 0"),
    ):
        with pytest.raises(UserError, match=message):
            run_step(1, [*resuming, *flags])
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        run_step(1, arguments)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "get_world_size", lambda: 2)
        with pytest.raises(UserError, match="written by 1 ranks and this run has 2"):
            run_step(1, resuming)
    state = read_checkpoint(folder / "step-00000004").state
    (folder / "step-00000004/state.json").write_text(json.dumps(state | {"rows": "others"}))
    with pytest.raises(UserError, match="its training rows were other ones"):
        run_step(1, resuming)


def test_half_written_checkpoints_are_passed_over_and_refused_by_name(run_step, stopped, capsys):
    arguments, folder = stopped
    assert (folder / "latest").read_text() == "step-00000004\n"
    file = next((folder / "step-00000004/model").glob("*.pt"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"not a whole checkpoint: model/{file.name} is missing or not {len(content)}"):
        run_step(1, [*arguments, "--resume", folder / "step-00000004"])
    (folder / ".step-00000006").mkdir()  # of a run that was killed while it saved
    run_step(1, [*arguments, "--resume", "auto"])
    assert "step-00000002: 2 steps are done" in capsys.readouterr().out
    assert not (folder / ".step-00000006").exists()
    assert [found.state["steps"] for found in checkpoint.complete_checkpoints(folder)] == [14, 16]
    with pytest.raises(EndOfRun, match="this run has finished after 16 steps"):
        run_step(1, [*arguments, "--resume", "auto"])


def test_no_code_in_a_checkpoint_is_run(run_step, stopped, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    arguments, folder = stopped
    file = next((folder / "step-00000004/model").glob("*.pt"))
    torch.save({"module": Bomb()}, file)
    state = read_checkpoint(folder / "step-00000002").state
    state["files"] = {}
    (folder / "step-00000004/state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="could not be read"):
        run_step(1, [*arguments, "--resume", folder / "step-00000004"])
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint and a half."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", folder]
    if os.geteuid() != 0 or run_command(command)[0] != 0:
        pytest.skip("mounting a small file system takes the rights of root")
    yield folder
    run_command(["umount", "-l", folder])  # this process holds the lock of its checkpoints


def test_a_full_disk_is_told_and_the_checkpoint_before_stays_whole(run_step, start, small_disk, tmp_path):
    saving = ["--checkpoint_steps", 2, "--checkpoint_dir", small_disk, "--output_dir", tmp_path / "out"]
    with pytest.raises(
        UserError, match=r"step 4 could not be written to .* MiB are free: .*; the last checkpoint is .*step-00000002"
    ):
        run_step(1, [*start(1), *saving])
    assert newest_checkpoint(small_disk).state["steps"] == 2
    assert not list(small_disk.glob(".step*"))


def test_an_unwritable_folder_of_checkpoints_is_told_at_the_start(run_step, start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--checkpoint_dir .*: cannot be written"):
        run_step(1, [*start(1), "--checkpoint_dir", tmp_path / "file/below"])


@pytest.mark.parametrize("flag", [["--checkpoint_steps", 2], ["--resume", "auto"]])
def test_checkpoints_need_a_folder(run_step, start, flag):
    with pytest.raises(UserError, match=f"{flag[0]}.* needs a folder"):
        run_step(1, [*start(1), *flag])


# ---------------------------------------------------------------- SIGTERM


def test_sigterm_finishes_the_step_saves_and_ends_well(run_step, start, tmp_path, monkeypatch):
    from utils.checkpoint import Checkpoints

    run_step(1, [*start(1), "--output_dir", tmp_path / "plain"])
    end_step, arguments = Checkpoints.end_step, [*start(1), "--output_dir", tmp_path / "resumed"]
    arguments += ["--checkpoint_dir", tmp_path / "resumed/checkpoints"]

    def signalled(self, *position):
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        end_step(self, *position)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "end_step", signalled)
        with pytest.raises(EndOfRun, match=r"stopped by SIGTERM after 3 steps; .*step-00000003.*--resume auto"):
            run_step(1, arguments)
    run_step(1, [*arguments, "--resume", "auto"])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")
