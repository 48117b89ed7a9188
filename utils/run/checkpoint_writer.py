"""Writes the checkpoints of a run: whole or not at all, at once or beside training.

A checkpoint is written under another name and renamed when complete; then ``latest`` names it, and older ones go. With
--async_checkpoint the files are written beside training (see ``async_write``), and the rest happens at the end of the
first step by which all ranks have theirs on the disk.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.files import flush_to_disk, write_text
from utils.process.ranks import agree
from utils.process.world import get_rank
from utils.run.async_write import Put, WritesBeside, write_now
from utils.run.checkpoint_files import (
    FINISHED_FILE,
    LATEST_FILE,
    PREFIX,
    STATE_FILE,
    complete_checkpoints,
    newest_checkpoint,
    rank_file,
    remove_checkpoint,
)
from utils.run.engine_state import has_finite_weights, save_average, save_engine

WRITE_ERRORS = (
    OSError,
    RuntimeError,
    SafetensorError,
)  # torch's zip writer, and memory that is not there: RuntimeError


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written of.

    Attributes:
        steps: optimizer steps done.
        engines, averages: as ``Checkpoints.resume`` takes them.
        rank_state: what this rank's JSON file holds.
        state: called on rank 0 alone: what the state file holds, but for the files.
    """

    steps: int
    engines: dict
    averages: dict
    rank_state: dict
    state: Callable[[], dict]


@dataclass(frozen=True)
class Pending:
    """A checkpoint whose files are being written beside training."""

    steps: int
    scratch: Path
    state: dict  # what its state file will hold, on rank 0
    files: WritesBeside
    seconds: float  # that training waited for the copies
    start: float  # of the writing


