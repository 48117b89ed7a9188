"""Rows of data: sequences of dictionaries that can say where each of them stands; lists, parts, unions of them."""

import operator
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from utils.data.errors import DataError

EMPTY = (None, "", [], {})  # a field that holds one of these holds nothing
MOST_EXAMPLES = 1000  # rows kept to show what columns hold: keys that never repeat must not keep a whole file


class Rows(Sequence):
    """A sequence of dictionaries that can say where each of them stands."""

    column_names: list[str]
    # (position, row) where a column first holds something; where nothing is known of rows behind the first, none.
    _examples: Sequence[tuple[int, dict[str, Any]]] = ()

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(position)

    def _row(self, position: int) -> dict[str, Any]:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """The place of row `index` in words, counted from 1: "train.jsonl, line 12"."""
        raise NotImplementedError

    def keep_columns(self, names: Iterable[str]) -> None:
        """Says that only these columns are needed. Readers leave the others out where that saves work."""

    def head(self, count: int) -> list[dict[str, Any]]:
        """The first rows, or fewer, at little cost: to see what the columns hold. Further rows follow in which a column
        first holds something, as far as the format tells."""
        return self._first_rows(count) + [row for position, row in self._examples if position >= count]

    def _first_rows(self, count: int) -> list[dict[str, Any]]:
        return [self[i] for i in range(min(count, len(self)))]


class ListRows(Rows):
    """Rows that are in memory already."""

    def __init__(self, rows: list[dict[str, Any]], label: str):
        self.rows = rows
        self.label = label
        self.column_names, self._examples = columns_of(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _row(self, position: int) -> dict[str, Any]:
        return self.rows[position]

    def where(self, index: int) -> str:
        return f"{self.label}, row {int(index) + 1}"


class SubsetRows(Rows):
    """The rows of `rows` at `indices`, in the order of `indices`."""

    def __init__(self, rows: Rows, indices: np.ndarray):
        self.rows = rows
        self.indices = np.asarray(indices)
        self.column_names = rows.column_names

    def __len__(self) -> int:
        return len(self.indices)

    def _row(self, position: int) -> dict[str, Any]:
        return self.rows[self.indices[position]]

    def where(self, index: int) -> str:
        return self.rows.where(self.indices[index])


class ConcatRows(Rows):
    """The rows of several sources, one after the other."""

    def __init__(self, parts: list[Rows]):
        self.parts = parts
        self.column_names = list(dict.fromkeys(name for part in parts for name in part.column_names))
        self._first_rows: list[int] | None = None

    def _starts(self) -> list[int]:
        if self._first_rows is None:
            self._first_rows = [0, *accumulate(len(part) for part in self.parts)]
        return self._first_rows

    def _locate(self, position: int) -> tuple[Rows, int]:
        starts = self._starts()
        part = bisect_right(starts, position) - 1
        return self.parts[part], position - starts[part]

    def __len__(self) -> int:
        return self._starts()[-1]

    def _row(self, position: int) -> dict[str, Any]:
        part, row = self._locate(position)
        return part[row]

    def where(self, index: int) -> str:
        part, row = self._locate(int(index))
        return part.where(row)

    def keep_columns(self, names: Iterable[str]) -> None:
        for part in self.parts:
            part.keep_columns(names)

    def head(self, count: int) -> list[dict[str, Any]]:
        rows, seen = [], set()
        for part in self.parts:
            if not rows or not seen.issuperset(part.column_names):
                rows += part.head(count)
                seen.update(part.column_names)
        return rows


class HuggingFaceRows(Rows):
    """Rows of a datasets.Dataset, which keeps them in memory-mapped Arrow files."""

    def __init__(self, dataset: Any, label: str):
        if len(dataset) == 0:
            raise DataError(f"{label}: expected at least one row, found none")
        self.column_names = list(dataset.column_names)
        self.label = label
        self.dataset = self._whole = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def _row(self, position: int) -> dict[str, Any]:
        try:
            return self.dataset[position]
        except (ValueError, OSError) as error:
            raise DataError(f"{self.where(position)}: expected a readable row, found: {error}") from error

    def where(self, index: int) -> str:
        return f"{self.label}, row {int(index) + 1}"

    def keep_columns(self, names: Iterable[str]) -> None:
        self.dataset = self._whole.select_columns([name for name in self.column_names if name in names])


def columns_of(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """The names of all columns, in the order of their first appearance, and (position, row) where one first holds
    something."""
    names: dict[str, None] = {}
    examples, shown = [], set()
    for position, row in enumerate(rows):
        if row.keys() <= shown:
            continue
        names.update(dict.fromkeys(row))
        if new := {name for name in row.keys() - shown if row[name] not in EMPTY}:
            shown |= new
            if len(examples) < MOST_EXAMPLES:
                examples.append((position, row))
    return list(names), examples
