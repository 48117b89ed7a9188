"""Stopping and resuming: checkpoints of a whole run, and going on from one as if nothing had happened.

A checkpoint is a folder ``step-00000050`` of --checkpoint_dir:

    state.json            flags, step, metrics files, name and size of every other file; written last
    rank00000.json        per rank: random states, and the small state of whatever the run tracks
    ENGINE/               DeepSpeed's shards of a trained engine (weights, optimizer, schedule)
    NAME-rank00000.safetensors   shards of a moving average

``starting_point`` chooses and loads one, ``checkpoint_writer`` writes them; here is what the loop of a step calls.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from utils.arguments import nothing_saved
from utils.process.console import print_rank_0
from utils.process.errors import EndOfRun, SharedError, UserError
from utils.process.launch import before_failing
from utils.process.ranks import all_reduce_sum
from utils.process.versions import versions
from utils.process.world import get_world_size
from utils.run.checkpoint_writer import CheckpointWriter, Snapshot
from utils.run.engine_state import prepare_engine
from utils.run.same_run import flags_of, model_fingerprint, rows_fingerprint
from utils.run.starting_point import StartingPoint, take_rank_state
from utils.run.stop_signals import STOP_SIGNALS, StopSignals


class Checkpoints:
    """Saves a run's checkpoints and resumes it from one; every rank makes all its calls alike.

    Args:
        args: of the run. models: the flags that name the models it starts from.

    Attributes:
        args: of the run; where its ranks are others than the checkpoint's, with the accumulation that keeps a step's
            rows.
        folder: where they go; None for a run that has no folder to write to.
        enabled: whether this run writes any.
        steps: optimizer steps done (step 3: updates).

    Raises:
        UserError: a folder, checkpoint or flag that does not fit; on all ranks alike.
        EndOfRun: --resume auto, and the run has finished.
    """

    def __init__(self, args, *models: str):
        self.steps, self._position = 0, [0, 0]
        self.folder = _folder_of(args)
        self.enabled = args.checkpoint_steps > 0 or args.checkpoint_dir is not None
        self._fingerprints = {name: model_fingerprint(getattr(args, name)) for name in models}
        self._start = StartingPoint(args, self.folder, self.enabled, models)
        self.args = self._start.args
        steps_saved = None if self.resumed is None else self.resumed["steps"]
        self._writer = CheckpointWriter(self.folder, args.keep_checkpoints, steps_saved)

    @property
    def resumed(self) -> dict | None:
        """The state of the checkpoint that the run goes on from."""
        return None if self._start.resumed_from is None else self._start.resumed_from.state

    def resume(self, writer, dataset, engines: dict, averages: dict | None = None, **tracked) -> None:
        """Take in what makes up the run; put it into the state of the checkpoint if there is one.

        Args:
            writer: of the metrics. dataset: of the training rows, which must be those of the checkpoint.
            engines: name -> DeepSpeed engine that trains.
            averages: name -> (engine of a moving average, the engine it follows).
            tracked: whatever else has a ``state_dict()`` of numbers, strings and lists, and a ``load_state_dict()``;
                and NumPy generators.
        """
        self._metrics, self._engines, self._averages, self._tracked = writer, engines, averages or {}, tracked
        self._prompt_format = getattr(dataset, "prompt_format", None)
        self._rows = rows_fingerprint(dataset) if self.enabled or self.resumed else None
        for engine in engines.values():
            prepare_engine(engine)
        start = time.perf_counter()
        self._start.load(self._rows, engines, self._averages, tracked)
        if self.resumed is not None:
            self.steps, self._position = self.resumed["steps"], self.resumed["position"]
            print_rank_0(
                f"resumed from {self._start.resumed_from.folder}: {self.steps} steps are done "
                f"(read in {time.perf_counter() - start:.1f} s)"
            )
        if self.enabled:
            self._note_state()
            self._signals, self._steps_before = StopSignals(), self.steps
            before_failing(self._rescue)

    def _note_state(self) -> None:
        """What a checkpoint of this moment, between two steps, would hold of this rank."""
        self._rank_state, self._updates = take_rank_state(self._tracked), self._count_updates()
        self._metrics_sizes = self._metrics.sizes()

    def _count_updates(self) -> list[int]:
        return [engine.global_steps - engine.skipped_steps for engine in self._engines.values()]

    # ------------------------------------------------------------ in the loop

    def epochs(self, count: int) -> Iterator[tuple[int, int]]:
        """(epoch, steps of it that are done) for every epoch that is not over, evaluation included."""
        epoch, done = self._position
        if epoch >= count:
            raise UserError(
                f"--num_train_epochs {count}: the checkpoint is in epoch {epoch + 1} already, so that nothing is left"
            )
        for later in range(epoch, count):
            yield later, done if later == epoch else 0
        self.complete()

    def end_step(self, epoch: int, done: int) -> None:
        """After each step: save where a checkpoint is due; after a SIGTERM or Ctrl-C to any rank save and end the run.

        Args:
            done: steps of the epoch that are done.

        Raises:
            EndOfRun: a signal asked for it.
        """
        self.steps += 1
        if not self.enabled:
            return
        self._position = [epoch, done]
        self._note_state()
        stop, written = self._told_by_ranks()
        if written:
            self.complete()
        if stop or (self.args.checkpoint_steps and self.steps % self.args.checkpoint_steps == 0):
            saved = self._writer.save(self._snapshot(), beside=self.args.async_checkpoint and not stop)
        if stop:
            self._metrics.close()
            raise EndOfRun(
                f"stopped by {stop} after {self.steps} steps; all is in {saved}. "
                "The same command with --resume auto goes on from there"
            )

    def _told_by_ranks(self) -> tuple[str | None, bool]:
        """What asked any rank to stop, and whether all have written a checkpoint under way; on all ranks alike."""
        told = [*self._signals.received(), int(self._writer.written_beside())]
        *counts, written = all_reduce_sum(torch.tensor(told, device=get_accelerator().current_device_name())).tolist()
        stop = next((name for name, count in zip(STOP_SIGNALS.values(), counts, strict=True) if count), None)
        return stop, written == get_world_size()

    def save_before_step(self) -> str:
        """For a step that cannot be made: save the run as it was before it, so that a resumed run begins with it.

        In step 3 updates of the step may have been made already: then the last checkpoint is the way back.

        Returns:
            where the run can be taken up, for messages
        """
        try:
            self.complete()
            if self.enabled and self._writer.steps_saved != self.steps and self._updates == self._count_updates():
                self._writer.save(self._snapshot())
        except UserError as error:
            return str(error)
        return self._writer.last()

    def _rescue(self, error: Exception) -> None:
        """Before the run ends by this error: keep what is done, where the ranks can still agree on it.

        They can where all raise the error alike, at the same place, as for a reward function that fails on one of
        them; and a single one always can, but only complete what is copied: in which state other errors leave an
        engine nobody knows.
        """
        saved = self._writer.steps_saved
        if isinstance(error, SharedError) and self.steps > self._steps_before and not self._writer.refused:
            self.save_before_step()
        elif isinstance(error, SharedError) or get_world_size() == 1:
            self.complete()
        if self._writer.steps_saved not in (saved, None):
            print_rank_0(f"{self._writer.last()}; the same command with --resume auto goes on from there")

    def complete(self) -> None:
        """Wait for a checkpoint that is being written beside training, if one is; it counts from here on.

        Raises:
            UserError: a rank could not write its files.
        """
        self._writer.complete()

    def finish(self) -> None:
        """The run is over and its model saved: a later start with --resume auto has nothing to do."""
        if note := nothing_saved(self.args):
            print_rank_0(note)
        if not self.enabled:
            return
        self._writer.finish(self._common_state() | {"output_dir": self.args.output_dir})
        self._signals.ignore()

    # ------------------------------------------------------------ what is saved

    def _common_state(self) -> dict:
        return {
            "steps": self.steps,
            "saved_at": time.time(),
            "world_size": get_world_size(),
            "flags": flags_of(self.args),
            "models": self._fingerprints,
            "versions": versions(),
        }

    def _state(self) -> dict:
        """What the state file holds, but for the files."""
        return self._common_state() | {
            "position": self._position,
            "rows": self._rows,
            "prompt_format": self._prompt_format,
            "metrics": self._metrics.position(self._metrics_sizes),
        }

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.steps, self._engines, self._averages, self._rank_state, self._state)


def _folder_of(args) -> Path | None:
    """--checkpoint_dir, else the folder checkpoints in --output_dir, where there is one."""
    if args.checkpoint_dir is not None:
        return Path(args.checkpoint_dir)
    return None if args.output_dir is None else Path(args.output_dir) / "checkpoints"
