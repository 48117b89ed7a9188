"""What --resume refuses, passes over and leaves alone, and how a run stops."""

import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_same_run, flags, killed_after, read_metrics
from safetensors.torch import load_file

from utils.process.errors import EndOfRun, UserError
from utils.run import checkpoint, checkpoint_files, same_run
from utils.run.checkpoint import Checkpoints
from utils.run.checkpoint_files import read_checkpoint
from utils.run.same_run import model_fingerprint, same_model


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
        ("--learning_rate 0.1", r"--learning_rate is 0\.1, and was 2e-05"),
        ("--seed 5", "--seed is 5, and was 1234"),
        ("--zero_stage 1 --seed 5", "--seed is 5, and was 1234"),
    ):
        with pytest.raises(UserError, match=message):
            run_step(1, [*resuming, *flags(more)])
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        run_step(1, [*arguments, "--overwrite_output_dir", "--checkpoint_dir", folder])
    with monkeypatch.context() as patch:
        patch.setattr(same_run, "get_world_size", lambda: 2)
        arithmetic = r"2 x 1 on 1 rank\(s\) = 2 rows, which --per_device_train_batch_size 2 on 2 .* does not divide"
        with pytest.raises(UserError, match=arithmetic + ".*; give --per_device_train_batch_size 1$"):
            run_step(1, resuming)
    state = read_checkpoint(folder / "step-00000004").state
    (folder / "step-00000004/state.json").write_text(json.dumps(state | {"rows": "others"}))
    with pytest.raises(UserError, match="its training rows were other ones"):
        run_step(1, resuming)


def test_a_checkpoint_of_an_earlier_version_is_taken_up(run_step, stopped, capsys):
    """Its flags hold three names that are no flags, and it knows nothing of evaluations."""
    arguments, folder = stopped
    file = folder / "step-00000004/state.json"
    state = json.loads(file.read_text())
    state["flags"] |= {"checkpoint_dir_given": True, "end_of_conversation_token": "<|endoftext|>", "global_rank": 0}
    ranks_own = file.with_name("rank00000.json")
    own_state = json.loads(ranks_own.read_text())
    del own_state["tracked"]["evaluations"]
    ranks_own.write_text(json.dumps(own_state))
    state["files"]["rank00000.json"] = ranks_own.stat().st_size
    file.write_text(json.dumps(state))
    with killed_after(6):
        run_step(1, [*arguments, "--resume", "auto"])
    assert "4 steps are done" in capsys.readouterr().out


def test_a_flag_that_an_earlier_version_did_not_have_keeps_nobody_from_going_on_where_it_changes_nothing():
    files = dict(deepspeed_config_overrides=None, data_config=None)
    now = dict(loss_mean="token", scale_group_rewards=True, drop_groups_without_spread=False, missing_eos_penalty=0.0)
    then = dict(missing_eos_penalty=None, **files)

    def changed(**flags):
        return same_run.changed_flags(SimpleNamespace(**now | flags, **files), {"flags": then}, set())

    assert changed() == []
    assert changed(loss_mean="answer") == ["--loss_mean is 'answer', and was 'token'"]
    assert changed(drop_groups_without_spread=True) == ["--drop_groups_without_spread is True, and was None"]
    assert changed(missing_eos_penalty=1.0) == ["--missing_eos_penalty is 1.0, and was None"]
    then["drop_groups_without_spread"] = True
    assert changed() == ["--drop_groups_without_spread is False, and was True"]


def test_checkpoints_of_another_run_are_never_replaced(run_step, stopped, tmp_path):
    arguments, folder = stopped
    copy = Path(shutil.copytree(folder / "step-00000002", tmp_path / "copy"))
    with pytest.raises(UserError, match=r"holds checkpoints already, and not .*copy"):
        run_step(1, [*arguments, "--resume", copy])
    assert [found.state["steps"] for found in checkpoint_files.complete_checkpoints(folder)] == [2, 4]
    # Back to an earlier one of its own is what was asked for.
    with killed_after(3):
        run_step(1, [*arguments, "--resume", folder / "step-00000002"])


