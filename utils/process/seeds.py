"""Random numbers that a run repeats."""

import random

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
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        get_accelerator().manual_seed_all(seed)
