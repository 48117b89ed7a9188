"""Runs several steps' main() one after another in one launch, for tests: torchrun … runs_in_one_launch.py RUNS.json

RUNS.json is a list of [step, arguments] or [step, arguments, steps after which the run is killed, so to say]. Starting
Python and joining the ranks is most of what a tiny run costs.
"""

import importlib.util
import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "tests"))

from conftest import STEPS, killed_after

from utils.process.launch import run_main


def run(step: int, arguments: list[str], killed: int | None = None) -> None:
    spec = importlib.util.spec_from_file_location(f"step{step}_main", STEPS[step])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [str(STEPS[step]), *arguments]
    with killed_after(killed):
        module.main()


if __name__ == "__main__":
    run_main(lambda: [run(*one) for one in json.loads(Path(sys.argv[1]).read_text())])
