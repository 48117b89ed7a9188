"""Checkpoints: a run that is killed and resumed gives bit for bit what an undisturbed one gives; nothing half-written,
of another run or of a stranger is taken up."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import (
    PYTHONPATH,
    SCRIPTS,
    assert_same_run,
    flags,
    killed_after,
    launch_command,
    read_metrics,
    run_command,
    run_in_one_launch,
    step_arguments,
    surroundings,
    zero_stage,
)

from utils.process.errors import EndOfRun, UserError
from utils.run import checkpoint, checkpoint_files, same_run
from utils.run.checkpoint import Checkpoints
from utils.run.checkpoint_files import newest_checkpoint, read_checkpoint

STAGES = range(4)
EVERY_STAGE = {
    # name: (step, flags)
    **{f"step {step}, ZeRO-{stage}": (step, zero_stage(step, stage)) for step in (1, 2, 3) for stage in STAGES},
    **{f"step 3, ZeRO-{s}, hybrid engine": (3, f"{zero_stage(3, s)} --enable_hybrid_engine") for s in STAGES},
}
LORA = "--lora_dim 2 --only_optimize_lora --lora_dropout 0.1"
ON_ONE_RANK = EVERY_STAGE | {
    "sft, packing, accumulation": (1, "--zero_stage 1 --packing --gradient_accumulation_steps 2"),
    "sft, bf16": (1, "--zero_stage 2 --dtype bf16"),
    "sft, QLoRA": (1, f"--quantize nf4 {LORA}"),
    "sft, a soft prompt": (1, "--soft_prompt prompt_tuning --num_virtual_tokens 4"),
    "reward, LoRA alone": (2, LORA),
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
ON_TWO_RANKS = EVERY_STAGE | {
    "sft, LoRA alone at stage 3": (1, f"--zero_stage 3 {LORA}"),
    "reward, offload": (2, "--zero_stage 2 --offload"),
    "rlhf, EMA and ptx at stage 3": (
        3,
        "--actor_zero_stage 3 --critic_zero_stage 0 --enable_ema --enable_hybrid_engine "
        "--unsupervised_dataset_name TEXT --ppo_epochs 2",
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


@pytest.fixture(scope="module")
def two_ranks(small_models, tmp_path_factory, pairs_folder, cache_folder):
    """The folder of all ON_TWO_RANKS, made in one launch: each has ``plain`` and ``resumed``, killed after step 3."""
    folder, runs = tmp_path_factory.mktemp("two_ranks"), []
    for name, (step, text) in ON_TWO_RANKS.items():
        arguments = step_arguments(step, small_models, pairs_folder, cache_folder) + own_flags(text, small_models)
        arguments += flags("--num_train_epochs 1")
        saving = [*arguments, *flags("--checkpoint_steps 2", output_dir=folder / name / "resumed")]
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
    for more, message in (
        ("--learning_rate 0.1", r"--learning_rate is 0\.1, and was 0\.001"),
        ("--seed 5", "--seed is 5, and was 1234"),
        ("--zero_stage 1", "--zero_stage is 1, and was 0"),
    ):
        with pytest.raises(UserError, match=message):
            run_step(1, [*resuming, *flags(more)])
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        run_step(1, arguments)
    with monkeypatch.context() as patch:
        patch.setattr(same_run, "get_world_size", lambda: 2)
        with pytest.raises(UserError, match="written by 1 ranks and this run has 2"):
            run_step(1, resuming)
    state = read_checkpoint(folder / "step-00000004").state
    (folder / "step-00000004/state.json").write_text(json.dumps(state | {"rows": "others"}))
    with pytest.raises(UserError, match="its training rows were other ones"):
        run_step(1, resuming)


def test_a_checkpoint_of_an_earlier_version_is_taken_up(run_step, stopped, capsys):
    """Its flags hold three names that are no flags."""
    arguments, folder = stopped
    file = folder / "step-00000004/state.json"
    state = json.loads(file.read_text())
    state["flags"] |= {"checkpoint_dir_given": True, "end_of_conversation_token": "<|endoftext|>", "global_rank": 0}
    file.write_text(json.dumps(state))
    with killed_after(6):
        run_step(1, [*arguments, "--resume", "auto"])
    assert "4 steps are done" in capsys.readouterr().out


def test_checkpoints_of_another_run_are_never_replaced(run_step, stopped, tmp_path):
    arguments, folder = stopped
    copy = Path(shutil.copytree(folder / "step-00000002", tmp_path / "copy"))
    with pytest.raises(UserError, match=r"holds checkpoints already, and not .*copy"):
        run_step(1, [*arguments, "--resume", copy])
    assert [found.state["steps"] for found in checkpoint_files.complete_checkpoints(folder)] == [2, 4]
    # Back to an earlier one of its own is what was asked for.
    with killed_after(3):
        run_step(1, [*arguments, "--resume", folder / "step-00000002"])


def test_the_checkpoint_just_written_stays_whatever_the_clock_says(run_step, start, tmp_path, monkeypatch):
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(checkpoint.time, "time", lambda: float(next(hours)))
    with killed_after(6):
        run_step(1, [*start(1), "--output_dir", tmp_path, "--checkpoint_steps", 2, "--keep_checkpoints", 1])
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000006\n"
    assert [found.state["steps"] for found in checkpoint_files.complete_checkpoints(tmp_path / "checkpoints")] == [6]


def test_a_run_that_begins_anew_forgets_that_an_earlier_one_had_finished(run_step, start, tmp_path):
    arguments = [*start(1), "--output_dir", tmp_path, "--checkpoint_dir", tmp_path / "checkpoints"]
    run_step(1, arguments)
    assert (tmp_path / "checkpoints/finished.json").exists()
    with killed_after(2):
        run_step(1, arguments)
    run_step(1, [*arguments, "--resume", "auto"])  # and is not refused as done
    for text in ("{}", "[]", "x" * 100):
        (tmp_path / "checkpoints/finished.json").write_text(text)
        with killed_after(2):
            run_step(1, [*arguments, "--resume", "auto"])


def test_a_refused_start_leaves_the_metrics_of_the_run_alone(run_step, stopped):
    arguments, folder = stopped
    before = (folder.parent / "metrics.jsonl").read_text()
    state = read_checkpoint(folder / "step-00000004").state
    (folder / "step-00000004/state.json").write_text(json.dumps(state | {"rows": "others"}))
    with pytest.raises(UserError, match="other ones"):
        run_step(1, [*arguments, "--resume", "auto"])
    assert (folder.parent / "metrics.jsonl").read_text() == before


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
    assert [found.state["steps"] for found in checkpoint_files.complete_checkpoints(folder)] == [14, 16]
    with pytest.raises(EndOfRun, match="this run has finished after 16 steps"):
        run_step(1, [*arguments, "--resume", "auto"])


def test_an_unwritable_folder_of_checkpoints_is_told_at_the_start(run_step, start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--checkpoint_dir .*: cannot be written"):
        run_step(1, [*start(1), "--checkpoint_dir", tmp_path / "file/below"])


@pytest.mark.parametrize("flag", ["--checkpoint_steps 2", "--resume auto"])
def test_checkpoints_need_a_folder(run_step, start, flag):
    with pytest.raises(UserError, match=f"{flag.split()[0]}.* needs a folder"):
        run_step(1, [*start(1), *flags(flag)])


# ---------------------------------------------------------------- SIGTERM


def test_sigterm_finishes_the_step_saves_and_ends_well(run_step, start, tmp_path, monkeypatch):
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


def test_sigterm_ends_a_forked_worker_of_a_rank(run_step, start, tmp_path, monkeypatch):
    end_step, ends = Checkpoints.end_step, []

    def forking(self, *position):
        if self.steps == 0:
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
            worker.start()
            time.sleep(0.2)
            worker.terminate()
            worker.join()
            ends.append(worker.exitcode)
        end_step(self, *position)

    monkeypatch.setattr(Checkpoints, "end_step", forking)
    run_step(1, [*start(1), "--output_dir", tmp_path, "--checkpoint_dir", tmp_path / "checkpoints"])
    assert ends == [-signal.SIGTERM]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_sigterm_to_a_launcher_stops_and_saves_two_ranks_and_the_rest_is_done_by_the_next_start(
    start, tmp_path, launcher
):
    arguments = flags("--zero_stage 2 --checkpoint_steps 100 --resume auto", output_dir=tmp_path / "resumed")
    arguments = [*start(1), *arguments]
    command = launch_command(SCRIPTS / "patched_main.py", [1, *arguments], launcher, ranks=2)
    environment = surroundings(PATCH="slow_steps", PYTHONPATH=PYTHONPATH)
    metrics, log = tmp_path / "resumed/metrics.jsonl", tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:  # the first evaluation is one of them
            assert run.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        run.terminate()
        run.wait(60)
        while "stopped by SIGTERM after" not in log.read_text():  # deepspeed goes before its ranks
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
    finally:
        run.kill()
    assert "Traceback (most recent call last)" not in log.read_text().split("stopped by SIGTERM")[0], log.read_text()
    stopped = newest_checkpoint(tmp_path / "resumed/checkpoints").state["steps"]
    assert 2 <= stopped < 8
    console = run_in_one_launch([(1, [*arguments, "--output_dir", tmp_path / "plain"]), (1, arguments)], tmp_path)
    assert f"{stopped} steps are done" in console, console
    assert_same_run(tmp_path / "plain", tmp_path / "resumed")


def test_torchrun_starts_the_ranks_again_when_one_is_killed_and_they_go_on(start, tmp_path):
    """Elastic restart: the launcher stays, its processes begin anew with --resume auto."""
    arguments = [*start(1), *flags("--zero_stage 2 --checkpoint_steps 2 --resume auto", output_dir=tmp_path / "out")]
    torchrun, *command = launch_command(SCRIPTS / "patched_main.py", [1, *arguments], "torchrun", ranks=2)
    command, environment = [torchrun, "--max-restarts=1", *command], dict(PATCH="killed_once", PYTHONPATH=PYTHONPATH)
    code, console = run_command(command, **environment)
    assert code != 0 and console.count("error: torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 2
    code, console = run_command(command, **environment, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert code == 0, console
    assert "so this is a fresh start" in console and "step-00000002: 2 steps are done" in console
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == list(range(1, 9))
