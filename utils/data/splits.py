"""Where the rows of a split come from: files, folders, datasets on disk or on the hub.

What lies side by side under one path is never merged unasked: variants of a dataset ("main", "socratic") are its
configurations, and training splits of several kinds ("train_prefs", "train_sft") its splits. The caller chooses.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import RepositoryNotFoundError

from utils.data.errors import DataError, error_line
from utils.data.fingerprints import content_fingerprint, text_fingerprint
from utils.data.readers import READERS, file_kind, open_file, without_packing
from utils.data.rows import ConcatRows, HuggingFaceRows, Rows
from utils.process.console import print_rank_0
from utils.process.hub import HUB_NAME, trouble_with_hub

EVAL_SPLITS = ("eval", "validation", "valid", "val", "dev", "test")  # names of the eval split, the first found counts
# Files of the hub's layout that describe a dataset and hold no rows.
METADATA_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
SPLIT_IN_NAME = re.compile(
    r"(?:^|(?<=[^a-z]))(train|eval|validation|valid|val|dev|test)(?:ing)?(?![a-z])", re.IGNORECASE
)
# "-00000-of-00004-0a1b2c3d4e5f6a7b", "_3", ".part2", or a name that is nothing else: a piece of a split.
SHARD = re.compile(r"(?:^|[-_.])(?:part|shard|chunk)?[-_]?\d+(?:[-_]of[-_]\d+(?:-[0-9a-f]{6,})?)?$", re.IGNORECASE)
ALL = "all"  # a choice: every configuration, or every training split


class Flags(NamedTuple):
    """The flags by which the user of an error message would choose."""

    config: str = "--dataset_config"
    split: str = "--dataset_split"


class Splits:
    """Split name -> rows, each opened when first asked for. A split that is not there is a DataError.

    Args:
        openers: of "train" and the evaluation split.
        others: of further names by which [] finds rows; they are not ``in`` the splits.
    """

    def __init__(
        self,
        label: str,
        openers: Mapping[str, Callable[[], Rows]],
        hash_content: Callable[[], str],
        notes: str,
        others: Mapping[str, Callable[[], Rows]] | None = None,
    ):
        self.label = label
        self.notes = notes
        self._openers = openers
        self._others = others or {}
        self._hash_content = hash_content
        self._open: dict[str, Rows] = {}
        self._columns: list[str] | None = None

    def __getitem__(self, split: str) -> Rows:
        opener = self._openers.get(split) or self._others.get(split)
        if opener is None:
            found = ", ".join(dict.fromkeys([*self._openers, *self._others]))
            raise DataError(f"{self.label}: expected a split {split!r}, found only: {found}")
        if split not in self._open:
            self._open[split] = opener()
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
    return f"the columns {first_names(list(map(repr, rows.column_names)))}" if rows.column_names else "no columns"


def first_names(names: Sequence[str], most: int = 20) -> str:
    """Names with commas between them; those beyond ``most`` are only counted."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------- which of several splits


def kind_of_split(name: str) -> str | None:
    """The word in a split's name that says what it is for, "train" or one of EVAL_SPLITS; None without one."""
    found = SPLIT_IN_NAME.search(name)
    return found and found[1].lower()


def _family(name: str) -> str:
    """The name without that word: the same for "train_prefs" and "test_prefs"."""
    return SPLIT_IN_NAME.sub("{}", name, count=1).lower()


def choose_splits(
    label: str, names: Sequence[str], wanted: str | None, flags: Flags
) -> dict[str, list[str] | DataError]:
    """ "train" and the evaluation splits -> the names that they are made of, or why that cannot be known.

    Args:
        names: all that are there.
        wanted: names with commas between them, or "all" for all training splits and all evaluation splits. Names with
            a word for evaluation are evaluated with, where another is there to train on. Is none of them given, the
            split that is named like the training split is found: test_prefs beside train_prefs, or a plain test.

    Raises:
        DataError: a wanted name is not there.
    """
    kinds = {name: kind_of_split(name) for name in names}
    if wanted == ALL and ALL not in names:
        return {kind: [name for name in names if kinds[name] == kind] for kind in kinds.values() if kind}
    if wanted:
        return _wanted_splits(label, kinds, [name.strip() for name in wanted.split(",")], flags)
    chosen: dict[str, list[str] | DataError] = {}
    families = ["{}"]
    for kind in ("train", *EVAL_SPLITS):
        found = [name for name in names if kinds[name] == kind]
        if found:
            chosen[kind] = _the_one(label, found, families, flags)
        elif kind == "train":
            there = ", ".join(names)
            chosen[kind] = DataError(
                f"{label}: expected a split 'train', found only: {there}; choose with {flags.split} {names[0]}"
            )
        if kind == "train" and isinstance(chosen[kind], list):
            families = [_family(chosen[kind][0]), "{}"]
    return chosen


