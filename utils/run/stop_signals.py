"""A SIGTERM or Ctrl-C ends a run between two steps, on all ranks alike."""

import contextlib
import os
import signal
import time

from utils.process.world import get_rank

STOP_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
PATIENCE = 3  # seconds after which another Ctrl-C is a second one


class StopSignals:
    """Takes note of the signals of this rank, from now until ``ignore``; a second Ctrl-C ends it at once."""

    def __init__(self):
        self._asked: int | None = None
        self._process = os.getpid()
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def received(self) -> list[int]:
        """1 for the first signal that came, 0 for the others, in the order of STOP_SIGNALS."""
        return [int(self._asked == number) for number in STOP_SIGNALS]

    def ignore(self) -> None:
        """From here on they do what they do to any process."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _frame) -> None:
        if os.getpid() != self._process:  # a forked worker (of a reward function's pool, say)
            if number == signal.SIGTERM:  # it ends as one does; a Ctrl-C is the run's, which needs it to the step's end
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        text = f"rank {get_rank()}: {STOP_SIGNALS[number]}: finishing the step, then saving a checkpoint\n"
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
        # Launchers pass a Ctrl-C on, or make a SIGTERM of it, when it has come from the terminal already.
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > PATIENCE:
            text = "Ctrl-C again: ending at once, without a checkpoint of this step\n"
        else:
            return
        if number == signal.SIGTERM or get_rank() == 0:  # a Ctrl-C goes to all of them
            with contextlib.suppress(OSError):  # who reads may have gone before
                os.write(1, text.encode())  # not print: the signal may come in the middle of one
        if text.startswith("Ctrl-C again"):
            os._exit(128 + number)
