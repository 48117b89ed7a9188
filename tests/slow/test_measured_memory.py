"""The estimate of --dry_run, with its margin, against the peak of a run."""

import json
import sys

from helpers import PROJECT, run_command


def test_the_estimate_is_within_a_quarter_of_what_a_run_takes(tmp_path):
    benchmark = PROJECT / "evaluation_scripts/benchmark/memory.py"
    code, console = run_command([sys.executable, benchmark, "--work", tmp_path, "--step", "1", "--cases", "0"])
    assert code == 0, console
    [row] = json.loads((tmp_path / "results.json").read_text()).values()
    assert 0.75 < row["estimated"] / row["measured"] < 1.25
