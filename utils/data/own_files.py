"""The user's own files and datasets of the hub without a class of their own, and the way from a name to its dataset."""

import contextlib
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.data import prompt_format
from utils.data.conversation import Conversation, Texts
from utils.data.errors import DataError
from utils.data.fingerprints import text_fingerprint
from utils.data.raw_datasets import KNOWN_DATASETS, PromptRawDataset, find_known_dataset
from utils.data.readers import READERS
from utils.data.row_texts import Row, SkipRow
from utils.data.rows import Rows
from utils.data.shapes import MESSAGES_COLUMNS, SHAPES, Shape, recognise
from utils.data.splits import EVAL_SPLITS, Splits, first_names, is_hub_name, no_such_columns, open_splits, splits_of_hub

COLUMN_ROLES = ("prompt", "chosen", "rejected", "messages", "system", "tools")


class PathDataset(PromptRawDataset):
    """Any file, folder or dataset of the hub whose rows have one of the shapes of shapes.py.

    Attributes:
        shape: how its rows are read.
    """

    shape: Shape

    def __init__(self, *args, shape: str | None = None, **kwargs):
        self._shape_name = shape
        super().__init__(*args, **kwargs)

    def _find_splits(self, dataset_name: str, data_root: Path) -> Splits:
        return open_splits(dataset_name)

    def _settle(self, dataset_name: str, columns: Mapping[str, str]) -> None:
        splits = self.raw_datasets
        self.dataset_name, self.given_columns = dataset_name, dict(columns)
        # Content in the name keeps the index files of two files of one name apart, and is the same on every machine.
        self.dataset_name_clean = f"{re.sub('[^0-9A-Za-z]+', '_', Path(dataset_name).stem)}_{splits.fingerprint[:8]}"
        self.eval_split = next((split for split in EVAL_SPLITS if split in splits), None)
        self._recognise(splits["train"], columns, self._shape_name)
        self._grouped: dict[str, Rows] = {}

    def _recognise(self, rows: Rows, columns: Mapping[str, str], name: str | None = None) -> None:
        for role, column in columns.items():
            if column not in rows.column_names:
                raise no_such_columns(f"--{role}_column: {self.dataset_name}", [column], rows)
        shape = recognise(rows, columns, name)
        if shape is None:
            expected = ["prompt", *MESSAGES_COLUMNS[:2]] if name is None else [f"those of the format {name}"]
            raise no_such_columns(self.dataset_name, expected, rows)
        unused = [role for role, column in columns.items() if column not in shape.columns]
        if unused:
            role = unused[0]
            raise DataError(
                f"--{role}_column {columns[role]}: {self.dataset_name}: is not used where rows are read as "
                f"{shape.description}"
            )
        self.shape = shape
        self.has_answer, self.has_rejected = shape.has_answer, shape.has_rejected
        self.unread = [column for column in rows.column_names if column not in shape.columns]

    def rows_of(self, split: str) -> Rows:
        if split not in self._grouped:
            self._grouped[split] = self.shape.grouped(self.raw_datasets[split])
        return self._grouped[split]

    def _columns(self) -> list[str]:
        return self.shape.columns

    def fingerprint(self) -> str:
        shape = [self.shape.description, repr(self.shape.columns), repr(self.given_columns)]
        return text_fingerprint([super().fingerprint(), *shape])

    def recognised(self) -> str:
        unread = f"; columns not read: {first_names(self.unread)}" if self.unread else ""
        return self.shape.description + unread

    def unused_fields(self) -> dict[str, int]:
        found = dict(self.shape.reader.unused)
        self.shape.reader.unused.clear()
        return found

    def keep_also(self, names: tuple[str, ...] | str) -> None:
        super().keep_also(names)
        self.unread = [column for column in self.unread if names != "all" and column not in names]

    def examples(self, row: Row, need: Sequence[str]) -> list[Texts | Conversation]:
        if "chosen" in need and not self.shape.has_answer:
            raise SkipRow("the dataset has no answers")
        return self.shape.examples(row, need)

    # The published texts of a row, in the project's own format

    def prompt(self, row: Row) -> str:
        example = self._first(row, ("prompt",))
        if isinstance(example, Texts):
            return example.prompt
        return _written(lambda: prompt_format.write_turns(example.prompt, prompt_format.HUMAN_ASSISTANT, waits=True)[0])

    def chosen(self, row: Row) -> str:
        return self._answer(row, ("prompt", "chosen"), 0)

    def rejected(self, row: Row) -> str:
        if not self.has_rejected:
            raise SkipRow("the dataset has no rejected answers")
        return self._answer(row, ("prompt", "chosen", "rejected"), -1)

    def _first(self, row: Row, need: Sequence[str]) -> Texts | Conversation:
        return self.examples(row, need)[0]

    def _answer(self, row: Row, need: Sequence[str], which: int) -> str:
        example = self._first(row, need)
        answer = example.answers[which]
        if isinstance(example, Texts):
            return answer
        return prompt_format.format_answer(answer[0]["content"])


