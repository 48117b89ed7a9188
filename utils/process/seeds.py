"""Random numbers that a run repeats, and that a resumed run goes on with."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from transformers import set_seed

from utils.process.errors import UserError


def set_random_seed(seed) -> None:
    """Seed Python, NumPy and torch. Data order has generators of its own and does not depend on this."""
    if seed is not None:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed {seed}: must be between 0 and {2**32 - 1}")
        set_seed(seed)
        get_accelerator().manual_seed_all(seed)


def derived_seed(*numbers: int) -> int:
    """A seed for a stream of its own that follows from these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def random_states() -> dict:
    """The states of all generators that set_random_seed() seeds, as JSON takes them."""
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    accelerator = get_accelerator()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "accelerator": None if accelerator.device_name() == "cpu" else accelerator.get_rng_state().tolist(),
    }


def restore_random_states(states: dict) -> None:
    """Set the generators to what random_states() gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["accelerator"] is not None:
        get_accelerator().set_rng_state(torch.tensor(states["accelerator"], dtype=torch.uint8))


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """What draws random numbers while this is open leaves no trace: afterwards the generators are as they were."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)
