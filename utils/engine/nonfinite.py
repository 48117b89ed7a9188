"""Non-finite losses, gradients and logits: where a run stops, and which steps it may leave out."""

import math
from collections.abc import Callable

from utils.engine.averages import PlainState
from utils.process.console import print_rank_0
from utils.process.errors import SharedError

ROWS_NAMED = 32
Figures = dict[str, dict[str, float | None]]  # engine -> name -> loss or norm, the same on every rank


def non_finite(figures: Figures) -> str:
    """Which figures are not finite, with their engines; "" if all are. None stands for no figure, and is in order."""
    return " and ".join(
        f"the {name} of the engine {engine!r} is {value}"
        for engine, named in figures.items()
        for name, value in named.items()
        if not (value is None or math.isfinite(value))
    )


def refuse_nonfinite(figures: Figures) -> bool:
    """False, if all figures are finite.

    Raises:
        SharedError: naming those that are not.
    """
    if bad := non_finite(figures):
        raise SharedError(f"{bad}, so no update was made from this batch")
    return False


class NonFiniteSteps(PlainState):
    """Counts the steps that were left out, and stops the run after ``allowed`` of them.

    Every rank must ask with the same figures.

    Args:
        sampler: the StepBatchSampler of the training rows.
        save: makes a checkpoint of the state before the step, if the run has checkpoints, and says where the run can
            be resumed.

    Attributes:
        skipped: steps left out so far, for the metrics.
    """

    def __init__(self, allowed: int, sampler, save: Callable[[], str]):
        self._allowed, self._sampler, self._save, self.skipped = allowed, sampler, save, 0

    def state_dict(self) -> dict:
        return {"skipped": self.skipped}

    def refuse(self, figures: Figures, step: int) -> None:
        """
        Args:
            step: of the sampler's epoch.

        Raises:
            SharedError: a figure that is not finite; with the step, its training rows, and a way on.
        """
        if bad := non_finite(figures):
            raise SharedError(
                f"{bad} {self._place(step)}: no update was made from this batch; {self._save()}. A lower learning rate "
                "or --dtype bf16 or fp32 usually helps; --skip_nonfinite N leaves out N such steps "
                f"(now {self._allowed}), also after --resume auto"
            )

    def skip(self, figures: Figures, step: int) -> bool:
        """Whether the step must make no update, for figures that are not finite; it is counted and told.

        Raises:
            SharedError: as ``refuse``, when no more steps may be left out.
        """
        if self.skipped >= self._allowed:
            self.refuse(figures, step)
        if not (bad := non_finite(figures)):
            return False
        self.skipped += 1
        print_rank_0(f"{bad} {self._place(step)}: left out (--skip_nonfinite: {self.skipped} of {self._allowed})")
        return True

    def _place(self, step: int) -> str:
        rows = self._sampler.rows_of_step(step)
        named, more = ", ".join(map(str, rows[:ROWS_NAMED])), len(rows) - ROWS_NAMED
        return f"in epoch {self._sampler.epoch}, step {step} (training rows {named}{f' and {more} more' * (more > 0)})"