def _the_one(label: str, names: list[str], families: list[str], flags: Flags) -> list[str] | DataError:
    """The name that is alone, or the first of one of these families."""
    if len(names) == 1:
        return names
    for family in families:
        if alike := [name for name in names if _family(name) == family]:
            return alike
    return DataError(
        f"{label}: found several splits of one kind, {', '.join(names)}; choose with {flags.split} {names[0]} "
        "(or several, with commas between them)"
    )


def _wanted_splits(label: str, kinds: dict[str, str | None], wanted: list[str], flags: Flags) -> dict[str, list[str]]:
    absent = [name for name in wanted if name not in kinds]
    if absent:
        raise DataError(f"{label}: {flags.split} {absent[0]}: no such split; there are {', '.join(kinds)}")
    evaluation = [name for name in wanted if kinds[name] in EVAL_SPLITS]
    training = [name for name in wanted if name not in evaluation]
    if not training:
        training, evaluation = evaluation, []
    elif not evaluation:
        others = [name for name in kinds if kinds[name] in EVAL_SPLITS]
        families = {_family(name) for name in training}
        evaluation = [name for name in others if _family(name) in families] or [n for n in others if _family(n) == "{}"]
    chosen = {"train": training}
    for name in evaluation:
        chosen.setdefault(kinds[name], []).append(name)
    return chosen


def _splits(
    label: str,
    chosen: Mapping[str, list[str] | DataError],
    openers: Mapping[str, Callable[[], list[Rows]]],
    hash_names: Callable[[list[str]], str],
    describe: Callable[[list[str]], str],
) -> Splits:
    """The splits of chosen names, each of which ``openers`` open as one or more rows."""

    def opener(names: list[str] | DataError) -> Callable[[], Rows]:
        def open_names() -> Rows:
            if isinstance(names, DataError):
                raise names
            parts = [rows for name in names for rows in openers[name]()]
            return parts[0] if len(parts) == 1 else ConcatRows(parts)

        return open_names

    read = {split: names for split, names in chosen.items() if not isinstance(names, DataError)}

    def hash_content() -> str:
        return text_fingerprint([f"{split} {hash_names(names)}" for split, names in sorted(read.items())])

    used = {name for names in read.values() for name in names}
    notes = [f"{split}: {describe(names)}" for split, names in read.items()]
    if rest := [name for name in openers if name not in used]:
        notes.append(f"not read: {describe(rest)}")
    return Splits(
        label,
        {split: opener(names) for split, names in chosen.items()},
        hash_content,
        "; ".join(notes),
        {name: opener([name]) for name in openers},
    )


# ---------------------------------------------------------------- files and folders


def refuse_model(path: Path) -> None:
    """Raises: DataError for the folder of a model, or of step 3's models: json files lie there too, and are no data."""
    for folder in (path, path / "actor"):
        config = next((name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()), None)
        weights = [file.name for kind in ("*.safetensors", "*.bin") for file in sorted(folder.glob(kind))]
        if config and weights:
            raise DataError(
                f"{path} is a model folder ({folder / config} beside {weights[0]}); here a file, a folder or a name of "
                "data is expected; models are given by flags that end in model_name_or_path"
            )


def open_splits(
    path: str | os.PathLike, config: str | None = None, split: str | None = None, flags: Flags | None = None
) -> Splits:
    """The splits of a file (one, "train"), a folder of data files or a `save_to_disk` folder.

    In a folder the split of a file shows in its name, or else in the names of its folders: "data/train-00000.parquet",
    "default/train/0000.parquet", "hh_test.jsonl". Without any such name all files are the train split. Other folders
    are configurations: "main/train.jsonl" and "socratic/train.jsonl".

    Args:
        config: the configurations to read, with commas between them, or "all".
        split: see choose_splits.
        flags: how the caller's user names these two.

    Raises:
        DataError: nothing to read there, or several that could be meant; the error of a split comes when it is opened.
    """
    path, flags = Path(path), flags or Flags()
    refuse_model(path)
    if path.is_file():
        if split or (config and config != ALL):
            flag = f"{flags.split} {split}" if split else f"{flags.config} {config}"
            raise DataError(f"{path}: {flag}: a single file has nothing to choose from")
        return splits_of_files(path, {"train": [path]}, [])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if config and config != ALL:
            raise DataError(f"{path}: {flags.config} {config}: a save_to_disk folder has no configurations")
        return _saved_splits(path, split, flags)

    files = _data_files(path)
    if not files:
        raise DataError(f"{path}: expected data files ({', '.join(READERS)}) or a save_to_disk folder, found none")
    files = _of_config(path, files, config, flags)
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(_split_name(file.relative_to(path)) or "", []).append(file)
    unnamed = by_name.pop("", [])
    if split not in (None, ALL) and unnamed:  # without a word for what they are, by their names
        for file in unnamed:
            by_name.setdefault(_without_shard(_stem(file)) or file.name, []).append(file)
        unnamed = []
    elif not by_name:
        by_name, unnamed = {"train": unnamed}, []
    for name, parts in by_name.items():
        if len({file_kind(part) for part in parts}) > 1:
            names = ", ".join(str(part.relative_to(path)) for part in parts)
            raise DataError(f"{path}: expected files of one kind for the split {name!r}, found: {names}")
        refuse_packed_twice(path, parts)
    return splits_of_files(path, by_name, unnamed, choose_splits(str(path), list(by_name), split, flags))


