"""The seeded split of a dataset over the three steps, bit-equal to the published rule."""

import math
from pathlib import Path

import numpy as np

from utils.process.errors import UserError
from utils.process.files import scratch_beside

DATA_SPLIT = "2,4,4"  # shares of the three steps, where the flag does not say others


def get_shuffle_idx(seed, size) -> np.ndarray:
    """arange(size), shuffled by RandomState(seed); uint32 below 2**32 - 2 rows, as published, since dtype matters."""
    indices = np.arange(size, dtype=np.uint32 if size < np.iinfo(np.uint32).max - 1 else np.int64)
    np.random.RandomState(seed=seed).shuffle(indices)
    return indices


def split_boundaries(data_split: str, data_size: int) -> list[int]:
    """Where each share begins and ends: len(shares) + 1 numbers.

    The published rule: each boundary is the last plus the rounded share; the rounding slack is then taken from every
    boundary but the first. Where that would step back below zero or below the boundary before (a zero first
    share), the boundary is clamped, so that shares never overlap.
    """
    try:
        shares = [float(share) for share in data_split.split(",")]
    except ValueError:
        shares = []
    if not shares or not math.isfinite(sum(shares)) or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(
            f"--data_split {data_split!r}: expected shares of 0 or more with commas between them, as in 2,4,4"
        )
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share / sum(shares) * float(data_size)))
    slack = boundaries[-1] - data_size
    boundaries = [0] + [boundary - slack for boundary in boundaries[1:]]
    return np.maximum.accumulate(np.clip(boundaries, 0, data_size)).tolist()


def get_raw_dataset_split_index(
    local_rank, output_path, dataset_name, seed, split_name, data_split, split_index, data_size, rebuild=False
) -> np.ndarray:
    """The row numbers of one share, the same on every machine.

    They are computed, not trusted from an earlier run, whose data may have been larger; one .npy file per share
    records them for the reader.
    """
    boundaries = split_boundaries(data_split, data_size)
    if not 0 <= split_index < len(boundaries) - 1:
        raise UserError(f"--data_split {data_split!r} has no share for step {split_index + 1}")
    shuffled = get_shuffle_idx(seed, data_size)
    if local_rank <= 0:
        for i in range(len(boundaries) - 1):
            file = Path(output_path) / f"{dataset_name}_seed{seed}_{split_name}_{data_split}_{i}.npy"
            _write_split_file(file, shuffled[boundaries[i] : boundaries[i + 1]])
    return shuffled[boundaries[split_index] : boundaries[split_index + 1]]


def _write_split_file(file: Path, indices: np.ndarray) -> None:
    if file.exists():
        try:
            known = np.load(file, allow_pickle=False)
            if known.dtype == indices.dtype and np.array_equal(known, indices):
                return
        except (ValueError, OSError, EOFError):
            pass  # a torn file of some earlier crash: written anew below
    file.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(file) as scratch:
        with open(scratch, "wb") as out:
            np.save(out, indices, allow_pickle=False)
        scratch.replace(file)