def test_a_half_written_checkpoint_goes_though_a_dying_process_adds_to_it(tmp_path, monkeypatch):
    scratch, rmtree, late = tmp_path / ".step-00000003", shutil.rmtree, iter((True, False))

    def remove(folder, **options):
        if next(late):
            (folder / "rank00001.json").write_text("{}")  # behind the back of the removal, which fails for it
        else:
            rmtree(folder, **options)

    scratch.mkdir()
    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", remove)
    os.close(checkpoint_files.take_folder(tmp_path))
    assert not scratch.exists() and not list(late)
    scratch.mkdir()
    monkeypatch.setattr(checkpoint_files, "LOCK_SECONDS", 0)
    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", lambda folder, **options: None)
    with pytest.raises(UserError, match="step-00000003, which a killed run left half-written, cannot be removed"):
        checkpoint_files.take_folder(tmp_path)


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
        run_step(1, [*arguments, "--overwrite_output_dir"])
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


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(folder)}


def assert_follows(folder: Path, plain: Path, after: int, tolerance: float = 1e-4) -> None:
    """The losses of a resumed run from a step on, against those of an undisturbed one."""
    want, got = losses(plain), losses(folder)
    assert sorted(got) == [step for step in sorted(want) if step > after]
    assert max(abs(got[step] - want[step]) / want[step] for step in got) < tolerance


@pytest.mark.parametrize("lora", ["", "--lora_dim 2 --weight_decay 5"])
@pytest.mark.parametrize("stages", [(0, 3), (3, 2), (2, 0), (1, 3)])
def test_another_zero_stage_goes_on_from_the_same_numbers(run_step, start, tmp_path, stages, lora):
    """With groups of their own learning rates and weight decays, as LoRA has them."""
    common = [*start(1), *flags(f"--dropout 0 --learning_rate 1e-3 --checkpoint_steps 6 {lora}")]
    then, now = ([*common, "--zero_stage", stage] for stage in stages)
    run_step(1, [*then, "--output_dir", tmp_path / "plain", "--keep_checkpoints", 9])
    checkpoint = tmp_path / "plain/checkpoints/step-00000006"
    run_step(1, [*now, "--output_dir", tmp_path / "other", "--resume", checkpoint])
    assert_follows(tmp_path / "other", tmp_path / "plain", after=6)


def test_settings_that_are_allowed_to_change_do(run_step, start, tmp_path, capsys):
    rates = "--lr_scheduler_type cosine --num_warmup_steps 0 --learning_rate"
    arguments = [*start(1), *flags("--checkpoint_steps 4", output_dir=tmp_path)]
    with killed_after(5):
        run_step(1, [*arguments, *flags(f"{rates} 1e-3")])
    run_step(1, [*arguments, *flags(f"{rates} 5e-4 --resume auto --allow_changed learning_rate")])
    told = capsys.readouterr().out
    assert "--allow_changed: --learning_rate is 0.0005, and was 0.001" in told
    assert "the learning rate of the next is 0.000426777, and would have been 0.000853553" in told
    rate = next(row["train/lr"] for row in read_metrics(tmp_path) if row["step"] == 5)
    assert rate == pytest.approx(5e-4 * (1 + math.cos(math.pi * 4 / 16)) / 2)


@pytest.mark.parametrize("target", ["", "--kl_target 0.1 --kl_horizon 50"])
def test_another_kl_weight_is_taken_up_once(run_step, start, tmp_path, target):
    """And goes on from there, also where it adapts."""
    arguments = [*start(3), *flags("--checkpoint_steps 1 --kl_target 1e9 --kl_horizon 50", output_dir=tmp_path)]
    with killed_after(2):
        run_step(3, arguments)
    changed = flags(f"--kl_ctl 0.5 {target} --resume auto --allow_changed kl_ctl,kl_target,kl_horizon")
    for steps in (2, 2):
        with killed_after(steps + len(read_metrics(tmp_path))):
            run_step(3, [*arguments, *changed])
    weights = [row["train/kl_ctl"] for row in read_metrics(tmp_path)]
    assert len(weights) == 6 and weights[0] == 0.1 > weights[1]
    assert weights[2] == 0.5 and (weights[2:] == sorted(set(weights[2:]), reverse=weights[3] < 0.5))