def refuse_packed_twice(root: Path, files: Sequence[Path]) -> None:
    """Raises: DataError for a file beside a packed copy of itself, whose rows would all be read twice."""
    unpacked: dict[Path, Path] = {}
    for file in files:
        other = unpacked.setdefault(file.with_name(without_packing(file.name)), file)
        if other != file:
            names = f"{other.relative_to(root)} and {file.relative_to(root)}"
            raise DataError(f"{root}: expected each file once, packed or not, found: {names}; move one of them away")


def _data_files(folder: Path) -> list[Path]:
    files = sorted(item for item in folder.rglob("*") if _is_data_file(item, folder))
    # A text beside data files is a licence, say.
    return [file for file in files if file_kind(file) != ".txt"] or files


def _is_data_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file_kind(file) is not None and file.name not in METADATA_FILES and file.is_file()


def _stem(file: Path) -> str:
    """The name without ".jsonl.gz"."""
    kind = file_kind(file)
    return file.name[: file.name.lower().rindex(kind)]


def _without_shard(name: str) -> str:
    while shorter := SHARD.sub("", name):
        if shorter == name:
            break
        name = shorter
    return shorter


def _split_name(relative: Path) -> str | None:
    for part in (_stem(relative), *reversed(relative.parts[:-1])):
        if kind_of_split(part):
            name = _without_shard(part)
            bare = name.rstrip("0123456789")  # train00, train01
            name = bare if SPLIT_IN_NAME.search(name).end() == len(bare) else name
            return name.lower() if name.lower() == kind_of_split(part) else name
    return None


def _config_of(relative: Path) -> tuple[str, ...]:
    """The folders of a file that name neither a split nor a piece of one."""
    return tuple(part for part in relative.parts[:-1] if not kind_of_split(part) and _without_shard(part))


def _of_config(root: Path, files: list[Path], wanted: str | None, flags: Flags) -> list[Path]:
    """The files of the wanted configurations; where none is wanted, of the only one that has rows to train on."""
    folders = {file: _config_of(file.relative_to(root)) for file in files}
    names = {file: "/".join(folders[file]) or "." for file in files}
    if wanted is not None:
        return _of_wanted_config(root, files, names, wanted, flags)
    kinds = {file: kind_of_split(_split_name(file.relative_to(root)) or "") for file in files}
    kept = [file for file in files if kinds[file] is None]
    training: set[str] = set()
    for kind in ("train", *EVAL_SPLITS):
        alike = [file for file in files if kinds[file] == kind]
        alike = [file for file in alike if names[file] in training] or alike
        found = list(dict.fromkeys(names[file] for file in alike))
        if len(found) > 1:
            raise DataError(
                f"{root}: found several configurations, {', '.join(found)}; choose with {flags.config} {found[0]} "
                f"(or several, with commas between them, or {ALL})"
            )
        training = training or set(found)
        kept += alike
    return sorted(kept)


def _of_wanted_config(root: Path, files: list[Path], names: dict[Path, str], wanted: str, flags: Flags) -> list[Path]:
    kept: list[Path] = []
    for config in (name.strip() for name in wanted.split(",")):
        # A variant may also be one file: all.jsonl beside law.jsonl.
        variant = [f for f in files if config in (names[f], *f.relative_to(root).parts[:-1], f.name.split(".")[0])]
        if not variant and config == ALL:
            return files
        if not variant:
            there = ", ".join(dict.fromkeys(names.values()))
            raise DataError(f"{root}: {flags.config} {config}: no such configuration; there are {there}")
        kept += variant
    return sorted(set(kept))


