"""Bytes of a file as text and JSON; whatever is wrong with them is a DataError with its place."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from utils.data.errors import DataError, kind_of


def parse_object(data: bytes, where: str | Callable[[], str]) -> dict[str, Any]:
    """One JSON object from the bytes of a line; `where` (text, or a function that makes it) begins error messages."""
    place = where if callable(where) else lambda: where
    row = parse_json(data, place)
    if not isinstance(row, dict):
        raise DataError(f"{place()}: expected one JSON object per line, found {kind_of(row)}")
    return row


def parse_json(data: bytes, place: Callable[[], str]) -> Any:
    """json.loads with duplicate keys refused, and every way to fail turned into a DataError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            key = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise DataError(f"{place()}: expected each key once, found {key!r} twice")
        return row

    try:
        return json.loads(decode(data, place), object_pairs_hook=unique)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place()}: expected valid JSON, found: {error.msg} ({at})") from error
    except RecursionError:
        raise DataError(f"{place()}: expected valid JSON, found: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{place()}: expected valid JSON, found: {error}") from error


def decode(data: bytes, where: str | Callable[[], str]) -> str:
    """UTF-8 bytes as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = where() if callable(where) else where
        line = data.count(b"\n", 0, error.start)
        within = f" (line {line + 1} of it)" if line else ""
        found = f"byte 0x{data[error.start]:02x} at position {error.start}{within}"
        raise DataError(f"{place}: expected UTF-8, found {found}: {error.reason}") from error


def decode_text(data: bytes, where: str | Callable[[], str]) -> str:
    """A line of a text file, where a zero byte means that it is none."""
    text = decode(data, where)
    if "\0" in text:
        raise DataError(f"{where() if callable(where) else where}: expected text, found a zero byte")
    return text
