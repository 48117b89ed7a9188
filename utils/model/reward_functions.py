"""Rewards beyond the reward model: Python functions of the user's own that score answers.

def exact(answers, answer):  # the model's answers, and the column "answer" of the data
    return [float(text.strip() == right) for text, right in zip(answers, answer)]

--reward_function rewards.py:exact rewards.py:short:0.5

A function gets what its parameters are called, as in TRL; everything is passed by keyword.
"""

import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils.process.console import print_rank_0
from utils.process.errors import UserError

TEXTS = ("prompts", "answers", "completions")  # given with every batch; completions is TRL's name of answers
ENDED = "ended"  # given with them: whether each answer came to its end token
GIVEN = (*TEXTS, ENDED)
PROMPT_MESSAGES = "prompt_messages"  # stands among the columns of the rows of conversations
OURS = (*GIVEN, PROMPT_MESSAGES)
OFFER = "prompts, answers (also called completions), ended, prompt_messages where the data are conversations"


@dataclass
class RewardFunction:
    """A function that scores a batch of answers, and how much its scores weigh.

    Attributes:
        name: as metrics call it.
        score: returns n numbers for lists of n values, passed by keyword under the names of its parameters: of TEXTS,
            texts without special tokens; ENDED, booleans; PROMPT_MESSAGES, the prompt's turns; any column of the data.
            ``**columns`` takes whatever no other parameter does.

    Raises:
        UserError: parameters of ``score`` cannot be passed by keyword.
    """

    name: str
    score: Callable[..., list[float]]
    weight: float = 1.0
    flag: str = "--reward_function"  # that named it, for errors
    required: tuple[str, ...] = field(init=False)  # parameters without a default
    optional: tuple[str, ...] = field(init=False)
    takes_all: bool = field(init=False)  # whether it has **columns

    def __post_init__(self):
        try:
            parameters = inspect.signature(self.score).parameters.values()
        except (TypeError, ValueError) as error:  # of a function written in C
            raise UserError(f"{self.flag} {self.name}: its parameters cannot be read ({error})") from error
        kinds = inspect.Parameter
        if nameless := [p.name for p in parameters if p.kind == kinds.POSITIONAL_ONLY and p.default is kinds.empty]:
            raise UserError(
                f"{self.flag} {self.name}: arguments are passed by name, but {', '.join(nameless)} can only be passed "
                f"by position; remove the '/' from its parameters"
            )
        named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        self.required = tuple(p.name for p in named if p.default is kinds.empty)
        self.optional = tuple(p.name for p in named if p.default is not kinds.empty)
        self.takes_all = any(p.kind == kinds.VAR_KEYWORD for p in parameters)

    def wants(self) -> tuple[str, ...] | Literal["all"]:
        """The columns of the data that it would take, PROMPT_MESSAGES among them; "all" for whatever there is."""
        if self.takes_all:
            return "all"
        return tuple(name for name in (*self.required, *self.optional) if name not in GIVEN)

    def __call__(
        self,
        prompts: list[str],
        answers: list[str],
        columns: Sequence[Mapping[str, object]] | None = None,
        ended: Sequence[bool] | None = None,
    ) -> list[float]:
        """n scores, unweighted.

        Args:
            ended: whether each answer came to its end token; None: all did.
            columns: of the data, by name, one mapping per answer; None where there are none.

        Raises:
            UserError: the function failed, or gave anything but n numbers. Non-finite numbers pass: the trainer
                leaves such answers out and counts them.
        """
        arguments = self._arguments(prompts, answers, columns or [{} for _ in answers], ended)
        try:
            scores = list(self.score(**arguments))
        # Whatever the user's code raises must reach all ranks as an error that names it.
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.flag} {self.name} raised {type(error).__name__}{_place_of(error)}: {error}"
            ) from error
        for score in scores:
            if not isinstance(score, numbers.Real):
                raise UserError(f"{self.flag} {self.name} gave {score!r} among its scores; expected numbers")
        if len(scores) != len(answers):
            raise UserError(f"{self.flag} {self.name} gave {len(scores)} scores for {len(answers)} answers")
        return [float(score) for score in scores]

    def _arguments(self, prompts, answers, columns, ended) -> dict[str, list]:
        """Lists of its own for each function, so that none sees what another did to them."""
        names = dict.fromkeys(name for row in columns for name in row)
        given = {name: [row.get(name) for row in columns] for name in names}
        given |= {"prompts": list(prompts), "answers": list(answers), "completions": list(answers)}
        given[ENDED] = [True] * len(answers) if ended is None else [bool(end) for end in ended]
        self.check(given)
        return given if self.takes_all else {n: given[n] for n in (*self.required, *self.optional) if n in given}

    def check(self, available: Iterable[str]) -> None:
        """Raise UserError unless there is all that it cannot do without. ``available``: the columns of the data."""
        available = list(available)
        missing = [name for name in self.required if name not in (*GIVEN, *available)]
        if missing:
            columns = [name for name in available if name not in OURS]
            raise UserError(
                f"{self.flag} {self.name} asks for {', '.join(self.required)} by the names of its parameters, and "
                f"there is no {', '.join(missing)}. There are: {OFFER}; columns of the data: "
                f"{', '.join(columns) or 'none'}. Rename the parameters, or give a default to what it can do without"
            )


def _place_of(error: BaseException) -> str:
    """ " at FILE:LINE" of the function's own file, the innermost; "" where Python knows none."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call here
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""


def columns_wanted(functions: Sequence[RewardFunction]) -> tuple[str, ...] | Literal["all"]:
    """The columns of the data that rows must keep for these functions; "all" for whatever there is."""
    wanted = [function.wants() for function in functions]
    return "all" if "all" in wanted else tuple(sorted({name for names in wanted for name in names}))


def check_columns(functions: Sequence[RewardFunction], available: Sequence[str]) -> None:
    """Say before any model is loaded what functions could not be called with, and which columns they will not see.

    Args:
        available: columns that all of the data have; PROMPT_MESSAGES among them for conversations.

    Raises:
        UserError: a function asks for what is not there.
    """
    for function in functions:
        function.check(available)
    hidden = [name for name in available if name in GIVEN]
    if functions and hidden:
        print_rank_0(
            f"the data's column {', '.join(hidden)} is not what {functions[0].flag} gets under that name: prompts are "
            "the texts the model was asked, answers and completions what it said, ended whether it came to its end; "
            "rename the column to use it"
        )


def check_weights(functions: Sequence[RewardFunction], reward_model_weight: float) -> None:
    """Raises UserError: nothing that scores has a weight."""
    if not reward_model_weight and not any(function.weight for function in functions):
        names = ", ".join(function.name for function in functions)
        raise UserError(f"--reward_model_weight and the weight of {names} are 0: nothing would be rewarded")


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