def splits_of_files(
    root: Path,
    by_name: dict[str, list[Path]],
    ignored: list[Path],
    chosen: Mapping[str, list[str] | DataError] | None = None,
) -> Splits:
    """The splits of files by their names; ``chosen``: which names make a split, None: each one of its own."""

    def opener(files: list[Path]) -> Callable[[], list[Rows]]:
        return lambda: [open_file(file) for file in files]

    def listed(files: list[Path]) -> str:
        names = [str(file.relative_to(root)) if file != root else file.name for file in files]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def files_of(names: list[str]) -> list[Path]:
        return [file for name in names for file in by_name[name]]

    splits = _splits(
        str(root),
        {name: [name] for name in by_name} if chosen is None else chosen,
        {name: opener(files) for name, files in by_name.items()},
        lambda names: content_fingerprint(files_of(names)),
        lambda names: listed(files_of(names)),
    )
    if ignored:
        splits.notes += f"; not read, for want of a split in the name: {listed(ignored)}"
    return splits


# ---------------------------------------------------------------- the datasets library


def _saved_splits(path: Path, split: str | None, flags: Flags) -> Splits:
    """The splits of a folder that datasets' save_to_disk has written."""
    import datasets  # takes a second and loads pandas: only where it is needed

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its parsers raise; all of it means the same here
        raise DataError(
            f"{path}: expected a save_to_disk folder, but it cannot be loaded: {error_line(error)}"
        ) from error
    return _huggingface_splits(str(path), [loaded], split, flags, lambda names: f"{names} {content_fingerprint(path)}")


def is_hub_name(name: str) -> bool:
    """Whether it may be "owner/name" of a dataset on the hub, and not a path to a file."""
    return HUB_NAME.fullmatch(name) is not None and file_kind(name) is None


def splits_of_hub(
    hub_name: str, config: str | None, tried: Sequence[Path], split: str | None = None, flags: Flags | None = None
) -> Splits:
    """The splits of a dataset on the Hugging Face hub (or in the local cache of an earlier download).

    Args:
        config, split, flags: as in open_splits.
        tried: where a local copy was looked for.

    Raises:
        DataError: no such dataset, or the hub is out of reach; said within seconds, with the way to a local copy.
    """
    import datasets  # as above

    flags = flags or Flags()
    trouble = trouble_with_hub(hub_name, "dataset")
    if isinstance(trouble, RepositoryNotFoundError):
        raise DataError(
            f"dataset {hub_name!r}: not found locally ({_places(tried)}), and the hub has none of this name, or it is "
            "private: log in with `hf auth login`"
        ) from trouble
    try:
        with _offline(datasets, trouble is not None):
            loaded = [datasets.load_dataset(hub_name, name) for name in _configs_of_hub(datasets, hub_name, config)]
    except Exception as error:  # network, hub and parser errors share no base class
        if "onfig" in str(error) and isinstance(error, ValueError):  # it lists those that there are
            raise DataError(f"dataset {hub_name!r}: choose with {flags.config}: {error_line(error)}") from error
        raise DataError(
            f"dataset {hub_name!r}: not found locally ({_places(tried)}) and could not be downloaded because "
            f"{error_line(trouble or error)}.\nWhere there is a network: hf download --repo-type dataset {hub_name} "
            f"--local-dir data/{hub_name}; then --data_path data/{hub_name}"
        ) from error

    if trouble is not None:
        print_rank_0(f"dataset {hub_name}: read from an earlier download, since the hub does not answer")

    def hash_names(names: list[str]) -> str:
        return text_fingerprint([f"{name} {one[name]._fingerprint}" for name in names for one in loaded if name in one])

    return _huggingface_splits(hub_name, loaded, split, flags, hash_names)


def _places(tried: Sequence[Path]) -> str:
    return f"looked for {' or '.join(map(str, tried))}"


@contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """Only the local cache is asked meanwhile, if ``offline``."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _configs_of_hub(datasets: Any, hub_name: str, config: str | None) -> list[str | None]:
    if config is None:
        return [None]
    names: list[str | None] = [name.strip() for name in config.split(",")]
    if names == [ALL]:
        with suppress(Exception):  # a list that cannot be had; loading says why
            there = datasets.get_dataset_config_names(hub_name)
            names = names if ALL in there else there
    return names


def _huggingface_splits(
    label: str, loaded: Sequence[Any], split: str | None, flags: Flags, hash_names: Callable[[list[str]], str]
) -> Splits:
    by_name: dict[str, list[Any]] = {}
    for one in loaded:
        for name, data in one.items() if isinstance(one, Mapping) else [("train", one)]:
            by_name.setdefault(name, []).append(data)

    def opener(name: str) -> Callable[[], list[Rows]]:
        return lambda: [HuggingFaceRows(data, f"{label}, split {name}") for data in by_name[name]]

    chosen = choose_splits(label, list(by_name), split, flags)
    openers = {name: opener(name) for name in by_name}
    return _splits(label, chosen, openers, hash_names, lambda names: ", ".join(names))
