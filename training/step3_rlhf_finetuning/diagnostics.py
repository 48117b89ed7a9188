"""What goes wrong in a run of step 3, seen from its figures while it goes on: each thing once, with its flag."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

WINDOW = 5  # steps whose answers are looked at together; the first so many are those of (nearly) the model at the start
EOS_DROP = 0.1  # share of answers; less is not worth a line
STANDARD_ERRORS = 3.0  # a change must be larger than chance makes it, which is asked anew at each step
# Nats per answer. The best of N answers lies log N - (N - 1) / N nats from the policy that wrote them (Stiennon et al.
# 2020, https://arxiv.org/abs/2009.01325, appendix G.3): 10 nats are the best of 60,000, finer than a reward model that
# learned from pairs can tell apart.
HIGH_KL = 10.0
AT_LIMIT = 0.5  # share of answers cut at --max_answer_seq_len from which on a higher score is doubtful


@dataclass(frozen=True)
class Answers:
    """The answers of a step, or of several together; means over ``count`` of them."""

    count: float
    eos_rate: float
    kl: float  # nats per answer
    score: float
    score_std: float

    @classmethod
    def of(cls, metrics: dict[str, float]) -> "Answers":
        names = ("eos_rate", "kl", "score", "score_std")
        return cls(metrics["used_answers"], *(metrics[name] for name in names))

    @classmethod
    def pooled(cls, parts: Sequence["Answers"]) -> "Answers":
        """All of them together; the spread is that within steps, which is what a mean's error follows from."""
        count = sum(part.count for part in parts)
        columns = list(zip(*(astuple(part)[1:] for part in parts), strict=True))
        weights = [part.count / max(count, 1) for part in parts]
        *means, _ = (sum(w * x for w, x in zip(weights, column, strict=True)) for column in columns)
        variance = sum(w * part.score_std**2 for w, part in zip(weights, parts, strict=True))
        return cls(count, *means, math.sqrt(variance))


def _error(first_variance: float, first: float, now_variance: float, now: float) -> float:
    """The standard error of the difference of two means of independent answers."""
    return math.sqrt(first_variance / max(first, 1) + now_variance / max(now, 1))


def findings(first: Answers, now: Answers, args) -> dict[str, str]:
    """What is to be told of a run whose first answers were ``first`` and whose last are ``now``: a line for each name.

    Args:
        args: of the run; which values its flags have decides what is advised.
    """
    found = {}
    shares = [answers.eos_rate * (1 - answers.eos_rate) for answers in (first, now)]
    error = _error(shares[0], first.count, shares[1], now.count)
    drop = first.eos_rate - now.eos_rate
    penalty = args.missing_eos_penalty
    if drop > max(EOS_DROP, STANDARD_ERRORS * error):
        found["eos"] = (
            f"{100 * now.eos_rate:.0f} % of the answers end by themselves, {100 * first.eos_rate:.0f} % did at first: "
            f"the policy stops ending them. --missing_eos_penalty {max(1.0, 2 * penalty):g} (now {penalty:g}) "
            "makes that cost more"
        )
    limit = max(HIGH_KL, 1.5 * (args.kl_target or 0.0))
    if now.kl > max(limit, first.kl):
        weight = f"--kl_ctl {2 * args.kl_ctl:g} (now {args.kl_ctl:g})" if args.kl_ctl else "--kl_ctl 0.05 (now 0)"
        why = ": so far away the reward model is no judge any more" if args.reward_model_weight else ""
        found["kl"] = (
            f"KL to the reference is {now.kl:.1f} nats per answer, {first.kl:.1f} in the first steps{why}. "
            f"{weight} or a lower --actor_learning_rate holds the policy back"
        )
    rise = now.score - first.score
    error = _error(first.score_std**2, first.count, now.score_std**2, now.count)
    if rise > STANDARD_ERRORS * error and now.eos_rate < 1 - AT_LIMIT and drop >= 0:
        found["length"] = (
            f"the score rose from {first.score:.2f} to {now.score:.2f} while {100 * (1 - now.eos_rate):.0f} % of the "
            f"answers are cut at --max_answer_seq_len {args.max_answer_seq_len}: longer may be what it pays for. Read "
            "some (--sample_interval), give answers more room, or raise --missing_eos_penalty"
        )
    return found


class Diagnostics:
    """Follows a run step by step, and says each of ``findings`` once.

    Args:
        args: of the run.
    """

    def __init__(self, args):
        self.args = args
        self._first: list[Answers] = []
        self._last: list[Answers] = []
        self._told: set[str] = set()

    def state_dict(self) -> dict:
        first, last = ([list(astuple(part)) for part in parts] for parts in (self._first, self._last))
        return {"first": first, "last": last, "told": sorted(self._told)}

    def load_state_dict(self, state: dict) -> None:
        self._first, self._last = ([Answers(*map(float, row)) for row in state[name]] for name in ("first", "last"))
        self._told = set(state["told"])

    def update(self, metrics: dict[str, float]) -> list[str]:
        """Lines to print after a step with these figures (``experience_metrics``)."""
        if not metrics["used_answers"]:
            return []
        answers = Answers.of(metrics)
        if len(self._first) < WINDOW:
            self._first.append(answers)
            return []
        self._last = [*self._last, answers][-WINDOW:]
        if len(self._last) < WINDOW:
            return []
        found = findings(Answers.pooled(self._first), Answers.pooled(self._last), self.args)
        new = {name: line for name, line in found.items() if name not in self._told}
        self._told |= new.keys()
        return list(new.values())
