"""Which of the run's processes this is. Imports nothing heavy, so that scripts that only print start at once."""

import os
import sys


def _process_group():
    """torch.distributed, once a process group is there; None before, and where torch is not even imported."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def get_rank() -> int:
    group = _process_group()
    return int(os.environ.get("RANK", 0)) if group is None else group.get_rank()


def get_world_size() -> int:
    group = _process_group()
    return int(os.environ.get("WORLD_SIZE", 1)) if group is None else group.get_world_size()


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_per_node() -> int:
    """As torchrun, or the deepspeed launcher, says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_rank_0() -> bool:
    return get_rank() == 0
