"""A judge that this project did not write: how positive an answer's words are, by VADER, if its form is right.

    --reward_function evaluation_scripts/real_language/sentiment.py:sentiment          (step 3)
    --judge_function evaluation_scripts/real_language/sentiment.py:sentiment           (make_pairs.py, prompt_eval.py)

VADER is a lexicon of rated words with rules for negation, emphasis and the like (Hutto and Gilbert, 2014,
https://ojs.aaai.org/index.php/ICWSM/article/view/14550): pip install vaderSentiment.
"""

from functools import lru_cache

SHORTEST, LONGEST = 5, 60  # words of an answer whose form is right
WRONG_FORM = -1.0  # the lowest sentiment that there is


@lru_cache(maxsize=1)
def _analyser():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise SystemExit(f"the sentiment judge needs a package: pip install vaderSentiment ({error})") from error
    return SentimentIntensityAnalyzer()


_analyser()  # a missing package is said when this file is read, before any model is loaded


def has_right_form(answer: str, ended: bool) -> bool:
    """Whether an answer came to its end and holds 5 to 60 words."""
    return ended and SHORTEST <= len(answer.split()) <= LONGEST


def sentiment(answers: list[str], ended: list[bool]) -> list[float]:
    """For each answer -1 (negative words, or a wrong form) to 1 (positive words): VADER's compound score."""
    return [
        _analyser().polarity_scores(answer)["compound"] if has_right_form(answer, end) else WRONG_FORM
        for answer, end in zip(answers, ended, strict=True)
    ]
