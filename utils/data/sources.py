"""What a step asks of its data, dataset by dataset: from its flags, or from the file of --data_config.

datasets:
  - path: data/ultrafeedback
    split: train_prefs
    weight: 2
  - path: my/chats.jsonl
    columns: {messages: talk}
    max_rows: 5000
    data_split: null        # all rows for this step
"""

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.data.errors import DataError, kind_of
from utils.data.parsing import parse_json
from utils.data.raw_datasets import find_known_dataset
from utils.data.split_index import split_boundaries
from utils.data.splits import is_hub_name
from utils.process.errors import UserError

TEXT_ROLES = ("prompt", "chosen", "rejected")  # a dataset of texts has a column of this name for each
COLUMN_ROLES = (*TEXT_ROLES, "messages", "system", "tools")
NO_CHOICE = "-"  # stands for a dataset of which nothing is to be chosen
MOST_BYTES = 1 << 20  # of a --data_config


@dataclass(frozen=True)
class DataSource:
    """One dataset of a step, and what is to be read of it.

    Attributes:
        path: a known name, a path, or the name of a dataset on the hub.
        split: which split trains, where there are several; also the one that evaluates, after a comma.
        config: which of several configurations; several with commas between them, or all.
        columns: own column names of files, by the text they hold ({"prompt": "question"}).
        shape: how its rows are laid out, where their columns shall not decide it.
        weight: its part of the blend, relative to the other weights; None: its rows decide.
        max_rows: of its rows that are used in training at most, and in evaluation; None for all.
        data_split: shares of the steps, as in "2,4,4"; None: the step gets all rows.
    """

    path: str
    split: str | None = None
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    shape: str | None = None
    weight: float | None = None
    max_rows: int | None = None
    data_split: str | None = None


def sources_of_step(args) -> tuple[DataSource, ...]:
    """The datasets that a step's flags name: those of --data_path by shares, those of --sft_only_data_path whole; or
    those of --data_config.

    Raises:
        UserError: flags that do not go together, or a file that cannot be used, with the entry and the key.
    """
    columns = {role: getattr(args, f"{role}_column", None) for role in COLUMN_ROLES}
    columns = {role: column for role, column in columns.items() if column}
    refuse_shared_columns(columns, lambda role: f"--{role}_column")
    if args.data_config is not None:
        return _sources_of_file(args.data_config, args.data_split, columns)
    named = [(path, args.data_split) for path in args.data_path]
    named += [(path, None) for path in getattr(args, "sft_only_data_path", ())]
    splits = _one_each("--dataset_split", args.dataset_split, len(named))
    configs = _one_each("--dataset_config", args.dataset_config, len(named))
    return tuple(
        DataSource(path, split, config, columns, data_split=data_split)
        for (path, data_split), split, config in zip(named, splits, configs, strict=True)
    )


def _one_each(flag: str, values: Sequence[str] | None, count: int) -> list[str | None]:
    """One value for all datasets, or one for each."""
    values = values or [NO_CHOICE]
    if len(values) == 1:
        values = [*values] * count
    if len(values) != count:
        raise UserError(
            f"{flag} {' '.join(values)}: expected one value for all datasets, or one for each of the {count} (in their "
            f"order; {NO_CHOICE} where there is nothing to choose), found {len(values)}"
        )
    return [None if value == NO_CHOICE else value for value in values]


def refuse_shared_columns(columns: Mapping[str, str], name_of) -> None:
    """Refuse two roles in one column; ``name_of(role)`` is how the user names a role.

    Raises:
        UserError: with both names.
    """
    texts = {role: columns.get(role, role) for role in TEXT_ROLES} if set(TEXT_ROLES) & set(columns) else {}
    owner: dict[str, str] = {}
    # Those that are given come first: the usual name of another is what collides with them.
    for role, column in sorted((texts | dict(columns)).items(), key=lambda item: item[0] not in columns):
        if column in owner:
            other = owner[column]
            usual = "" if role in columns else f", where it is looked for by default; {name_of(role)} names another"
            raise UserError(f"{name_of(other)} {column}: that column also holds {role}{usual}")
        owner[column] = role


# ---------------------------------------------------------------- --data_config


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys and without aliases, which can make a small file large."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name)", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def data_config_content(file: str | os.PathLike) -> Any:
    """What a --data_config holds, as JSON would.

    Raises:
        UserError: no such file, or neither YAML nor JSON.
    """
    place, path = f"--data_config {file}", Path(file)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UserError(f"{place}: expected a file that ends in .yaml, .yml or .json")
    try:
        with open(path, "rb") as opened:
            data = opened.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{place}: expected a list of datasets, found a file of more than {MOST_BYTES} bytes")
        if path.suffix.lower() == ".json":
            return parse_json(data, lambda: place)
        return yaml.load(data.decode(), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror or error}") from error
    except DataError as error:
        raise UserError(str(error)) from error
    # Under a tag of its own (!!int, !!set) a value that is none fails wherever the library first trips over it.
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{place}{line}: expected YAML, found: {getattr(error, 'problem', None) or error}") from error


