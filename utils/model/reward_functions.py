"""Rewards beyond the reward model: Python functions of the user's own that score answers.

def polite(prompts: list[str], answers: list[str]) -> list[float]:
    return [float("please" in answer) for answer in answers]

--reward_function rewards.py:polite rewards.py:short:0.5
"""

import importlib.util
import math
import numbers
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.process.errors import UserError


@dataclass
class RewardFunction:
    """A function that scores a batch of answers, and how much its scores weigh.

    Attributes:
        name: as metrics call it.
        score: (prompts, answers), lists of n texts without special tokens -> n numbers.
    """

    name: str
    score: Callable[[list[str], list[str]], list[float]]
    weight: float = 1.0
    flag: str = "--reward_function"  # that named it, for errors

    def __call__(self, prompts: list[str], answers: list[str]) -> list[float]:
        """n scores, unweighted.

        Raises:
            UserError: the function failed, or gave anything but n numbers. Non-finite numbers pass: the trainer
                leaves such answers out and counts them.
        """
        try:
            scores = list(self.score(prompts, answers))
        # Whatever the user's code raises must reach all ranks as an error that names it.
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.flag} {self.name} raised {type(error).__name__}: {error}") from error
        wrong = next((score for score in scores if not isinstance(score, numbers.Real) or isinstance(score, str)), None)
        if wrong is not None:
            raise UserError(f"{self.flag} {self.name} gave {wrong!r} among its scores; expected numbers")
        if len(scores) != len(answers):
            raise UserError(f"{self.flag} {self.name} gave {len(scores)} scores for {len(answers)} answers")
        return [float(score) for score in scores]


def load_reward_functions(named: list[str], flag: str = "--reward_function") -> list[RewardFunction]:
    """The functions of ``FILE.py:NAME`` or ``FILE.py:NAME:WEIGHT``.

    Raises:
        UserError: no such file or function, a file that cannot be run, a weight that is no number, a name used twice.
    """
    functions = []
    for text in named:
        file, colon, rest = text.partition(".py:")
        name, _, weight = rest.partition(":")
        if not colon or not name:
            raise UserError(f"{flag} {text}: expected FILE.py:NAME or FILE.py:NAME:WEIGHT")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{flag} {text}: the weight {weight!r} is no number")
        functions.append(RewardFunction(name, _load_function(Path(f"{file}.py"), name, flag), value, flag))
    names = ["reward_model", *(function.name for function in functions)]  # the model's own score has that name
    if len(set(names)) < len(names):
        raise UserError(f"{flag}: two functions have one name ({', '.join(names)}); metrics need one each")
    return functions


def _load_function(file: Path, name: str, flag: str) -> Callable:
    if not file.is_file():
        raise UserError(f"{flag}: there is no file {file}")
    name_of_module = f"reward_functions:{file.resolve()}"
    try:
        if name_of_module not in sys.modules:  # a file with two functions runs once
            spec = importlib.util.spec_from_file_location(name_of_module, file)
            sys.modules[name_of_module] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name_of_module]
        raise UserError(f"{flag}: {file} cannot be run: {type(error).__name__}: {error}") from error
    module = sys.modules[name_of_module]
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{flag}: {file} has no function {name}, only {', '.join(found) or 'none'}")
    return function
