#!/usr/bin/env python
"""One table of a sweep: how fast each combination of training_scripts/sweep.sh trained, and which ones failed.

python evaluation_scripts/sweep_report.py output/sweep
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.process.errors import UserError, run_script
from utils.run.metrics_file import METRICS_FILE, read_rows


def last_error(log: Path) -> str:
    """The last line of a log that says what went wrong."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    errors = [line.strip() for line in lines if "error" in line.lower()]
    return (errors or ["no error line in training.log"])[-1][:100]


def row_of(folder: Path) -> dict:
    """What one combination did: {name, steps, seconds, tokens_per_second, result} or {name, failed}."""
    done, file = (folder / "done").exists(), folder / METRICS_FILE
    rows = [row for row in read_rows(folder, "train") if row.get("seconds")] if file.is_file() else []
    if not done or not rows:
        return {
            "name": folder.name,
            "failed": last_error(folder / "training.log") if not done else "no step was written",
        }
    timed = rows[1:] or rows  # the first one warms up
    result = "score" if "score" in rows[-1] else "loss"
    return {
        "name": folder.name,
        "steps": len(rows),
        "seconds": statistics.median(row["seconds"] for row in timed),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in timed),
        result: rows[-1][result],
    }


def table(rows: list[dict]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  steps  seconds a step  tokens/s  last loss or score"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['name']:{width}}  failed: {row['failed']}")
            continue
        result = row.get("loss", row.get("score"))
        lines.append(
            f"{row['name']:{width}}  {row['steps']:5}  {row['seconds']:14.3f}  {row['tokens_per_second']:8.0f}  "
            f"{'none' if result is None else f'{result:.4f}':>18}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="folder of the sweep, a folder per combination in it")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures; None for none")
    args = parser.parse_args()
    folders = sorted(path.parent for path in args.output_dir.glob("*/training.log"))
    if not folders:
        raise UserError(f"{args.output_dir} holds no folder with a training.log")
    rows = [row_of(folder) for folder in folders]
    print(table(rows))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