def _written(write) -> str:
    try:
        return write()
    except ValueError as error:
        raise SkipRow(str(error)) from error


def get_raw_dataset(
    dataset_name: str,
    output_path: str,
    seed: int,
    local_rank: int,
    columns: Mapping[str, str] | None = None,
    data_root: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    config: str | None = None,
    shape: str | None = None,
) -> PromptRawDataset:
    """Opens a dataset by its name in KNOWN_DATASETS, by a path, or by its name on the hub.

    A known name is read from a local copy (the path itself, or `{data_root}/data/{name}`), else from the hub. Any other
    path is read as what its columns tell: see shapes.py.

    Args:
        columns: own column names for such a path, by prompt, chosen, rejected, messages, system, tools; None or "" as a
            name: the usual one. Known datasets know their columns.
        split, config: what to read where a path or name holds several; see utils.data.splits.
        shape: a name of shapes.SHAPES, where the columns alone do not tell.

    Raises:
        DataError: unknown name, no such file, or data that cannot be read.
    """
    columns = {name: column for name, column in (columns or {}).items() if column}
    unknown = set(columns) - set(COLUMN_ROLES)
    if unknown:
        raise DataError(f"columns: expected the keys {', '.join(COLUMN_ROLES)}; found {sorted(unknown)}")
    if shape is not None and shape not in SHAPES:
        close = difflib.get_close_matches(shape, SHAPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise DataError(f"{dataset_name}: unknown format {shape!r}{hint}: choose one of {', '.join(SHAPES)}")
    cls = find_known_dataset(dataset_name)
    if cls is not None:
        return cls(output_path, seed, local_rank, dataset_name, data_root, **_given(split=split, config=config))
    if os.path.exists(dataset_name):
        splits = open_splits(dataset_name, config, split)
    elif is_hub_name(dataset_name):
        splits = _hub_splits(dataset_name, config, split)
    else:
        raise _unknown_dataset(dataset_name)
    return PathDataset(output_path, seed, local_rank, dataset_name, data_root, columns, splits, shape=shape)


def _given(**options: str | None) -> dict[str, str]:
    """The options that are not None: a class in the published style takes none of them."""
    return {name: value for name, value in options.items() if value is not None}


def _hub_splits(dataset_name: str, config: str | None, split: str | None) -> Splits:
    try:
        return splits_of_hub(dataset_name, config, [Path(dataset_name).absolute()], split)
    except DataError as error:
        raise DataError(f"{error}{_nearest(dataset_name)}") from error


def _nearest(dataset_name: str) -> str:
    close = difflib.get_close_matches(dataset_name, KNOWN_DATASETS, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unknown_dataset(dataset_name: str) -> DataError:
    path = Path(dataset_name)
    if path.is_absolute() or dataset_name.startswith((".", "~")) or path.suffix in READERS:  # never a known name
        names = []
        with contextlib.suppress(OSError):  # no such folder, or not to be looked into
            names = [entry.name for entry in path.parent.iterdir() if entry.exists()]
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = f" (did you mean {path.parent / close[0]}?)" if close else ""
        return DataError(f"{dataset_name}: there is no such file or folder of data; looked for {path.absolute()}{hint}")
    return DataError(
        f"unknown dataset {dataset_name!r}{_nearest(dataset_name)}: neither a known name nor an existing path (looked "
        f"for {Path(dataset_name).absolute()}). Known names: {', '.join(KNOWN_DATASETS)}. A path would have to be a "
        f"file that ends in {', '.join(READERS)}, a folder with train and eval (or test, validation, dev) files of "
        "these kinds, or a save_to_disk folder, with the columns prompt, chosen and rejected, or messages, or "
        "conversation"
    )
