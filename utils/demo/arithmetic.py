"""Sums in two steps as rows of GSM8K's form, and what rewards their answers: whether the final number is right.

    python -m utils.demo.arithmetic --output DIR [--rows 12000] [--mistakes 0.4] [--seed 1234]

{"question": "I had 3 apples, got 5 more and then ate 6. How many are left?", "answer": "3+5=8. 8-6=2. #### 2"}

DIR/taught holds the rows of step 1, whose writers are people: in a share of them one step is a little off. A model that
imitates them errs as often as they do. DIR/asked holds those of step 3 and of evaluations, whose answers are right.

As a file of reward functions: ``--reward_function utils/demo/arithmetic.py:exact``; ``working`` is for reading alone.
GSM8K, Cobbe et al. 2021, https://arxiv.org/abs/2110.14168, whose answers end with "#### " and the number.
"""

import argparse
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.process.files import write_jsonl

SIZES = {"train": 12_000, "eval": 200}
LARGEST = 10  # no number on the way is larger, none is below 0
HELD_OUT = 10  # one question of so many is asked in evaluations alone
# Signs of the two steps -> how they are asked.
FORMS = {
    "++": (
        "I had {a} apples, got {b} more and then {c} more. How many are there?",
        "Add {a}, {b} and {c}.",
        "What is {a} plus {b} plus {c}?",
    ),
    "+-": (
        "I had {a} apples, got {b} more and then ate {c}. How many are left?",
        "Add {a} and {b}, then take away {c}.",
        "What is {a} plus {b} minus {c}?",
    ),
    "-+": (
        "I had {a} apples, ate {b} and then got {c} more. How many are there?",
        "Start at {a}, take away {b}, then add {c}.",
        "What is {a} minus {b} plus {c}?",
    ),
    "--": (
        "I had {a} apples, ate {b} and then {c} more. How many are left?",
        "Start at {a}, take away {b} and then {c}.",
        "What is {a} minus {b} minus {c}?",
    ),
}
FINAL = re.compile(r"####\s*(-?\d[\d,]*(?:\.\d+)?)")
EQUATION = re.compile(r"(\d+)\s*([+-])\s*(\d+)\s*=\s*(\d+)")


def step(number: int, sign: str, other: int) -> int:
    return number + other if sign == "+" else number - other


def arithmetic_rows(
    split: str, size: int | None = None, seed: int = 1234, mistakes: float = 0.0
) -> list[dict[str, str]]:
    """``size`` rows {question, answer} (SIZES if None). No question of eval is ever one of train, whatever the seed.

    Args:
        mistakes: share of the rows in whose answer one of the two results is off.

    Raises:
        KeyError: an unknown split.
    """
    size = SIZES[split] if size is None else size
    rng = random.Random(f"arithmetic, {split}, {seed}, {mistakes}")
    rows = []
    for question, numbers, signs in _questions(rng):
        if len(rows) == size:
            return rows
        if (zlib.crc32(question.encode()) % HELD_OUT == 0) == (split == "eval"):
            wrong = rng.choice((1, 2)) if rng.random() < mistakes else None
            rows.append({"question": question, "answer": _answer(numbers, signs, wrong, rng)})


def _questions(rng: random.Random) -> Iterator[tuple[str, tuple[int, int, int], str]]:
    """Questions without end, with their three numbers and two signs."""
    while True:
        signs = rng.choice(list(FORMS))
        a, b, c = rng.randint(2, LARGEST), rng.randint(1, 9), rng.randint(1, 9)
        between = step(a, signs[0], b)
        if 0 <= between <= LARGEST and 0 <= step(between, signs[1], c) <= LARGEST:
            yield rng.choice(FORMS[signs]).format(a=a, b=b, c=c), (a, b, c), signs


def _answer(numbers: tuple[int, int, int], signs: str, wrong: int | None, rng: random.Random) -> str:
    """The working and the final number. ``wrong``: the step whose result is off by 1 or 2, which the rest goes on from;
    None for none."""
    a, b, c = numbers
    while True:
        off = rng.choice((-2, -1, 1, 2))
        between = step(a, signs[0], b) + off * (wrong == 1)
        final = step(between, signs[1], c) + off * (wrong == 2)
        if between >= 0 and final >= 0:
            return f"{a}{signs[0]}{b}={between}. {between}{signs[1]}{c}={final}. #### {final}"


def final_number(text: str) -> float | None:
    """The number behind the last ####, as GSM8K is read; None where there is none."""
    found = FINAL.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 where an answer's final number is that of the row's, else 0. Works on GSM8K's own rows too."""
    pairs = zip(completions, answer, strict=True)
    return [
        float(final_number(said) is not None and final_number(said) == final_number(right)) for said, right in pairs
    ]


def working(completions: Sequence[str]) -> list[float]:
    """1 where an answer shows equations and each of them is true, whatever was asked."""
    shown = [EQUATION.findall(text) for text in completions]
    return [float(bool(found) and all(step(int(a), s, int(b)) == int(c) for a, s, b, c in found)) for found in shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for taught/ and asked/")
    parser.add_argument("--rows", type=int, default=SIZES["train"], help="rows of each train.jsonl")
    parser.add_argument("--mistakes", type=float, default=0.4, help="share of wrong answers in taught/")
    parser.add_argument("--seed", type=int, default=1234, help="of the rows")
    args = parser.parse_args()
    for folder, mistakes, seed in (("taught", args.mistakes, args.seed), ("asked", 0.0, args.seed)):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
        for split in SIZES:
            rows = arithmetic_rows(split, args.rows if split == "train" else None, seed, mistakes)
            write_jsonl(args.output / folder / f"{split}.jsonl", rows)
    print(f"wrote {args.rows} and {SIZES['eval']} sums to {args.output}/taught, as many to {args.output}/asked")


if __name__ == "__main__":
    main()
