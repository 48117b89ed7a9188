"""Kinds of flag values, checked as they are parsed."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from utils.process.world import is_rank_0


def cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "three-steps-to-chat" / "data_files")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=38, width=100)


class Parser(argparse.ArgumentParser):
    """Errors are one line, as all of ours, said by one rank, and name the nearest flag or value that there is."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return parsed

    def _unknown(self, words: list[str]) -> str:
        names = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--")))
        if not names:
            return f"{' '.join(words)}: belongs to no flag; a value with spaces in it needs quotes"
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        return "; ".join(f"unknown flag {name}{nearest(name, flags)}" for name in names)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = [str(getattr(choice, "value", choice)) for choice in action.choices]
            given = str(getattr(value, "value", value))
            text = f"{given!r} is none of {', '.join(choices)}{nearest(given, choices)}"
            raise argparse.ArgumentError(action, text)

    def error(self, message: str):
        if not is_rank_0():  # the others say nothing else
            self.exit(2)
        self.exit(2, f"\nerror: {message.removeprefix('argument ')} (--help explains all flags)\n")


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean ...?)" for one that is close, else ""."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def new_parser(description: str, parser_class: type[Parser] = Parser) -> Parser:
    return parser_class(description=description, formatter_class=_HelpFormatter)


LARGEST = 2**31 - 1  # more of anything is a slip, and some libraries' numbers end here


def positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {LARGEST}")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if not 0 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {LARGEST}")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def finite(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def share(text: str) -> float:
    """A part of a whole, or all of it."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def size(text: str) -> int:
    """Bytes; units are powers of 1000, as on the hub."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size as in 5GB or 500MB")
    number, unit = match.groups()
    value = int(float(number) * 1000 ** " KMGT".index(unit or " "))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def size_text(count: int) -> str:
    """A number of bytes as ``size`` reads it, in the largest unit that leaves it whole."""
    power = max(power for power in range(5) if count % 1000**power == 0)
    return f"{count // 1000**power}{' KMGT'[power].strip()}B"
