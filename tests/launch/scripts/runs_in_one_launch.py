"""Runs several steps' main() one after another in one launch, for tests: torchrun … runs_in_one_launch.py RUNS.json

RUNS.json is a list of [step, arguments] or [step, arguments, optimizer steps after which the run is killed]. Starting
Python and joining the ranks is most of what a tiny run costs. helpers.run_in_one_launch writes the file and starts it.
"""

import json
import sys
from pathlib import Path

from helpers import STEPS, killed_after, load_main

from utils.process.launch import run_main


def run(step: int, arguments: list[str], killed: int | None = None) -> None:
    main = load_main(step).main
    sys.argv = [str(STEPS[step]), *arguments]
    with killed_after(killed):
        main()


if __name__ == "__main__":
    run_main(lambda: [run(*one) for one in json.loads(Path(sys.argv[-1]).read_text())])
