"""Losses that are no numbers: where a run stops, and which steps it may leave out."""

import math
from collections.abc import Callable

from utils.distributed import UserError
from utils.utils import PlainState, print_rank_0

ROWS_NAMED = 32


def refuse_nonfinite(losses: dict[str, float], where: str = "") -> bool:
    """False, if all losses are finite.

    Raises:
        UserError: naming those that are not.
    """
    bad = [f"the {name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"{' and '.join(bad)}{where}: not finite, so no update was made from this batch")
    return False


class NonFiniteLosses(PlainState):
    """Counts the steps that were left out, and stops the run after ``allowed`` of them.

    Args:
        sampler: the StepBatchSampler of the training rows. last_checkpoint: says where the run can be taken up.

    Attributes:
        skipped: steps left out so far, for the metrics.
    """

    def __init__(self, allowed: int, sampler, last_checkpoint: Callable[[], str]):
        self._allowed, self._sampler, self._last_checkpoint, self.skipped = allowed, sampler, last_checkpoint, 0

    def state_dict(self) -> dict:
        return {"skipped": self.skipped}

    def found(self, losses: dict[str, float], step: int) -> bool:
        """Whether the coming optimizer step must be dropped; every rank must ask with the same numbers.

        Args:
            losses: name -> mean over all ranks. step: of the sampler's epoch.

        Raises:
            UserError: a loss that is not finite, and no step may be left out any more.
        """
        if all(map(math.isfinite, losses.values())):
            return False
        rows = self._sampler.rows_of_step(step)
        named = ", ".join(map(str, rows[:ROWS_NAMED])) + f" and {len(rows) - ROWS_NAMED} more" * (
            len(rows) > ROWS_NAMED
        )
        where = f" in epoch {self._sampler.epoch}, step {step} (training rows {named})"
        try:
            refuse_nonfinite(losses, where)
        except UserError as error:
            if self.skipped >= self._allowed:
                raise UserError(
                    f"{error}; {self._last_checkpoint()}. A lower learning rate or --dtype bf16 or fp32 usually helps; "
                    f"--skip_nonfinite N leaves out N such steps (now {self._allowed})"
                ) from error
            self.skipped += 1
            print_rank_0(f"{error} (--skip_nonfinite: {self.skipped} of {self._allowed})")
        return True
