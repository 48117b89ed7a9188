"""A folder of checkpoints: what lies in it, which checkpoints are whole, and whose it is."""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.process.errors import UserError
from utils.process.ranks import agree, all_gather_objects
from utils.process.world import get_local_rank, get_rank

STATE_FILE, LATEST_FILE, FINISHED_FILE, LOCK_FILE = "state.json", "latest", "finished.json", ".lock"
PREFIX = "step-"
# What the state files must hold: name -> type.
FINISHED = {"steps": int, "saved_at": float, "world_size": int, "flags": dict, "models": dict, "versions": dict}
STATE = FINISHED | {"rows": str, "metrics": dict, "files": dict, "position": list}
MAX_STATE_BYTES = 64 * 2**20
LOCK_SECONDS = 120  # how long a start waits for the end of the run before it; a dead NFS client keeps locks for 90


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on disk that is complete, with the content of its state file."""

    folder: Path
    state: dict


# ---------------------------------------------------------------- reading


def read_small_file(file: Path) -> str:
    """Raises ValueError for what is no file of a reasonable size: a pipe would be waited for, a device has no end."""
    if not file.is_file() or file.stat().st_size > MAX_STATE_BYTES:
        raise ValueError("it is missing, or no file, or a very large one")
    return file.read_text()


def read_state(file: Path, types: dict[str, type]) -> dict:
    """The content of a state file. Raises ValueError and the like for what is none."""
    state = json.loads(read_small_file(file))
    for name, kind in types.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{name} is {json.dumps(state.get(name))[:80]}")
    return state


NO_STATE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what read_state raises


def read_finished(folder: Path) -> dict | None:
    """What a run that has finished left there; None if none has."""
    with suppress(*NO_STATE):
        return read_state(folder / FINISHED_FILE, FINISHED)
    return None


def read_checkpoint(folder: Path) -> SavedCheckpoint:
    """Raises UserError: no checkpoint, or one that is not whole, with the file."""
    try:
        state = read_state(folder / STATE_FILE, STATE)
        epoch, done = state["position"]
        numbers = [epoch, done, state["steps"], *state["files"].values()]
        numbers += [number for size_and_checksum in state["metrics"]["files"].values() for number in size_and_checksum]
        float(state["metrics"]["seconds"])
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("positions, steps, sizes and checksums are whole numbers from 0 on")
        ranks = range(min(state["world_size"], len(state["files"]) + 1))
        if missing := [file for file in map(rank_file, ranks) if file not in state["files"]]:
            raise ValueError(f"files does not name {missing[0]}")
    except NO_STATE as error:
        raise UserError(f"{folder} is no checkpoint: {STATE_FILE}: {error}") from error
    for name, size in state["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} is no checkpoint: {STATE_FILE} names {name}, outside of it")
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{folder} is not a whole checkpoint: {name} is missing or not {size} bytes long")
    return SavedCheckpoint(folder, state)


def rank_file(rank: int) -> str:
    """Name of the file with the small state of a rank."""
    return f"rank{rank:05d}.json"


def complete_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    """Oldest first."""
    complete = []
    for entry in folder.glob(f"{PREFIX}*"):
        with suppress(UserError):
            complete.append(read_checkpoint(entry))
    return sorted(complete, key=lambda checkpoint: checkpoint.state["saved_at"])


def newest_checkpoint(folder: Path) -> SavedCheckpoint | None:
    """What ``latest`` names, else the newest that is whole."""
    with suppress(OSError, ValueError, UserError):
        return read_checkpoint(folder / Path(read_small_file(folder / LATEST_FILE).strip()).name)
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def remove_checkpoint(checkpoint: Path) -> None:
    """In one step it is no checkpoint any more; what a kill leaves of it goes at the next start."""
    going = checkpoint.with_name(f".{checkpoint.name}-going")
    checkpoint.rename(going)
    shutil.rmtree(going, ignore_errors=True)


# ---------------------------------------------------------------- whose folder it is


def take_folder(folder: Path) -> int:
    """Make the folder this process's own until it ends: two runs that write the same checkpoints would ruin them.

    Waits for the end of a run that has it, and removes what a killed one left half-written.

    Returns:
        the descriptor of the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"--checkpoint_dir {folder}: cannot be written: {error.strerror}") from error
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                break
            if time.monotonic() > end:
                raise UserError(
                    f"--checkpoint_dir {folder}: another run that is not over writes its checkpoints there"
                ) from error
            time.sleep(0.5)
    for scratch in folder.glob(f".{PREFIX}*"):
        _remove_half_written(scratch)
    return lock


def _remove_half_written(scratch: Path) -> None:
    """Again and again for some seconds: a process of the killed run may still put files into it."""
    end = time.monotonic() + LOCK_SECONDS
    while scratch.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        if scratch.exists() and time.monotonic() > end:
            raise UserError(f"{scratch}, which a killed run left half-written, cannot be removed: remove it by hand")


def check_shared_folder(folder: Path) -> None:
    """Refuse a folder of which each node has its own: every rank writes its part of a checkpoint there.

    Every rank must call this; the UserError names the host.
    """
    mark = f".node-{all_gather_objects(uuid.uuid4().hex)[0]}-"
    own = folder / f"{mark}{get_rank()}"

    def write_mark() -> None:
        try:
            if get_local_rank() == 0:
                own.touch()
        except OSError as error:
            raise refusal(error.strerror) from error

    def check_mark_of_first_node() -> None:
        if not (folder / f"{mark}0").exists():
            raise refusal("what the first node writes there is not to be seen")

    def refusal(reason: str) -> UserError:
        return UserError(
            f"--checkpoint_dir {folder}: on {socket.gethostname()}: {reason}; checkpoints of several nodes "
            "belong on storage that all of them share"
        )

    try:
        agree(write_mark)
        agree(check_mark_of_first_node)
    finally:
        own.unlink(missing_ok=True)
