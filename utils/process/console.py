"""What a person reads while a run goes on: lines printed once, and progress bars with the time left. Without torch."""

import datetime
import sys
import time

from tqdm import tqdm

from utils.process.world import get_rank, is_rank_0

PROGRESS_SECONDS = 10  # between progress lines where there is no terminal
BRIEF_FACTOR = 6  # more between them where the steps have lines of their own

_kind = "classic"


def set_console(kind: str) -> None:
    """What this process prints from here on: "classic", or "brief", with other lines."""
    global _kind
    _kind = kind


def is_brief() -> bool:
    return _kind == "brief"


def now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def print_rank_0(msg, rank=None) -> None:
    """Print once, not once per rank, and without tearing a progress bar apart."""
    if (get_rank() if rank is None else rank) > 0:
        return
    if sys.stderr.isatty():
        tqdm.write(str(msg))
    else:
        print(msg, flush=True)


def print_classic(msg, rank=None) -> None:
    """A line that programs read, or that who only wants to know how the run goes can do without: not in "brief"."""
    if not is_brief():
        print_rank_0(msg, rank)


def print_brief(msg) -> None:
    """A line for people that stands in "brief" for classic ones."""
    if is_brief():
        print_rank_0(msg)


class progress:
    """A bar with the time left, on rank 0 only: live on a terminal, a line every PROGRESS_SECONDS in a log."""

    def __init__(self, iterable, description: str, total: int | None = None):
        self._iterable, self._description, self._note = iterable, description, ""
        self._total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self._bar = None

    def note(self, text: str) -> None:
        """What stands behind the bar from here on: speed, memory."""
        self._note = f", {text}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __iter__(self):
        if not is_rank_0() or sys.stderr.isatty():
            self._bar = tqdm(
                self._iterable,
                desc=self._description,
                total=self._total,
                disable=not is_rank_0(),
                dynamic_ncols=True,
            )
            yield from self._bar
            return
        start = last = time.monotonic()
        seconds = PROGRESS_SECONDS * (BRIEF_FACTOR if is_brief() else 1)
        for done, item in enumerate(self._iterable):
            moment = time.monotonic()
            if moment - last >= seconds and done and self._total:
                last, filled = moment, 30 * done // self._total
                left = datetime.timedelta(seconds=round((moment - start) / done * (self._total - done)))
                bar = f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{self._total}"
                print(f"{self._description} {bar}, {left} left{self._note}", flush=True)
            yield item
