"""A short run of tests/slow/soak.py: kill -9 at random moments, and the end is that of an undisturbed run."""

import sys

from helpers import PROJECT, run_command


def test_a_run_that_is_killed_twice_ends_with_the_weights_and_losses_of_one_that_is_not(tmp_path):
    soak = [sys.executable, PROJECT / "tests/slow/soak.py", "--folder", tmp_path / "soak"]
    code, console = run_command([*soak, "--steps", 1, "--kills", 2, "--ranks", 1, "--launcher", "python"], timeout=400)
    assert code == 0, console
    assert "step 1: survived 2 of 2 kills" in console
