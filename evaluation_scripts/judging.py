"""Scores of answers by a reward model or by functions of the user's own, and what they say about models.

A record is one prompt, answered by one model in one mode, as prompt_eval.py makes it; judging adds its "scores".
"""

import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from evaluation_scripts.intervals import bootstrap_interval, wilson_interval
from evaluation_scripts.prompts import Example
from evaluation_scripts.rw_eval import load_judge, record_of, score_records
from utils.data.conversation import Conversation, Texts, assistant
from utils.data.prompt_format import is_formatted
from utils.model.reward_functions import RewardFunction
from utils.process.errors import UserError

REWARD_MODEL = "reward_model"  # as a judge is called


def add_scores(records: list[dict], name: str, scores: list[float]) -> None:
    """Scores of all answers of all records, in their order, into the records: {"scores": {name: [a score each]}}."""
    scores = iter(scores)
    for record in records:
        record.setdefault("scores", {})[name] = [next(scores) for _ in record["answers"]]


def free_memory() -> None:
    """Give back what a model took that nobody holds any more: the next one needs the room."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def answered(prompt: Example, answer: str) -> Example:
    """A prompt with an answer to it; a text without the marks of turns becomes a question."""
    if isinstance(prompt, Texts) and is_formatted(prompt.prompt):
        blank = "" if prompt.prompt[-1].isspace() else " "
        return Texts(prompt.prompt, (f"{prompt.prompt}{blank}{answer}",), (answer,))
    conversation = prompt if isinstance(prompt, Conversation) else prompt.as_conversation()
    return replace(conversation, answers=([assistant(answer)],))


def judge_by_reward_model(
    records: list[dict], prompts: Sequence[Example], path: str, args, name: str = REWARD_MODEL
) -> None:
    """Score every answer with a reward model, which is loaded here, asked in its own format and let go again.

    One that was cut off is scored at its last token, without the end that it did not come to, as step 3 does it.

    Args:
        prompts: those of the records, by prompt_number.
        name: under which the scores go.
    """
    judge = load_judge(path, args)
    print(f"{path} judges in {judge.asked.reason}", file=sys.stderr, flush=True)
    pairs = [
        (record["prompt_number"], answer, ended)
        for record in records
        for answer, ended in zip(record["answers"], record["ended"], strict=True)
    ]
    # Each text once: models that say the same must tie, which rounding in different batches would not let them.
    distinct = list(dict.fromkeys(pairs))
    to_score = [
        record_of(answered(prompts[number], answer), f"prompt {number + 1}", (ended,))
        for number, answer, ended in distinct
    ]
    longest = judge.max_positions or 1 << 20
    scored, scores = score_records(judge, to_score, longest, args.batch_size, args.allow_special_tokens)
    if len(scored) < len(to_score):
        raise UserError(f"{path} cannot judge all prompts: see above; name another --prompt_format, or other prompts")
    score_of = {pair: score for pair, (score,) in zip(distinct, scores, strict=True)}
    add_scores(records, name, [score_of[pair] for pair in pairs])
    del judge
    free_memory()


def judge_by_function(records: list[dict], function: RewardFunction, rows: list[dict]) -> None:
    """Score every answer with a function of the user's own; prompts as the model was asked.

    Args:
        rows: of the file of prompts; their fields are the columns that the function may ask for.
    """
    prompts = [record["formatted_prompt"] for record in records for _ in record["answers"]]
    answers = [answer for record in records for answer in record["answers"]]
    columns = [rows[record["prompt_number"]] for record in records for _ in record["answers"]]
    ended = [end for record in records for end in record["ended"]]
    add_scores(records, function.name, function(prompts, answers, columns, ended))


@dataclass
class Comparison:
    """What a judge finds of one model in one mode; against the baseline's answers to the same prompts in that mode.

    Attributes:
        mean: of the scores of all prompts; of several answers to a prompt their mean counts. NaN for a prompt whose
            answers have no finite score: it counts nowhere but in ``left_out``.
        better, ties, worse: prompts at which the model scores higher than, as high as, lower than the baseline.
        win_rate: (better + ties / 2) / prompts, with its Wilson interval.
        difference: mean of the score differences, with its interval by a bootstrap over prompts.
        left_out: prompts that this model or the baseline has no score of.
    """

    judge: str
    mode: str
    title: str
    mean: float
    better: int | None = None
    ties: int | None = None
    worse: int | None = None
    win_rate: float | None = None
    win_rate_interval: tuple[float, float] | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    left_out: int = 0


def compare(judge: str, mode: str, title: str, scores: list[float], baseline: list[float] | None) -> Comparison:
    """A comparison of the scores of each prompt; ``baseline`` None for the baseline itself."""
    if baseline is None:
        left_out = sum(not math.isfinite(score) for score in scores)
        return Comparison(judge, mode, title, mean_of(scores), left_out=left_out)
    both = [pair for pair in zip(scores, baseline, strict=True) if all(map(math.isfinite, pair))]
    left_out = len(scores) - len(both)
    if not both:
        return Comparison(judge, mode, title, math.nan, left_out=left_out)
    scores, differences = [ours for ours, _ in both], [ours - theirs for ours, theirs in both]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    ties, total = len(differences) - better - worse, len(differences)
    wins = better + ties / 2
    return Comparison(
        *(judge, mode, title, fmean(scores), better, ties, worse),
        *(wins / total, wilson_interval(wins, total), fmean(differences), bootstrap_interval(differences)),
        left_out,
    )


def mean_of(scores: Sequence[float]) -> float:
    """Of the finite ones; NaN where there are none."""
    known = [score for score in scores if math.isfinite(score)]
    return fmean(known) if known else math.nan


def comparisons(records: list[dict]) -> list[Comparison]:
    """For each judge and mode the models in their order, the first being the baseline."""
    scores = {}  # judge, mode -> title -> mean score of each prompt
    for record in sorted(records, key=lambda record: record["prompt_number"]):
        for judge, values in record.get("scores", {}).items():
            scores.setdefault((judge, record["mode"]), {}).setdefault(record["title"], []).append(mean_of(values))
    found = []
    for (judge, mode), of_models in scores.items():
        baseline = next(iter(of_models.values()))
        for number, (title, values) in enumerate(of_models.items()):
            found.append(compare(judge, mode, title, values, baseline if number else None))
    return found


INTERVALS = "win rate: ties count half, 95 % interval by Wilson; difference: 95 % interval by a bootstrap over prompts"
COLUMNS = ("judge", "mode", "model", "mean", "better/tie/worse", "win rate", "difference")


def cells(one: Comparison) -> list[str]:
    """A comparison as text, by COLUMNS."""
    start = [one.judge, one.mode, one.title, f"{one.mean:.3f}"]
    if one.win_rate is None:
        return [*start, "", "", ""]
    low, high = one.win_rate_interval
    lowest, highest = one.difference_interval
    return [
        *start,
        f"{one.better}/{one.ties}/{one.worse}",
        f"{one.win_rate:.1%} ({low:.1%} to {high:.1%})",
        f"{one.difference:+.3f} ({lowest:+.3f} to {highest:+.3f})",
    ]


def comparison_table(found: list[Comparison]) -> str:
    """The comparisons as a table of text."""
    rows = [list(COLUMNS), *map(cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left_out = [
        f"{one.title}, {one.mode}: {one.left_out} prompts without a finite score by {one.judge} are left out"
        for one in found
        if one.left_out
    ]
    return "\n".join([*lines, *left_out, INTERVALS])
