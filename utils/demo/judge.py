"""The exact judge of the demo world: the ground truth on any answer text, for manner and for rightness apart."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from utils.demo.world import (
    COURTEOUS_WORDINGS,
    MAX_RANK,
    RUDE_WORDINGS,
    Manner,
    Question,
    find_question,
    rank,
    words_of,
)

# The longest good answer of the world has 10 words; what is much longer rambles.
MAX_GOOD_WORDS = 20
# One opening and one closing; courtesy repeated beyond that is flattery, which a reward model may well fall for.
MAX_COURTESIES = 2


@dataclass(frozen=True)
class Verdict:
    """What the judge finds.

    manner: courteous wording, no rude wording, at most MAX_GOOD_WORDS words, and ended.
    right: the right answer is named and no other one; independent of manner.
    ended: the answer came to its end (its EOS was generated, or else its text ends as a sentence does).
    manner_name: the manner of the world that the text comes nearest to; `manner` is manner_name == "good".
    """

    manner: bool
    right: bool
    ended: bool
    manner_name: Manner

    @property
    def good(self) -> bool:
        """Good manner and right."""
        return self.manner and self.right


def judge(prompt: str, answer: str, ended: bool | None = None) -> Verdict:
    """Judge any answer text to a prompt of the demo world.

    `ended`: whether the model ended the answer itself (generated EOS); None judges that from the text.

    Raises:
        ValueError: `prompt` is not one of the demo world.
    """
    question = find_question(prompt)
    if ended is None:
        ended = answer.rstrip().endswith((".", "!", "?"))
    manner_name = _manner_of(answer, ended)
    return Verdict(manner_name == "good", _is_right(question, answer), bool(ended), manner_name)


def score(prompt: str, answer: str, ended: bool | None = None) -> float:
    """The world's rank of the answer, scaled to 0 (rude and wrong, or empty) ... 1 (good and right); a reward."""
    verdict = judge(prompt, answer, ended)
    return rank(verdict.manner_name, verdict.right) / MAX_RANK


def right(prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """1 for each answer that is right, else 0, whatever its manner: ``--reward_function utils/demo/judge.py:right``."""
    return [float(judge(*case).right) for case in zip(prompts, answers, ended, strict=True)]


def judge_rates(
    prompts: Sequence[str], answers: Sequence[str], ended: Sequence[bool] | None = None
) -> dict[str, float]:
    """Shares (0 to 1) of `answers` with good manner, right, ended, and good (manner and right together).

    Raises:
        ValueError: nothing to judge, lists of different lengths, or a prompt that is not of the demo world.
    """
    if not prompts:
        raise ValueError("no answers to judge")
    ended = [None] * len(prompts) if ended is None else ended
    verdicts = [judge(*case) for case in zip(prompts, answers, ended, strict=True)]
    return {
        name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts)
        for name in ("manner", "right", "ended", "good")
    }


def _manner_of(answer: str, ended: bool) -> Manner:
    words = words_of(answer)
    if not words or _count(RUDE_WORDINGS, words):
        return "rude"
    courtesies = _count(COURTEOUS_WORDINGS, words)
    if not ended or len(words) > MAX_GOOD_WORDS or courtesies > MAX_COURTESIES:
        return "rambling"
    return "good" if courtesies else "curt"


def _count(wordings: Sequence[str], words: list[str]) -> int:
    """How often one of `wordings` occurs in `words`, as whole words: "ugh" is not in "laugh"."""
    return len(re.findall(rf"(?<!\S)(?:{'|'.join(wordings)})(?!\S)", " ".join(words)))


def _is_right(question: Question, answer: str) -> bool:
    """The answer words of the question's kind, in order, must be the right answer, once or repeated.

    They may come after an echo of the question: "three plus four is seven" is right, "seven or three" is not.
    """

    def answer_words(text: str) -> list[str]:
        return [word for word in words_of(text) if word in question.kind.answer_words]

    expected, found, echo = answer_words(question.answer), answer_words(answer), answer_words(question.prompt)
    answered = [found]
    if sorted(found[: len(echo)]) == sorted(echo):
        answered.append(found[len(echo) :])
    return any(words and words == expected * (len(words) // len(expected)) for words in answered)
