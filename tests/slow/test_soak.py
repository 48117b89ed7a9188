"""A short run of tests/slow/soak.py: kill -9 at random moments, and the end is that of an undisturbed run."""

import sys

import pytest
from helpers import PROJECT, run_command


def test_a_run_that_is_killed_twice_ends_with_the_weights_and_losses_of_one_that_is_not(tmp_path):
    soak = [sys.executable, PROJECT / "tests/slow/soak.py", "--folder", tmp_path / "soak"]
    code, console = run_command([*soak, "--steps", 1, "--kills", 2, "--ranks", 1, "--launcher", "python"], timeout=400)
    assert code == 0, console
    assert "step 1: survived 2 of 2 kills" in console


@pytest.mark.nightly
def test_a_run_that_goes_on_with_other_ranks_after_each_kill_ends_with_its_losses(tmp_path):
    soak = [sys.executable, PROJECT / "tests/slow/soak.py", "--folder", tmp_path / "soak", "--launcher", "torchrun"]
    code, console = run_command([*soak, "--steps", 1, "--kills", 3, "--change_ranks"], timeout=600)
    assert code == 0, console
    assert "step 1: survived 3 of 3 kills" in console
