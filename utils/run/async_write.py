"""Files of a checkpoint that are written while training goes on: copied at once, written by a thread.

DeepSpeed's own engine for this ("decoupled") sends a process the optimizer's tensors themselves, not copies, so that
the next step waits for it; it does not start at ZeRO 1 and 2 in its version of today, goes on in silence where that
process has died, and names a checkpoint ``latest`` when rank 0 is done, whatever the others are.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.model.shards import SafetensorsWriter
from utils.process.files import flush_to_disk

Write = Callable[[Any, str | Path], None]  # (content, path): a whole file, to the disk
Put = Callable[[Write, Any, str | Path], None]  # how a file comes about: now, or later


def write_now(write: Write, content, path: str | Path) -> None:
    write(content, path)


class WritesBeside:
    """Takes copies of what the files of this rank shall hold; a thread writes them once all are there."""

    def __init__(self):
        self._writes: list[Callable[[], None]] = []
        self._written: Future | None = None

    def put(self, write: Write, content, path: str | Path) -> None:
        self._writes.append(partial(write, host_copy(content), path))

    def start(self) -> None:
        # Not a daemon: Python waits for it at its end, in which a thread that still computes may crash.
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._written = executor.submit(self._write_all)
        executor.shutdown(wait=False)

    def _write_all(self) -> None:
        self._writes.reverse()
        while self._writes:
            self._writes.pop()()  # and its copy is free

    def done(self) -> bool:
        return self._written.done()

    def wait(self) -> None:
        """Raises what went wrong in the thread."""
        self._written.result()


def write_tensors(content: dict, path: str | Path) -> None:
    """By torch.save, to the disk."""
    torch.save(content, path)
    flush_to_disk(path)


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As the safetensors library does, which would keep Python, and so training, waiting."""
    writer = SafetensorsWriter(path, tensors)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    finally:
        writer.close()
    flush_to_disk(path)


def host_copy(value, copies: dict | None = None):
    """A nested state whose tensors lie in host memory of their own, for torch.save to write the same file.

    Tensors that share memory still do, and an object that stands in two places is still one.

    Args:
        copies: of what has been met, by id.
    """
    copies = {} if copies is None else copies
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, torch.Tensor):
        copied = _host_tensor(value, copies)
    elif isinstance(value, dict):
        copied = copies[id(value)] = copy.copy(value)  # its kind, with its order
        copied.update({key: host_copy(part, copies) for key, part in value.items()})
    elif type(value) in (list, tuple):
        copied = type(value)(host_copy(part, copies) for part in value)
    else:
        copied = copy.deepcopy(value)
    return copies.setdefault(id(value), copied)


def _host_tensor(tensor: torch.Tensor, copies: dict) -> torch.Tensor:
    storage = tensor.untyped_storage()
    key = "memory", storage._cdata
    if key not in copies:
        copies[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
    memory = copies[key]
    copied = torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(tensor, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied)
    vars(copied).update(host_copy(vars(tensor), copies))  # DeepSpeed notes things on its tensors, torch.save keeps them
    return copied.requires_grad_(tensor.requires_grad)
