#!/usr/bin/env python
"""One table of a study: what the exact judge said of every run of training_scripts/study.sh.

python evaluation_scripts/study_report.py output/study
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.process.errors import UserError, run_script

RATES = ("manner", "right", "ended")
MANNER, KL_LIMIT = 0.95, 10.0  # what each run is to reach, and nats per answer it is to stay within


def judgement(summary: dict) -> dict:
    """The rates before and after step 3, and whether it did what it is for."""
    sft, rlhf = summary["models"]["SFT"], summary["models"]["RLHF"]
    row = {f"{name}_before": sft[name] for name in RATES}
    row |= {name: rlhf[name] for name in (*RATES, "kl")}
    missed = []
    if not rlhf["manner"] >= MANNER:  # nor is what is not a number
        missed.append("manner")
    low, high = rlhf["right_change"]
    if not high >= 0:
        missed.append("right")
    if not rlhf["kl"] <= KL_LIMIT:
        missed.append("KL")
    return row | {"right_low": low, "right_high": high, "missed": missed}


def table(runs: dict[str, dict[str, dict]]) -> str:
    """``runs``: variant -> seed -> judgement."""
    width = max(len(name) for name in runs) + 2
    lines = [f"{'':{width}}{'seed':>6}{'manner':>18}{'right':>18}{'ended':>18}{'KL':>8}{'right, change':>18}"]
    for name, seeds in runs.items():
        for seed, row in seeds.items():
            rates = "".join(f"{100 * row[f'{name}_before']:7.1f} -> {100 * row[name]:5.1f} %" for name in RATES)
            missed = f"   not reached: {', '.join(row['missed'])}" if row["missed"] else ""
            change = f"{100 * row['right_low']:+9.1f} to {100 * row['right_high']:+5.1f}"
            lines.append(f"{name:{width}}{seed:>6}{rates}{row['kl']:8.2f}{change}{missed}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="folder of the study, a folder per run in it")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures; None for none")
    args = parser.parse_args()
    runs = defaultdict(dict)
    for file in sorted(args.output_dir.glob("*/summary.json"), key=lambda file: file.parent.stat().st_ctime):
        match = re.fullmatch(r"(.+)_(\d+)", file.parent.name)
        if match is None:
            print(f"{file.parent} is no run of the study (NAME_SEED): left out")
            continue
        name, seed = match.groups()
        runs["as in the quickstart" if name == "seed" else name][seed] = judgement(json.loads(file.read_text()))
    if not runs:
        raise UserError(f"{args.output_dir} holds no folder NAME_SEED with a summary.json")
    print(table(runs))
    print("\nbefore: the SFT model, after: the actor of step 3; KL in nats per answer, from the SFT model;")
    print("change in points, 95 % interval over prompts. Not reached: below 95 % manner, less right, KL above 10")
    if args.output:
        args.output.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