class CheckpointWriter:
    """Every rank makes all its calls alike.

    Args:
        folder: of the checkpoints. keep: how many stay.
        steps_saved: those of the newest checkpoint of this run; None for none yet.

    Attributes:
        steps_saved: as above, brought up to date.
        refused: whether a checkpoint could not be written.
    """

    def __init__(self, folder: Path | None, keep: int, steps_saved: int | None):
        self._folder, self._keep, self.steps_saved = folder, keep, steps_saved
        self._pending: Pending | None = None
        self.refused = False

    def save(self, run: Snapshot, beside: bool = False) -> str:
        """Write a checkpoint. ``beside``: training goes on once all is copied; ``complete`` does the rest.

        Returns:
            its folder, for messages

        Raises:
            UserError: weights that are not finite, or files that cannot be written.
        """
        self.complete()  # one at a time
        name = _name_after(run.steps)
        scratch, start, state, files = self._folder / f".{name}", time.perf_counter(), {}, WritesBeside()
        agree(lambda: self._check_weights(run))
        with self._removed_if_refused(scratch):
            self._on_rank_0(scratch.mkdir, run.steps)
            self._on_rank_0(lambda: state.update(run.state()), run.steps)
            self._write(run, scratch, files.put if beside else write_now)
            if not beside:
                self._on_rank_0(lambda: self._publish(scratch, state), run.steps)
        seconds = time.perf_counter() - start
        if beside:
            files.start()
            self._pending = Pending(run.steps, scratch, state, files, seconds, time.perf_counter())
        else:
            self.steps_saved = run.steps
            print_rank_0(f"checkpoint {self._folder / name} ({seconds:.1f} s)")
        return str(self._folder / name)

    def written_beside(self) -> bool:
        """Whether a checkpoint is under way whose files this rank has written."""
        return self._pending is not None and self._pending.files.done()

    def complete(self) -> None:
        """Wait for a checkpoint that is being written beside training, if one is, and give it its name; on all ranks.

        Raises:
            UserError: a rank could not write its files.
        """
        if self._pending is None:
            return
        pending, self._pending, start = self._pending, None, time.perf_counter()

        def wait_for_files() -> None:
            try:
                pending.files.wait()
            except WRITE_ERRORS as error:
                raise self._cannot_write(error, pending.steps) from error

        with self._removed_if_refused(pending.scratch):
            agree(wait_for_files)
            self._on_rank_0(lambda: self._publish(pending.scratch, pending.state), pending.steps)
        self.steps_saved, end = pending.steps, time.perf_counter()
        print_rank_0(
            f"checkpoint {self._folder / _name_after(pending.steps)} (written in {end - pending.start:.1f} s; training "
            f"waited {pending.seconds:.2f} s for copies and {end - start:.2f} s for the end)"
        )

    @contextlib.contextmanager
    def _removed_if_refused(self, scratch: Path) -> Iterator[None]:
        try:
            yield
        except UserError:
            self.refused = True
            if get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def last(self) -> str:
        """Where a run that fails now can be taken up, for messages."""
        is_own = self._folder is not None and self.steps_saved is not None
        newest = newest_checkpoint(self._folder) if is_own else None
        return "there is no checkpoint of this run" if newest is None else f"the last checkpoint is {newest.folder}"

    def finish(self, state: dict) -> None:
        """The run is over: note its state, the folder of its model among it."""
        self.complete()
        text = json.dumps(state, indent=1)
        self._on_rank_0(lambda: write_text(self._folder / FINISHED_FILE, text, flush=True), state["steps"])

    def _check_weights(self, run: Snapshot) -> None:
        """The checkpoint before is worth more than one that no training can go on from."""
        for name, engine in run.engines.items():
            if not has_finite_weights(engine):
                raise UserError(
                    f"the weights of the engine {name!r} are not finite in step {run.steps}, so no checkpoint was "
                    f"written; {self.last()}"
                )

    def _write(self, run: Snapshot, scratch: Path, put: Put) -> None:
        """The shards of every rank."""
        write_errors = [save_engine(engine, scratch, name, put) for name, engine in run.engines.items()]

        def write_other_files() -> None:
            for error in filter(None, write_errors):
                raise self._cannot_write(error, run.steps)
            try:
                for name, (average, followed) in run.averages.items():
                    save_average(average, followed, scratch, name, put)
                put(_write_text, json.dumps(run.rank_state), scratch / rank_file(get_rank()))
            except WRITE_ERRORS as error:
                raise self._cannot_write(error, run.steps) from error

        agree(write_other_files)

    def _publish(self, scratch: Path, state: dict) -> None:
        """Rank 0 alone: the state file, the checkpoint's name, and the removal of older ones."""
        files = {
            str(file.relative_to(scratch)): file.stat().st_size for file in sorted(scratch.rglob("*")) if file.is_file()
        }
        write_text(scratch / STATE_FILE, json.dumps(state | {"files": files}, indent=1), flush=True)
        name = _name_after(state["steps"])
        target = self._folder / name
        if target.exists():  # of a run that was taken up again at an earlier step
            remove_checkpoint(target)
        scratch.rename(target)
        flush_to_disk(self._folder)
        write_text(self._folder / LATEST_FILE, name + "\n", flush=True)
        # Whatever the clocks of its hosts say, the one just written stays.
        others = [other.folder for other in complete_checkpoints(self._folder) if other.folder != target]
        for old in others[: max(0, len(others) + 1 - self._keep)]:
            remove_checkpoint(old)

    def _on_rank_0(self, write: Callable[[], None], steps: int) -> None:
        """Write something of a checkpoint on rank 0; a failure there reaches all ranks."""

        def write_or_refuse() -> None:
            try:
                write()
            except OSError as error:
                raise self._cannot_write(error, steps) from error

        agree(write_or_refuse if get_rank() == 0 else lambda: None)

    def _cannot_write(self, error: Exception, steps: int) -> UserError:
        free = shutil.disk_usage(self._folder).free / 2**20
        return UserError(
            f"the checkpoint of step {steps} could not be written to {self._folder}, where {free:.1f} MiB are "
            f"free: {error}; {self.last()}"
        )


def _name_after(steps: int) -> str:
    return f"{PREFIX}{steps:08d}"


def _write_text(text: str, path: Path) -> None:
    write_text(path, text, flush=True)
