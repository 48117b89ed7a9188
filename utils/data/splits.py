"""Where the rows of a split come from: files, folders, datasets on disk or on the hub."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.data.readers import (
    READERS,
    ConcatRows,
    DataError,
    HuggingFaceRows,
    Rows,
    content_fingerprint,
    error_line,
    file_kind,
    open_file,
    text_fingerprint,
)

# Files of the hub's layout that describe a dataset and hold no rows.
METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|eval|validation|valid|val|dev|test)(?:ing)?(?![a-z])", re.IGNORECASE)


class Splits:
    """Split name -> rows, each opened when first asked for. A split that is not there is a DataError."""

    def __init__(
        self, label: str, openers: Mapping[str, Callable[[], Rows]], hash_content: Callable[[], str], notes: str
    ):
        self.label = label
        self.notes = notes
        self._openers = openers
        self._hash_content = hash_content
        self._open: dict[str, Rows] = {}
        self._columns: list[str] | None = None

    def __getitem__(self, split: str) -> Rows:
        if split not in self._openers:
            found = ", ".join(self._openers)
            raise DataError(f"{self.label}: expected a split {split!r}, found only: {found}")
        if split not in self._open:
            self._open[split] = self._openers[split]()
            self._apply_columns(self._open[split])
        return self._open[split]

    def __contains__(self, split: str) -> bool:
        return split in self._openers

    def keep_columns(self, names: list[str]) -> None:
        """Says that only these columns are needed; a split that has none of them is refused."""
        self._columns = names
        for rows in self._open.values():
            self._apply_columns(rows)

    def _apply_columns(self, rows: Rows) -> None:
        if self._columns is None:
            return
        if not set(self._columns) & set(rows.column_names):
            raise no_such_columns(self.label, self._columns, rows)
        rows.keep_columns(self._columns)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all the data."""
        return self._hash_content()


def no_such_columns(label: str, expected: Sequence[str], rows: Rows) -> DataError:
    return DataError(f"{label}: expected the column {' or '.join(map(repr, expected))}, found {columns_text(rows)}")


def columns_text(rows: Rows) -> str:
    names = rows.column_names
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"the columns {', '.join(map(repr, names[:20]))}{more}" if names else "no columns"


def open_splits(path: str | os.PathLike, config: str | None = None) -> Splits:
    """The splits of a file (one, "train"), a folder of data files or a `save_to_disk` folder.

    In a folder the split of a file shows in its name, or else in the names of its folders: "data/train-00000.parquet",
    "default/train/0000.parquet", "hh_test.jsonl". Without any such name all files are the train split. `config`: of
    several variants that lie side by side, the one to read, where it exists.
    """
    path = Path(path)
    if path.is_file():
        return splits_of_files(path, {"train": [path]}, [])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_splits(path)

    files = sorted(item for item in path.rglob("*") if _is_data_file(item, path))
    variant = [file for file in files if config in (*file.relative_to(path).parts[:-1], file.name.split(".")[0])]
    files = variant or files
    if not files:
        raise DataError(f"{path}: expected data files ({', '.join(READERS)}) or a save_to_disk folder, found none")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)) or "", []).append(file)
    unnamed = by_split.pop("", [])
    if not by_split:
        by_split, unnamed = {"train": unnamed}, []
    for split, parts in by_split.items():
        if len({file_kind(part) for part in parts}) > 1:
            names = ", ".join(str(part.relative_to(path)) for part in parts)
            raise DataError(f"{path}: expected files of one kind for the split {split!r}, found: {names}")
    return splits_of_files(path, by_split, unnamed)


def _is_data_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file_kind(file) is not None and file.name not in METADATA_FILES and file.is_file()


def _split_of(relative: Path) -> str | None:
    for name in reversed(relative.parts):
        if found := SPLIT_IN_NAME.search(name):
            return found[1].lower()
    return None


def splits_of_files(root: Path, by_split: dict[str, list[Path]], ignored: list[Path]) -> Splits:
    def opener(files: list[Path]) -> Callable[[], Rows]:
        return lambda: open_file(files[0]) if len(files) == 1 else ConcatRows([open_file(file) for file in files])

    def hash_content() -> str:
        return text_fingerprint([f"{split} {content_fingerprint(files)}" for split, files in sorted(by_split.items())])

    def listed(files: list[Path]) -> str:
        names = [str(file.relative_to(root)) if file != root else file.name for file in files]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    notes = "; ".join(f"{split}: {listed(files)}" for split, files in by_split.items())
    if ignored:
        notes += f"; not read, for want of a split in the name: {listed(ignored)}"
    openers = {split: opener(files) for split, files in by_split.items()}
    return Splits(str(root), openers, hash_content, notes)


def _saved_splits(path: Path) -> Splits:
    """The splits of a folder that datasets' save_to_disk has written."""
    import datasets  # takes a second and loads pandas: only where it is needed

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its parsers raise; all of it means the same here
        raise DataError(
            f"{path}: expected a save_to_disk folder, but it cannot be loaded: {error_line(error)}"
        ) from error
    return _huggingface_splits(str(path), loaded, lambda: content_fingerprint(path))


def splits_of_hub(hub_name: str, config: str | None, tried: Sequence[Path]) -> Splits:
    """The splits of a dataset on the Hugging Face hub (or in the local cache of an earlier download)."""
    import datasets  # as above

    try:
        loaded = datasets.load_dataset(hub_name, config)
    except Exception as error:  # network, hub and parser errors share no base class
        places = " or ".join(str(path) for path in tried)
        raise DataError(
            f"dataset {hub_name!r}: not found locally (looked for {places}) and could not be downloaded because "
            f"{error_line(error)}. Give the path of a local copy, a folder whose path contains the name"
        ) from error
    return _huggingface_splits(
        hub_name,
        loaded,
        lambda: text_fingerprint([f"{split} {data._fingerprint}" for split, data in sorted(loaded.items())]),
    )


def _huggingface_splits(label: str, loaded: Any, hash_content: Callable[[], str]) -> Splits:
    by_split = loaded if isinstance(loaded, Mapping) else {"train": loaded}

    def opener(split: str) -> Callable[[], Rows]:
        return lambda: HuggingFaceRows(by_split[split], f"{label}, split {split}")

    return Splits(label, {split: opener(split) for split in by_split}, hash_content, "splits: " + ", ".join(by_split))
