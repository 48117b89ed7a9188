"""Checkpoints: a run that is killed and resumed gives bit for bit what an undisturbed one gives; nothing half-written,
of another run or of a stranger is taken up."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, killed_after, make_model, read_metrics, run_command
from safetensors.torch import load_file

from utils import checkpoint
from utils.checkpoint import newest_checkpoint, read_checkpoint
from utils.distributed import EndOfRun, UserError

MEASURED = ("seconds", "time", "per_second", "latency", "tflops", "gb_per", "memory_gib")  # and so never equal
COMMON = ["--data_split", "1,1,1", "--dtype", "fp32", "--max_train_samples", 16, "--max_eval_samples", 8]
SUPERVISED = [*COMMON, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 4, "--max_seq_len", 48]
SUPERVISED += ["--num_train_epochs", 2, "--dropout", 0.1]
RLHF = [*COMMON, "--per_device_generation_batch_size", 2, "--per_device_training_batch_size", 1]
RLHF += ["--max_prompt_seq_len", 32, "--max_answer_seq_len", 8, "--num_warmup_steps", 0, "--sample_interval", 1]
RLHF += ["--actor_learning_rate", 1e-3, "--critic_learning_rate", 1e-3, "--actor_dropout", 0.1, "--kl_target", 0.1]
RLHF += ["--kl_horizon", 50]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the steps start from; and a file of plain text."""
    from types import SimpleNamespace

    from utils.model.model_utils import create_critic_model
    from utils.utils import load_hf_tokenizer, save_hf_format

    base = tmp_path_factory.mktemp("models")
    actor = make_model(base / "actor")
    tokenizer = load_hf_tokenizer(actor)
    torch.manual_seed(5)
    save_hf_format(create_critic_model(actor, tokenizer), tokenizer, SimpleNamespace(output_dir=str(base / "reward")))
    (base / "text.txt").write_text("".join(f"the house is {color}, thanks.\n" for color in ("red", "blue")) * 20)
    return base


@pytest.fixture
def start(models, pairs_folder, cache_folder):
    """step -> the arguments every run of it has."""

    def arguments(step: int) -> list:
        data = ["--data_path", pairs_folder, "--data_output_path", cache_folder]
        if step < 3:
            return [*data, *SUPERVISED, "--model_name_or_path", models / "actor"]
        paths = ["--actor_model_name_or_path", models / "actor", "--critic_model_name_or_path", models / "reward"]
        return [*data, *RLHF, *paths]

    return arguments


