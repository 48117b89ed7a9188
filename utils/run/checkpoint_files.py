"""A checkpoint as files: read without running code from them, found, told whole from torn."""

import json
import os
import pickle
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from utils.process.errors import UserError
from utils.process.files import flush_to_disk

STATE_FILE, LATEST_FILE, FINISHED_FILE, LOCK_FILE = "state.json", "latest", "finished.json", ".lock"


PREFIX = "step-"


# The classes, beside tensors and plain containers, that DeepSpeed's files hold. Nothing else is ever unpickled.
CLASSES_IN_FILES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class SafeFiles(TorchCheckpointEngine):
    """DeepSpeed's own way to read and write files, but one that runs no code from a file, and that reports a disk
    without room after all ranks have met again: DeepSpeed waits for every rank in the middle of saving."""

    problem: Exception | None = None
    wanted: set[str] = frozenset()  # names of weights that a file of weights must hold

    def makedirs(self, path, exist_ok=False):
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.problem = self.problem or error

    def save(self, state_dict, path: str):
        try:
            torch.save(state_dict, path)
            flush_to_disk(path)
        except (OSError, RuntimeError) as error:  # torch's zip writer wraps the error of the file
            self.problem = self.problem or error

    def load(self, path: str, map_location=None):
        try:
            with torch.serialization.safe_globals(CLASSES_IN_FILES):
                content = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"--resume: {path} could not be read: it is no file of weights, or holds more than tensors and "
                f"{', '.join(kind.__name__ for kind in CLASSES_IN_FILES)}, and nothing else is ever loaded"
            ) from error
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise UserError(f"--resume: {path} could not be read: {error or type(error).__name__}") from error
        if not isinstance(content, dict) or (
            "module" in content and (missing := sorted(self.wanted - content["module"].keys()))
        ):
            what = f"the weight {missing[0]}" if isinstance(content, dict) else "any weights"
            raise UserError(f"--resume: {path} does not hold {what}")
        return content


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk that is complete."""

    folder: Path
    state: dict


FINISHED = {"steps": int, "saved_at": float, "world_size": int, "flags": dict, "models": dict, "versions": dict}


STATE = FINISHED | {"rows": str, "metrics": dict, "files": dict, "position": list}


MAX_STATE_BYTES = 64 * 2**20


def _read_small(file: Path) -> str:
    """Raises ValueError for what is no file of a reasonable size: a pipe would be waited for, a device has no end."""
    if not file.is_file() or file.stat().st_size > MAX_STATE_BYTES:
        raise ValueError("it is missing, or no file, or a very large one")
    return file.read_text()


def _check_kinds(state: dict, kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{name} is {json.dumps(state.get(name))[:80]}")


def read_checkpoint(folder: Path) -> Found:
    """Raises UserError: no checkpoint, or one that is not whole, with the file."""
    try:
        state = json.loads(_read_small(folder / STATE_FILE))
        _check_kinds(state, STATE)
        epoch, done = state["position"]
        numbers = [epoch, done, state["steps"], *state["files"].values()]
        numbers += [number for size_and_checksum in state["metrics"]["files"].values() for number in size_and_checksum]
        float(state["metrics"]["seconds"])
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("positions, steps, sizes and checksums are whole numbers from 0 on")
        ranks = range(min(state["world_size"], len(state["files"]) + 1))
        if missing := [file for file in (f"rank{rank:05d}.json" for rank in ranks) if file not in state["files"]]:
            raise ValueError(f"files does not name {missing[0]}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is no checkpoint: {STATE_FILE}: {error}") from error
    for name, size in state["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} is no checkpoint: {STATE_FILE} names {name}, outside of it")
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{folder} is not a whole checkpoint: {name} is missing or not {size} bytes long")
    return Found(folder, state)


def complete_checkpoints(folder: Path) -> list[Found]:
    """Oldest first."""
    found = []
    for entry in folder.glob(f"{PREFIX}*"):
        with suppress(UserError):
            found.append(read_checkpoint(entry))
    return sorted(found, key=lambda checkpoint: checkpoint.state["saved_at"])


def newest_checkpoint(folder: Path) -> Found | None:
    """What ``latest`` names, else the newest that is whole."""
    with suppress(OSError, ValueError, UserError):
        return read_checkpoint(folder / Path(_read_small(folder / LATEST_FILE).strip()).name)
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def _remove(checkpoint: Path) -> None:
    """In one step it is no checkpoint any more; what a kill leaves of it goes at the next start."""
    going = checkpoint.with_name(f".{checkpoint.name}-going")
    checkpoint.rename(going)
    shutil.rmtree(going, ignore_errors=True)
