"""What is wrong with a user's data, in words."""

from typing import Any


class DataError(ValueError):
    """Input data that cannot be used. The message names file, line or row, field, what was expected and found."""


class NoUsableRows(DataError):
    """Data that are read without damage, and of which no row serves the step."""


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def error_line(error: Exception) -> str:
    """What an error of a library says, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
