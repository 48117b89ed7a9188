"""Writing files so that a kill leaves the old content or the new, never a part; checks of where they go."""

import contextlib
import fcntl
import glob
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from utils.process.errors import UserError

METRICS_FILE = "metrics.jsonl"  # of a run, in its output folder
MODEL_FOLDERS = ("", "actor", "critic", "actor_ema")  # where runs leave models in theirs
BEST_FOLDER, SAVED_FOLDER = "best", re.compile(r"step-(\d{6,})")  # and where they keep others, with the same parts


def check_writable(path: str | None):
    """UserError now, rather than after an hour of generating, if a file cannot be written there."""
    if path is None:
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of {path} cannot be made: {error}") from error
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise UserError(f"{path} cannot be written")


def check_output_dir(output_dir: str | None, flag: str = "--output_dir") -> None:
    """Raise UserError if the folder cannot be made or written to, before any work is spent."""
    if output_dir is None:
        return
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_beside(folder / "write-test") as probe:
            probe.write_bytes(b"")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {output_dir}: cannot be written: {getattr(error, 'strerror', error)}") from error


def model_folders(output_dir: str | os.PathLike) -> list[Path]:
    """The folders that runs save models to, as far as they are there; those inside before those around them.

    Folders that are links lead elsewhere and are left out.
    """
    output = Path(output_dir)
    entries = sorted(output.iterdir()) if output.is_dir() else []
    kept = [entry for entry in entries if entry.name == BEST_FOLDER or SAVED_FOLDER.fullmatch(entry.name)]
    parts = [part / name for part in (output, *kept) for name in MODEL_FOLDERS]
    folders = [folder for part in parts for folder in (part / "adapter", part)]
    inside_first = sorted(folders, key=lambda folder: -len(folder.parts))
    return [folder for folder in inside_first if folder.is_dir() and not _is_behind_link(folder, output)]


def _is_behind_link(folder: Path, output: Path) -> bool:
    return folder != output and (folder.is_symlink() or _is_behind_link(folder.parent, output))


def holds_model(folder: Path) -> bool:
    """Whether a folder has weights and a configuration that belongs to them."""
    configured = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    return configured and any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def results_in(output_dir: str) -> list[str]:
    """What earlier runs left in an output folder: their models and metrics, for a message."""
    folders = (Path(output_dir) / name for name in MODEL_FOLDERS)
    found = [f"a model ({folder})" for folder in folders if holds_model(folder)]
    metrics = Path(output_dir) / METRICS_FILE
    if metrics.is_file() and metrics.stat().st_size:
        found.append(f"a run's metrics ({metrics})")
    return found


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Make a file and lock it while open: one that is found unlocked was left by a process that was killed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        os.close(descriptor)  # someone removed it as left over before it was locked
    try:
        yield
    finally:
        os.close(descriptor)


def remove_left_over(path: Path, remove: Callable[[], None]) -> None:
    """Call ``remove`` if a ``locked_file`` is locked no more; not where that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        remove()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_beside(path: str | os.PathLike) -> Iterator[Path]:
    """A name in the file's folder, to write it under and then rename; gone at the end, whatever happened.

    No one else has it: on a file system that several nodes share a process id would not do. What killed processes left
    of the same file goes.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        remove_left_over(left, partial(left.unlink, missing_ok=True))
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}")
    try:
        with locked_file(scratch):
            yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, flush: bool = False):
    """Write a file whole: a kill leaves the old file or the new one; with ``flush`` a power cut does too."""
    with scratch_beside(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
        if flush:
            flush_to_disk(scratch)
        scratch.replace(path)


def flush_to_disk(path: str | os.PathLike) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def name_if_new(scratch: Path, path: Path) -> None:
    """Give a finished file its name, unless there is one of that name by now.

    For a file that others map into memory as soon as they find it: one that is replaced on a network drive is gone for
    the other nodes.
    """
    try:
        os.link(scratch, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        scratch.replace(path)


def write_jsonl(path: str, rows: list[dict]):
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
