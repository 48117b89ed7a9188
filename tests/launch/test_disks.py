"""Disks that are full or read-only: told in one line that names the place, and what was there stays whole."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import flags, launch

from utils.process.errors import UserError
from utils.run.checkpoint_files import complete_checkpoints, read_checkpoint


@pytest.fixture
def disk(tmp_path):
    """disk("1000k", read_only=False) -> a folder that is a file system of its own, of that size."""
    made = []

    def make(size: str, read_only: bool = False) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}{',ro' * read_only}", "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small file system takes the rights of root")
        made.append(folder)
        return folder

    yield make
    for folder in made:  # lazily: this process may hold the lock of checkpoints there
        subprocess.run(["umount", "-l", folder], check=True)


FULL = r"step 4 could not be written to .*, where \d+\.\d MiB are free: .*; the last checkpoint is .*step-00000002"


def test_a_full_disk_is_told_and_the_checkpoint_before_stays_whole(run_step, start, disk, tmp_path):
    folder = disk("1000k")
    with pytest.raises(UserError, match=FULL):
        run_step(1, [*start(1), *flags("--checkpoint_steps 2", checkpoint_dir=folder, output_dir=tmp_path / "out")])
    assert [found.state["steps"] for found in complete_checkpoints(folder)] == [2]
    assert not list(folder.glob(".step*"))


@pytest.mark.parametrize(
    "step, size, more",
    [(2, "900k", "--zero_stage 2"), (3, "1500k", "--actor_zero_stage 3 --enable_ema --async_checkpoint")],
)
def test_two_ranks_end_with_one_message_when_the_disk_is_full(start, disk, tmp_path, step, size, more):
    folder = disk(size)
    saving = flags(f"{more} --checkpoint_steps 2", checkpoint_dir=folder, output_dir=tmp_path / "out")
    code, console = launch(step, [*start(step), *saving], "torchrun", ranks=2)
    assert code != 0 and re.search(f"error: the checkpoint of {FULL}", console), console
    assert console.count("error: ") == 1
    assert [found.state["steps"] for found in complete_checkpoints(folder)] == [2]
    assert read_checkpoint(folder / "step-00000002") and not list(folder.glob(".step*"))


def test_no_room_for_the_model_leaves_the_checkpoint_and_no_half_of_it(run_step, start, disk, tmp_path):
    output = disk("120k")
    text = "--checkpoint_steps 8"
    arguments = [*start(1), *flags(text, output_dir=output, checkpoint_dir=tmp_path / "checkpoints")]
    with pytest.raises(UserError, match=r"could not save the model to .*: .*No space left on device"):
        run_step(1, arguments)
    assert {file.name for file in output.iterdir()} == {"metrics.jsonl", "run_config.yaml"}
    # The training is not lost: with room the model is saved by the next start.
    run_step(1, [*arguments, *flags("--resume auto", output_dir=tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere/model.safetensors").exists()


def test_no_room_for_the_metrics_is_told(run_step, start, disk):
    with pytest.raises(UserError, match=r"the metrics could not be written \(.*metrics\.jsonl\): .*No space left"):
        run_step(1, [*start(1), "--output_dir", disk("4k")])


def test_no_room_for_the_prepared_data_ends_all_ranks_with_the_place(start, disk, tmp_path):
    cache = disk("16k")
    arguments = [*start(1), *flags(output_dir=tmp_path / "out", data_output_path=cache)]
    code, console = launch(1, arguments, "torchrun", ranks=2)
    assert code != 0
    assert re.search(rf"error: {cache}/\S* could not be written: No space left .*0\.0 MiB are free", console), console
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writing thread
@pytest.mark.parametrize(
    "flag", ["--output_dir", "--checkpoint_dir", "--data_output_path", "--tensorboard_path"], ids=lambda flag: flag[2:]
)
def test_a_read_only_disk_is_refused_by_its_flag_before_any_work(run_step, start, disk, tmp_path, flag, capsys):
    places = dict(output_dir=tmp_path / "out", tensorboard_path=tmp_path / "tb")
    arguments = [*start(1), *flags("--report_to tensorboard --checkpoint_steps 2", **places)]
    with pytest.raises(UserError, match=f"{flag} .*: cannot be written: Read-only file system"):
        run_step(1, [*arguments, flag, disk("100k", read_only=True)])
    assert "Running training" not in capsys.readouterr().out


def test_checkpoints_on_a_read_only_disk_can_be_read(run_step, start, disk, tmp_path):
    """--resume PATH takes a checkpoint from anywhere; the new ones go to the run's own folder."""
    arguments = [*start(1), *flags("--num_train_epochs 1 --checkpoint_steps 4")]
    run_step(1, [*arguments, "--output_dir", tmp_path / "first"])
    folder = disk("2000k")
    subprocess.run(["cp", "-r", tmp_path / "first/checkpoints/step-00000004", folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    run_step(1, [*arguments, "--output_dir", tmp_path / "second", "--resume", folder / "step-00000004"])
    files = [tmp_path / name / "model.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