def _sources_of_file(file: str, data_split: str, columns: Mapping[str, str]) -> tuple[DataSource, ...]:
    place, content = f"--data_config {file}", data_config_content(file)
    if isinstance(content, dict):
        if set(content) != {"datasets"}:
            raise UserError(f"{place}: expected a list of datasets, or the key 'datasets' with one, and nothing else")
        content = content["datasets"]
    if not isinstance(content, list) or not content:
        found = "an empty list" if content == [] else kind_of(content)
        raise UserError(f"{place}: expected a list of datasets, found {found}")
    sources = []
    for number, entry in enumerate(content, start=1):
        source = _Entry(f"{place}, entry {number}", entry).source(data_split, columns)
        for earlier, other in enumerate(sources, start=1):
            if _identity(other) == _identity(source):
                raise UserError(f"{place}, entry {number}, key 'path': {source.path} is entry {earlier} already")
        sources.append(source)
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise UserError(
            f"{place}, entry {weighted.index(False) + 1}, key 'weight': expected one, since other entries have a weight"
        )
    return tuple(sources)


def _identity(source: DataSource) -> tuple:
    path = os.path.realpath(source.path) if os.path.exists(source.path) else source.path
    return path, source.split, source.config


class _Entry:
    """One entry of a --data_config while it is checked; ``place`` begins what is said of it."""

    KEYS = ("path", "split", "config", "columns", "format", "weight", "max_rows", "data_split")

    def __init__(self, place: str, entry: Any):
        self.place, self.entry = place, entry
        if not isinstance(entry, dict):
            raise UserError(f"{place}: expected keys and values, as in path: my/data.jsonl; found {kind_of(entry)}")
        self._known_keys(entry, self.KEYS, "")

    def _known_keys(self, given: Mapping, known: Sequence[str], within: str) -> None:
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise UserError(f"{self.place}, key '{within}{key}': unknown{hint}; known: {', '.join(known)}")

    def _refuse(self, key: str, expected: str, value: Any):
        found = repr(value) if isinstance(value, str | int | float) else kind_of(value)
        raise UserError(f"{self.place}, key '{key}': expected {expected}, found {found}")

    def _text(self, key: str) -> str | None:
        value = self.entry.get(key)
        if value is not None and not (isinstance(value, str) and value.strip()):
            self._refuse(key, "a text", value)
        return value

    def source(self, data_split: str, columns: Mapping[str, str]) -> DataSource:
        weight, rows = self.entry.get("weight"), self.entry.get("max_rows")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 < weight < math.inf):
            self._refuse("weight", "a number above 0", weight)
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            self._refuse("max_rows", "a whole number from 1 on", rows)
        return DataSource(
            self._path(),
            self._text("split"),
            self._text("config"),
            self._columns(columns),
            self._text("format"),
            weight,
            rows,
            self._data_split() if "data_split" in self.entry else data_split,
        )

    def _path(self) -> str:
        path = self._text("path")
        if path is None:
            raise UserError(f"{self.place}: expected the key 'path', found {', '.join(map(str, self.entry)) or 'none'}")
        if not os.path.exists(path) and find_known_dataset(path) is None and not is_hub_name(path):
            raise UserError(
                f"{self.place}, key 'path': {path}: no such file or folder (looked for {Path(path).absolute()}), and "
                "no known dataset"
            )
        return path

    def _columns(self, columns: Mapping[str, str]) -> dict[str, str]:
        own = self.entry.get("columns") or {}
        if not isinstance(own, dict):
            self._refuse("columns", "names of columns, as in {prompt: question}", own)
        self._known_keys(own, COLUMN_ROLES, "columns.")
        for role, column in own.items():
            if column is not None and not (isinstance(column, str) and column.strip()):
                self._refuse(f"columns.{role}", "the name of a column", column)
        named = {**columns, **{role: column for role, column in own.items() if column}}
        refuse_shared_columns(named, lambda role: f"{self.place}, key 'columns.{role}':")
        return named

    def _data_split(self) -> str | None:
        shares = self._text("data_split")
        if shares is not None:
            try:
                split_boundaries(shares, 1)
            except UserError:
                self._refuse("data_split", "shares with commas between them, as in 2,4,4, or null for all rows", shares)
        return shares
