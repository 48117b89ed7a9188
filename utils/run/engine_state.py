"""What a checkpoint holds of DeepSpeed's engines: their shards, and the weights of a moving average."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.process.errors import UserError, trouble_between_ranks
from utils.process.world import get_rank
from utils.run.async_write import Put, write_now, write_safetensors, write_tensors

# The classes, beside tensors and plain containers, that DeepSpeed's files hold. Nothing else is ever unpickled.
CLASSES_IN_FILES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own way to read and write files, but one that runs no code from a file, and that reports a disk
    without room after all ranks have met again: DeepSpeed waits for every rank in the middle of saving."""

    put: Put = staticmethod(write_now)
    write_error: Exception | None = None  # the first one
    wanted: set[str] = frozenset()  # names of weights that a file of weights must hold

    def makedirs(self, path, exist_ok=False):
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.write_error = self.write_error or error

    def save(self, state_dict, path: str):
        try:
            self.put(write_tensors, state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer wraps the error of the file
            self.write_error = self.write_error or error

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


@contextmanager
def refused_content(file: Path) -> Iterator[None]:
    """While open, whatever goes wrong because a checkpoint's file holds something else is a UserError that names it."""
    wrong = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError, OverflowError)
    try:
        yield
    except (*wrong, OSError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or trouble_between_ranks(error):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"--resume: {file} does not hold what a checkpoint of this run does: {reason}") from error


# ---------------------------------------------------------------- engines that train


def prepare_engine(engine) -> None:
    """Let an engine save and load as its checkpoints here need it."""
    engine.checkpoint_engine = SafeCheckpointEngine()
    # Among the shards DeepSpeed puts a script of its own, on rank 0 alone: no use here, and on a full disk the others
    # would wait for rank 0.
    engine._copy_recovery_script = lambda folder: None


def save_engine(engine, folder: Path, name: str, put: Put = write_now) -> Exception | None:
    """Write this rank's shards under ``folder/name``; on all ranks. Returns why that was not possible here."""
    engine.checkpoint_engine.write_error, engine.checkpoint_engine.put = None, put
    engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)
    return engine.checkpoint_engine.write_error


def load_engine(engine, folder: Path, name: str) -> None:
    """Take in what ``save_engine`` wrote; on all ranks. Raises UserError for other content."""
    engine.checkpoint_engine.wanted = {key for key, param in engine.module.named_parameters() if param.requires_grad}
    with refused_content(folder / name):
        # What is frozen is not in the files: it came from the model that the run starts from, as it did then.
        loaded, _ = engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)
        if loaded is None:
            raise ValueError("no weights")


def has_finite_weights(engine) -> bool:
    """Whether this rank's part of the weights that train is finite."""
    parts = (getattr(param, "ds_tensor", param) for param in engine.module.parameters() if param.requires_grad)
    return all(part.isfinite().all() for part in parts)


# ---------------------------------------------------------------- moving averages


def save_average(average, followed, folder: Path, name: str, put: Put = write_now) -> None:
    """Write this rank's part of a moving average; where each rank has all of it, rank 0's.

    Args:
        average, followed: the engine of the average, and the engine whose weights it averages.
    """
    if get_rank() == 0 or _is_sharded(average):
        put(write_safetensors, dict(averaged_parts(average, followed)), _average_file(average, folder, name))


def load_average(average, followed, folder: Path, name: str) -> None:
    """Take in what ``save_average`` wrote. Raises UserError for other content."""
    file = _average_file(average, folder, name)
    with refused_content(file):
        saved = load_file(file)
        for key, target in averaged_parts(average, followed):
            if saved[key].shape != target.shape:
                raise ValueError(f"{key} has the shape {list(saved[key].shape)}")
            target.copy_(saved[key])


def _is_sharded(engine) -> bool:
    return any(hasattr(param, "ds_id") for param in engine.module.parameters())


def _average_file(average, folder: Path, name: str) -> Path:
    return folder / f"{name}-rank{get_rank() if _is_sharded(average) else 0:05d}.safetensors"


def averaged_parts(average, followed) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of each weight of an average that changes: of those that train."""
    pairs = zip(average.module.named_parameters(), followed.module.parameters(), strict=True)
    for (name, param), source in pairs:
        if source.requires_grad:
            yield name, (param.ds_tensor if hasattr(param, "ds_id") else param).data
