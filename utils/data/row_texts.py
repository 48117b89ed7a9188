"""Reaching into a row: its texts and numbers, or the reason why it cannot be used."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.data.errors import NoUsableRows, kind_of
from utils.data.rows import Rows
from utils.data.splits import columns_text

Row = Mapping[str, Any]

EXAMPLES_PER_REASON = 3


class SkipRow(Exception):
    """A row without a usable text. The reason names the field and holds no value, so that reasons can be counted."""


def text(row: Row, *path: str | int) -> str:
    """The string at `path` in a row: text(row, "answers", 0, "text").

    Raises:
        SkipRow: something on the path is missing, null or empty, or what it leads to is not a usable string.
    """
    value: Any = row
    for depth, key in enumerate(path):
        if isinstance(key, int):
            expect(isinstance(value, list), path[:depth], value, "a list")
            if key >= len(value):
                raise SkipRow(f"field {_dotted(path[:depth])} is an empty list")
        else:
            expect(isinstance(value, Mapping), path[:depth], value, "an object")
            if key not in value:
                raise SkipRow(f"field {_dotted(path[: depth + 1])} is missing")
        value = value[key]
    expect(isinstance(value, str), path, value, "a string")
    if value and value.isascii() and not value.isspace():  # nearly all: their field's name need not be spelled out
        return value
    return usable(value, _dotted(path))


def usable(value: str, name: str) -> str:
    """The string itself if it holds text that can be tokenised, else SkipRow."""
    if not value or value.isspace():
        raise SkipRow(f"field {name} is empty")
    if not value.isascii():
        # JSON can spell half of a surrogate pair; tokenizers fail on it.
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SkipRow(f"field {name} holds a lone surrogate, which is no character") from None
    return value


def number(row: Row, name: str) -> float:
    """The number in a field, also where a CSV file gives it as text. Raises SkipRow."""
    value = row.get(name)
    if value is None:
        raise SkipRow(f"field {_dotted((name,))} is {'null' if name in row else 'missing'}")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise SkipRow(f"field {_dotted((name,))}: expected a number, found {kind_of(value)}") from None
    if result != result:
        raise SkipRow(f"field {_dotted((name,))} is not a number (NaN)")
    return result


def common_start(texts: Sequence[str]) -> str:
    """The text with which all begin."""
    first, last = min(texts), max(texts)  # what these two have in common, all between them have
    if last.startswith(first):
        return first
    same, differs = 0, len(first)
    while differs - same > 1:
        middle = (same + differs) // 2
        same, differs = (middle, differs) if last.startswith(first[:middle]) else (same, middle)
    return first[:same]


def as_path(name: str | tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A column name as a path of one step; a path as it is."""
    return (name,) if isinstance(name, str) else name


def none_if_skipped(make: Callable[[Row], Any], row: Row) -> Any:
    """``make(row)``, or None where it raises SkipRow."""
    try:
        return make(row)
    except SkipRow:
        return None


def expect(holds: bool, path: Sequence[str | int], value: Any, expected: str) -> None:
    """SkipRow unless a condition on the value at ``path`` holds; ``expected`` says it in words."""
    if not holds:
        name = f"field {_dotted(path)}" if path else "the row"
        raise SkipRow(f"{name} is null" if value is None else f"{name}: expected {expected}, found {kind_of(value)}")


def _dotted(path: Sequence[str | int]) -> str:
    joined = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return f"'{joined.removeprefix('.')}'"


@dataclass
class RowReport:
    """Which rows of a split can be used, and why the others cannot.

    Attributes:
        of: rows of the whole split, where the report is about a part of them; origin: how it became that part.
        dropped: rows that had all texts and were left out later.
    """

    label: str
    kept: list[int] = field(default_factory=list)  # positions in the split, in the order they were read
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first places
    of: int | None = None
    origin: list[str] = field(default_factory=list)
    dropped: int = 0

    @property
    def total(self) -> int:
        return len(self.kept) + self.skipped.total()

    def note(self, position: int, reason: str | None, rows: Rows) -> None:
        """Count a row: as kept where there is no reason against it, else as skipped, with its place."""
        if reason is None:
            self.kept.append(position)
            return
        self.skipped[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(rows.where(position))

    def raise_if_none(self, rows: Rows, need: Sequence[str]) -> None:
        if self.skipped and not self.kept:
            raise NoUsableRows(f"{self}; expected rows with {', '.join(need)}, found {columns_text(rows)}")

    def __str__(self) -> str:
        whole = self.total if self.of is None else self.of
        head = f"{self.label}: {len(self.kept) - self.dropped} of {whole} rows used"
        if self.origin:
            head += f" ({'; '.join(self.origin)})"
        reasons = [
            f"{count} x {reason} ({'; '.join(self.examples[reason])})" for reason, count in self.skipped.most_common()
        ]
        return f"{head}, {self.skipped.total()} skipped: {', '.join(reasons)}" if reasons else head
