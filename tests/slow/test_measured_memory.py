"""The estimate of --dry_run, with its margin, against the peak of a run."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "evaluation_scripts/benchmark/memory.py"


def test_the_estimate_is_within_a_quarter_of_what_a_run_takes(tmp_path):
    subprocess.run([sys.executable, BENCHMARK, "--work", tmp_path, "--step", "1", "--cases", "0"], check=True)
    [row] = json.loads((tmp_path / "results.json").read_text()).values()
    assert 0.75 < row["estimated"] / row["measured"] < 1.25