def test_the_files_of_a_model_are_known_by_what_stands_all_over_them(tmp_path):
    """An adapter folded in changes the same weights of every layer, and neither the head of a file nor its end."""
    file, content = tmp_path / "model.safetensors", np.random.default_rng(0).bytes(12 * 2**20)
    file.write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    sampled, whole = model_fingerprint(tmp_path), model_fingerprint(tmp_path, whole=True)
    head, end = content[: 2**20], content[-(2**20) :]
    older = hashlib.sha256(f"{file.name} {len(content)} ".encode() + head + end).hexdigest()
    assert all(same_model(tmp_path, then) for then in (sampled, older))
    layers = bytearray(content)
    for layer in range(1, 11):
        layers[layer * 2**20 : layer * 2**20 + 2**19] = bytes(2**19)
    file.write_bytes(layers)
    assert not same_model(tmp_path, sampled)
    assert same_model(tmp_path, older), "all that an older checkpoint can tell"
    one = bytearray(content)
    one[6_000_000] ^= 1
    file.write_bytes(one)
    assert model_fingerprint(tmp_path, whole=True) != whole
    file.write_bytes(content)
    assert model_fingerprint(tmp_path, whole=True) == whole
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert model_fingerprint(tmp_path, whole=True) != whole and same_model(tmp_path, sampled)


def test_a_finished_run_is_made_longer(run_step, start, tmp_path, capsys):
    arguments = [*start(1), *flags("--checkpoint_steps 4 --num_train_epochs 1", output_dir=tmp_path)]
    run_step(1, arguments)
    with pytest.raises(EndOfRun, match="has finished after 8 steps"):
        run_step(1, [*arguments, *flags("--resume auto --allow_changed learning_rate")])
    with pytest.raises(UserError, match="--num_train_epochs is 2, and was 1"):
        run_step(1, [*arguments, *flags("--resume auto --num_train_epochs 2")])
    run_step(1, [*arguments, *flags("--resume auto --num_train_epochs 2 --allow_changed num_train_epochs")])
    assert "the run had finished after 1 epochs, and goes on" in capsys.readouterr().out
    assert list(losses(tmp_path)) == list(range(1, 17))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--resume auto --allow_changed seed", "the model, the rows or their order depend on it"),
        ("--resume auto --allow_changed learning_rat", "no flag --learning_rat; did you mean learning_rate"),
        ("--allow_changed learning_rate", "there is no --resume"),
        ("--resume auto --resume_weights_only", "needs the folder of a checkpoint"),
    ],
)
def test_flags_of_resuming_that_mean_nothing_are_refused(run_step, start, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run_step(1, [*start(1), *flags(more, output_dir=tmp_path)])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_of_its_own_from_the_weights_of_a_checkpoint(run_step, start, tmp_path, stage, capsys):
    """Other stage, batch, seed and rate: with a rate of nearly 0 it ends with the weights that it took."""
    run_step(1, [*start(1), *flags("--zero_stage 1 --checkpoint_steps 8", output_dir=tmp_path / "first")])
    other = flags(
        f"--zero_stage {stage} --seed 5 --per_device_train_batch_size 4 --learning_rate 1e-30 --checkpoint_steps 1 "
        "--resume_weights_only",
        resume=tmp_path / "first/checkpoints/step-00000016",
        output_dir=tmp_path / "second",
    )
    run_step(1, [*start(1), *other])
    assert "after 16 steps; all else begins anew" in capsys.readouterr().out
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert min(losses(tmp_path / "second")) == 1
    with pytest.raises(UserError, match=r"holds a model|holds checkpoints"):  # which it would replace
        run_step(1, [*start(1), *other])
    with pytest.raises(UserError, match=r"has no place|does not hold"):
        run_step(2, [*start(2), *other, "--overwrite_output_dir"])
