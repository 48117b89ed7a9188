#!/usr/bin/env python
"""The figures of a finished run of the three steps in one table, from their metrics.jsonl.

python evaluation_scripts/run_report.py --output_dir output/real_model
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.process.errors import UserError, run_script
from utils.run.metrics_file import METRICS_FILE, read_rows

# Of the rows of step 3: what is shown, and in which unit.
PPO_FIGURES = (
    ("score", "reward score", ""),
    ("kl", "KL to the SFT model", "nats per answer"),
    ("answer_length", "length of an answer", "tokens"),
    ("eos_rate", "answers that end", "share"),
)


def rows_of(output: Path, step: str, prefix: str) -> list[dict]:
    try:
        rows = read_rows(output / step, prefix)
    except OSError as error:
        raise UserError(f"{output / step} holds no readable {METRICS_FILE}: {error.strerror}") from error
    if not rows:
        raise UserError(f"{output / step / METRICS_FILE} holds no {prefix} rows yet")
    return rows


def ends(evaluations: list[dict]) -> tuple[dict, dict]:
    """The first and the last; one alone is of the model before training, and there is nothing to set beside it yet."""
    first, last = evaluations[0], evaluations[-1]
    return first, dict.fromkeys(last, math.nan) if len(evaluations) == 1 else last


def mean(rows: list[dict], name: str) -> float:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) / len(values) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder with step1, step2 and step3 in it")
    parser.add_argument(
        "--window", type=int, default=5, help="PPO steps to average at the beginning and at the end (5)"
    )
    args = parser.parse_args()

    perplexity, reward = (rows_of(args.output_dir, step, "eval") for step in ("step1", "step2"))
    ppo = rows_of(args.output_dir, "step3", "train")
    window = max(1, min(args.window, len(ppo) // 2))
    first, last = ppo[:window], ppo[-window:]

    lines = [
        (
            "step 1: perplexity, held-out rows",
            *(row["perplexity"] or math.inf for row in ends(perplexity)),
            "",
        ),
        (
            f"step 2: accuracy, {reward[-1]['pairs']:.0f} held-out pairs",
            *(100 * row["accuracy"] for row in ends(reward)),
            "%",
        ),
    ]
    lines += [(f"step 3: {title}", mean(first, name), mean(last, name), unit) for name, title, unit in PPO_FIGURES]
    print(f"{'':40}{'before':>10}{'after':>10}")
    for title, before, after, unit in lines:
        print(f"{title:40}{before:10.2f}{after:10.2f}  {unit}".rstrip())
    print(f"\nstep 3: means of the first {window} and of the last {window} of its {len(ppo)} steps")


if __name__ == "__main__":
    run_script(main)
