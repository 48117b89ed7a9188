"""All ranks together: sums, agreement, and how one rank's failure reaches the others."""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import deepspeed.comm as ds_dist
import torch
import torch.distributed as dist

from utils.process.errors import SharedError, UserError, trouble_with_files
from utils.process.world import get_local_rank, get_world_size


def barrier() -> None:
    if get_world_size() > 1:
        ds_dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, as a new tensor of the same shape; the argument is left alone."""
    total = values.detach().clone()
    if get_world_size() > 1:
        ds_dist.all_reduce(total)
    return total


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum over all ranks, as a new tensor of the same shape."""
    largest = values.detach().clone()
    if get_world_size() > 1:
        ds_dist.all_reduce(largest, op=ds_dist.ReduceOp.MAX)
    return largest


def get_all_reduce_mean(tensor):
    """The mean over ranks. For a mean over rows or tokens, sum the sums and the counts instead."""
    return all_reduce_sum(tensor) / get_world_size()


def all_gather_objects(value) -> list:
    """Small Python values (numbers, strings, dicts) of every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agree(check: Callable[[], None]) -> None:
    """Run a check on every rank; a UserError on any is raised on all, so that no rank waits for the others."""
    problem = None
    try:
        check()
    except UserError as error:
        problem = str(error)
    problems = [message for message in all_gather_objects(problem) if message]
    if problems:
        raise SharedError(problems[0])


def check_same_on_all_nodes(values: dict[str, object]) -> None:
    """Named values that must not differ between ranks: nodes are started, and get their files, one by one.

    Raises:
        UserError: on all ranks, with the name that differs, its two values, and the hosts.
    """
    here = {name: str(value) for name, value in values.items()}
    (first, first_host), *others = all_gather_objects((here, socket.gethostname()))
    for found, host in others:
        for name in first.keys() | found.keys():
            if first.get(name) != found.get(name):
                raise SharedError(
                    f"{name} must be the same on every node: it is {first.get(name)} on {first_host}, the first, and "
                    f"{found.get(name)} on {host}"
                )


_run_id: str | None = None


def _get_run_id() -> str:
    """A name for this launch that all ranks share: markers left by an earlier, failed launch must not be believed."""
    global _run_id
    if _run_id is None:
        _run_id = next(name for name in all_gather_objects(uuid.uuid4().hex) if name)
    return _run_id


def once_per_node(result: Path, build: Callable[[], None], rebuild: bool = False, poll_seconds: float = 0.2) -> None:
    """Let the first rank of each node make ``result`` (a path that appears atomically when complete).

    The other ranks look for the file instead of sitting in a collective, whose timeout a long preparation would
    outlast. If the build fails, its message reaches every rank as UserError.

    Args:
        rebuild: do not trust a result that is there already.
    """
    run_id = _get_run_id()
    if rebuild:
        barrier()  # nobody may find the old result below
        if get_local_rank() == 0:
            result.unlink(missing_ok=True)
        barrier()
    failure = result.with_name(f"{result.name}.{run_id}.failed")
    if get_local_rank() == 0:
        try:
            if not result.exists():
                build()
        except Exception as error:
            message = trouble_with_files(error, result.parent) or str(error) or repr(error)
            with contextlib.suppress(OSError):  # a full disk: the launcher ends the others then
                failure.parent.mkdir(parents=True, exist_ok=True)
                scratch = failure.with_suffix(f".{uuid.uuid4().hex}")  # other nodes may fail at the same place
                scratch.write_text(message)
                os.replace(scratch, failure)
            if isinstance(error, ValueError | OSError | UserError):
                raise SharedError(message) from error
            raise
    else:
        while not result.exists():
            if failure.exists():
                raise SharedError(failure.read_text())
            time.sleep(poll_seconds)