def _numbers(folder: Path) -> list[dict]:
    """The rows of a metrics file without what a clock or a memory meter said."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not any(m in name for m in MEASURED)} for row in rows]


def _same_run(plain: Path, resumed: Path) -> None:
    assert _numbers(plain) == _numbers(resumed)
    samples = [folder / "samples.jsonl" for folder in (plain, resumed)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text()
    files = sorted(file.relative_to(plain) for file in plain.rglob("*.safetensors"))
    assert files
    for file in files:
        want, got = load_file(plain / file), load_file(resumed / file)
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want), file
    configs = [json.loads((folder / files[0].parent / "config.json").read_text()) for folder in (plain, resumed)]
    assert configs[0] == configs[1]


CASES = {
    # name: (step, steps done when killed, flags); a checkpoint every two steps
    "sft, ZeRO-1, packing, accumulation": (1, 3, ["--zero_stage", 1, "--packing", "--gradient_accumulation_steps", 2]),
    "sft, ZeRO-2, bf16, mid-epoch": (1, 5, ["--zero_stage", 2, "--dtype", "bf16"]),
    "reward, ZeRO-0, LoRA alone": (2, 5, ["--lora_dim", 2, "--only_optimize_lora", "--lora_dropout", 0.1]),
    "rlhf, ZeRO-1, ptx, EMA": (
        3,
        3,
        [
            *("--actor_zero_stage", 1, "--critic_zero_stage", 1, "--enable_ema", "--unsupervised_dataset_name", "TEXT"),
            *("--per_device_generation_batch_size", 4, "--num_train_epochs", 2),
        ],
    ),
    "rlhf, rloo, LoRA alone, EMA": (
        3,
        3,
        [
            *("--advantage_estimator", "rloo", "--num_generations_per_prompt", 2, "--actor_lora_dim", 2),
            *("--enable_ema", "--only_optimize_lora", "--enable_hybrid_engine"),
        ],
    ),
}


def _resolved(flags, models):
    return [models / "text.txt" if flag == "TEXT" else flag for flag in flags]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_and_resumed_run_is_bit_equal_to_an_undisturbed_one(run_step, start, models, tmp_path, case, capsys):
    step, steps, flags = CASES[case]
    arguments = [*start(step), *_resolved(flags, models)]
    run_step(step, [*arguments, "--output_dir", tmp_path / "plain"])
    saving = [*arguments, "--output_dir", tmp_path / "resumed", "--checkpoint_steps", 2]
    with killed_after(steps):
        run_step(step, saving)
    assert f"step-{steps // 2 * 2:08d}" == newest_checkpoint(tmp_path / "resumed/checkpoints").folder.name
    run_step(step, [*saving, "--resume", "auto"])
    assert f"{steps // 2 * 2} steps are done" in capsys.readouterr().out
    _same_run(tmp_path / "plain", tmp_path / "resumed")


ON_TWO_RANKS = {
    "sft": (1, ["--zero_stage", 3, "--lora_dim", 2, "--only_optimize_lora"]),
    "reward": (2, ["--zero_stage", 2, "--offload"]),
    "rlhf": (
        3,
        [
            *("--actor_zero_stage", 3, "--critic_zero_stage", 0, "--enable_ema", "--enable_hybrid_engine"),
            *("--unsupervised_dataset_name", "TEXT", "--ppo_epochs", 2),
        ],
    ),
}


def test_on_two_ranks_too(start, models, tmp_path):
    runs = []
    for name, (step, flags) in ON_TWO_RANKS.items():
        arguments = [*start(step), *_resolved(flags, models), "--num_train_epochs", 1]
        saving = [*arguments, "--output_dir", tmp_path / name / "resumed", "--checkpoint_steps", 2]
        runs += [
            [step, [*arguments, "--output_dir", tmp_path / name / "plain"]],
            [step, saving, 3],  # of 4
            [step, [*saving, "--resume", "auto"]],
        ]
    runs = [[step, [str(argument) for argument in arguments], *killed] for step, arguments, *killed in runs]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node=2"]
    code, console = run_command([*torchrun, PROJECT / "tests/runs_in_one_launch.py", tmp_path / "runs.json"])
    assert code == 0, console
    assert console.count("2 steps are done") == len(ON_TWO_RANKS)
    for name in ON_TWO_RANKS:
        _same_run(tmp_path / name / "plain", tmp_path / name / "resumed")


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


# ---------------------------------------------------------------- losses that are no numbers


def _break_losses(monkeypatch, run_step, steps):
    """Let the loss of step 1 be NaN in these micro-batches."""
    from utils.model import losses

    calls, original = [], losses.causal_lm_loss_sum

    def broken(scorer, *inputs):
        loss = original(scorer, *inputs)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) - 1 in steps:
                return loss * float("nan")
        return loss

    monkeypatch.setattr(losses, "causal_lm_loss_sum", broken)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_whose_loss_is_no_number_are_left_out_at_every_zero_stage(run_step, start, tmp_path, monkeypatch, stage):
    _break_losses(monkeypatch, run_step, (3,))
    flags = ["--num_train_epochs", 1, "--zero_stage", stage, "--lr_scheduler_type", "constant", "--dropout", 0]
    run_step(1, [*start(1), *flags, "--skip_nonfinite", 1, "--output_dir", tmp_path])
    rows = read_metrics(tmp_path)
    assert [row["train/skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert rows[3]["train/loss"] is None
    assert all(0 < row["train/loss"] < 7 for row in rows if row is not rows[3])
    assert all(value.isfinite().all() for value in load_file(tmp_path / "model.safetensors").values())


def test_a_loss_that_is_no_number_stops_the_run_with_step_rows_and_last_checkpoint(
    run_step, start, tmp_path, monkeypatch
):
    from utils.data.batching import StepBatchSampler

    _break_losses(monkeypatch, run_step, (3, 5))
    with pytest.raises(UserError) as stop:
        run_step(1, [*start(1), "--output_dir", tmp_path, "--checkpoint_steps", 2, "--skip_nonfinite", 1])
    found = re.search(r"the loss is nan in epoch 0, step 5 \(training rows ([\d, ]+)\).*step-00000004", str(stop.value))
    assert found, stop.value
    assert len(found[1].split(",")) == 2 == StepBatchSampler([1] * 16, 2).rows_per_step
    assert newest_checkpoint(tmp_path / "checkpoints").state["steps"] == 4


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
    _same_run(tmp_path / "plain", tmp_path / "resumed")
