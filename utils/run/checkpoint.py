"""Stopping and resuming: checkpoints of a whole run, and going on from one as if nothing had happened.

It may have another number of ranks then, or another ZeRO stage: each rank reads its share from the files of all (see
``other_layout``), and a step keeps its rows. Or it takes the weights alone, and is a run of its own.

A checkpoint is a folder ``step-00000050`` of --checkpoint_dir:

    state.json            flags, step, metrics files, name and size of every other file; written last
    rank00000.json        per rank: random states, and the small state of whatever the run tracks
    ENGINE/               DeepSpeed's shards of a trained engine (weights, optimizer, schedule)
    NAME-rank00000.safetensors   shards of a moving average

It is written under another name and renamed when complete; then ``latest`` names it, and older ones go. With
--async_checkpoint the files are written beside training (see ``async_write``), and the rest happens at the end of the
first step by which all ranks have theirs on the disk. On resuming every file must be there in its full size, and every
flag that shapes the training must be what it was, but for those that --allow_changed names.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError

from utils.arguments import MAY_CHANGE_AT_RESUME, Settled, nothing_saved
from utils.process.console import print_rank_0
from utils.process.errors import EndOfRun, UserError
from utils.process.files import flush_to_disk, write_text
from utils.process.ranks import agree, all_gather_objects, all_reduce_sum
from utils.process.seeds import derived_seed, random_states, restore_random_states, set_random_seed
from utils.process.versions import versions
from utils.process.world import get_rank, get_world_size, ranks_per_node
from utils.run.async_write import Put, WritesBeside, write_now
from utils.run.checkpoint_files import (
    FINISHED_FILE,
    LATEST_FILE,
    PREFIX,
    STATE_FILE,
    SavedCheckpoint,
    check_shared_folder,
    complete_checkpoints,
    newest_checkpoint,
    rank_file,
    read_checkpoint,
    read_finished,
    read_small_file,
    remove_checkpoint,
    take_folder,
)
from utils.run.engine_state import (
    has_finite_weights,
    load_average,
    load_engine,
    prepare_engine,
    refused_content,
    save_average,
    save_engine,
)
from utils.run.former_run import former_checkpoints
from utils.run.other_layout import load_average_from, load_from_other_layout, load_weights, start_average
from utils.run.same_run import (
    BATCH_FLAGS,
    LAYOUT_FLAGS,
    NO_FLAGS,
    changed_flags,
    differences,
    flags_of,
    model_fingerprint,
    other_layout,
    rows_fingerprint,
    same_global_batch,
)
from utils.run.saved_average import SavedAverage
from utils.run.saved_engine import SavedEngine

STOP_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
WRITE_ERRORS = (
    OSError,
    RuntimeError,
    SafetensorError,
)  # torch's zip writer, and memory that is not there: RuntimeError
PATIENCE = 3  # seconds after which another Ctrl-C is a second one


@dataclass(frozen=True)
class Pending:
    """A checkpoint whose files are being written beside training."""

    steps: int
    scratch: Path
    state: dict  # what its state file will hold, on rank 0
    files: WritesBeside
    seconds: float  # that training waited for the copies
    start: float  # of the writing


class Checkpoints:
    """Saves a run's checkpoints and resumes it from one; every rank makes all its calls alike.

    Args:
        args: of the run. models: the flags that name the models it starts from.

    Attributes:
        args: of the run; where its ranks are others than the checkpoint's, with the accumulation that keeps a step's
            rows.
        folder: where they go; None for a run that has no folder to write to.
        enabled: whether this run writes any.
        resumed_from: the checkpoint that the run goes on from, or None for a fresh start.
        weights_from: the checkpoint that a fresh start takes its weights from, or None.
        steps: optimizer steps done (step 3: updates).

    Raises:
        UserError: a folder, checkpoint or flag that does not fit; on all ranks alike.
        EndOfRun: --resume auto, and the run has finished.
    """

    def __init__(self, args, *models: str):
        self.args, self.steps, self.resumed_from, self.weights_from = args, 0, None, None
        self._other_layout: list[str] = []
        self.folder = _folder_of(args)
        self.enabled = args.checkpoint_steps > 0 or args.checkpoint_dir is not None
        self._stop_asked, self._steps_saved = None, None
        self._pending: Pending | None = None
        # Checkpoints under the output folder go with all else there; those in a folder of their own do not.
        self._replaces = args.overwrite_output_dir and args.output_dir is not None and args.checkpoint_dir is None
        self._fingerprints = {name: model_fingerprint(getattr(args, name)) for name in models}
        finished = None

        def choose_start() -> None:
            nonlocal finished
            if self.enabled or (self._replaces and former_checkpoints(self.folder)):
                self._lock = take_folder(self.folder)  # held until the process ends
            finished = self._read_finished()
            if finished is None:
                self.resumed_from = self._choose()
                if self.enabled:  # an earlier run's, from here on
                    (self.folder / FINISHED_FILE).unlink(missing_ok=True)

        agree(choose_start if get_rank() == 0 else lambda: None)
        if self.enabled and get_world_size() > ranks_per_node():
            check_shared_folder(self.folder)
        finished, self.resumed_from = all_gather_objects((finished, self.resumed_from))[0]
        if args.resume_weights_only:
            self.weights_from, self.resumed_from = self.resumed_from, None
        if finished is not None:
            raise EndOfRun(
                f"--resume auto: this run has finished after {finished['steps']} steps; its model is in "
                f"{finished['output_dir']}. To save that again delete {self.folder / FINISHED_FILE}, to train anew "
                f"{self.folder}"
            )
        if self.resumed_from is not None:
            agree(self._check_resumed)
        elif args.resume == "auto":
            print_rank_0(f"--resume auto: no checkpoint in {self.folder}, so this is a fresh start")

    # ------------------------------------------------------------ at the start

    def _read_finished(self) -> dict | None:
        finished = read_finished(self.folder) if self.args.resume == "auto" else None
        if finished is None:
            return None
        self._refuse_other_run(f"the run that finished in {self.folder}", finished)
        epochs = finished["flags"].get("num_train_epochs")
        if "num_train_epochs" in self.args.allow_changed and self.args.num_train_epochs > epochs:
            print(f"--allow_changed num_train_epochs: the run had finished after {epochs} epochs, and goes on")
            return None
        return finished

    def _choose(self) -> SavedCheckpoint | None:
        resume = self.args.resume
        if resume == "auto":
            return newest_checkpoint(self.folder)
        own = newest_checkpoint(self.folder) if self.enabled else None
        if resume is not None:
            chosen = read_checkpoint(Path(resume))
            elsewhere = own is not None and chosen.folder.resolve().parent != self.folder.resolve()
            if own is not None and self.args.resume_weights_only and not self._replaces:
                raise UserError(
                    f"--checkpoint_dir {self.folder} holds checkpoints already, which those of this run, a new one, "
                    "would replace: name another folder"
                )
            if elsewhere and not self.args.resume_weights_only:
                raise UserError(
                    f"--checkpoint_dir {self.folder} holds checkpoints already, and not {chosen.folder}: those of this "
                    "run would replace them. Go on from them with --resume auto, or name another folder"
                )
            return chosen
        if own is not None and not self._replaces:
            raise UserError(
                f"--checkpoint_dir {self.folder} holds checkpoints of an earlier run: go on from them with "
                "--resume auto, delete them (--overwrite_output_dir does so where they lie in the output folder), or "
                "name another folder"
            )
        return None

    def _check_resumed(self) -> None:
        folder, state = self.resumed_from.folder, self.resumed_from.state
        if not (folder / STATE_FILE).is_file():
            raise UserError(f"{folder} is not to be seen on every node: checkpoints belong on storage that all share")
        self._other_layout = other_layout(self.args, state)
        if self._other_layout:
            batch = same_global_batch(self.args, state)
            self.args = Settled(**vars(self.args) | batch)
            if get_rank() == 0:
                sizes = ", ".join(f"--{name} {value} (was {state['flags'][name]})" for name, value in batch.items())
                print(f"--resume: {', '.join(self._other_layout)}: a step has the same rows as before with {sizes}")
        self._refuse_other_run(f"{folder} is of another run", state)
        own_rules = MAY_CHANGE_AT_RESUME | NO_FLAGS | LAYOUT_FLAGS | BATCH_FLAGS
        if get_rank() == 0 and self.args.allow_changed:
            changed = changed_flags(self.args, state, own_rules)
            print(f"--allow_changed: {'; '.join(changed) or 'nothing differs'}")
        other = [f"{name} {then}" for name, then in state["versions"].items() if versions().get(name) != then]
        if other and get_rank() == 0:
            print(f"note: the checkpoint was written with {', '.join(other)}: losses may differ in their last digits")

    def _refuse_other_run(self, what: str, state: dict) -> None:
        if reasons := differences(self.args, self._fingerprints, state):
            raise UserError(f"--resume: {what}: {'; '.join(reasons)}")

    @property
    def resumed(self) -> dict | None:
        """The state of the checkpoint that the run goes on from."""
        return None if self.resumed_from is None else self.resumed_from.state

    def resume(self, writer, dataset, engines: dict, averages: dict | None = None, **tracked) -> None:
        """Take in what makes up the run; put it into the state of the checkpoint if there is one.

        Args:
            writer: of the metrics. dataset: of the training rows, which must be those of the checkpoint.
            engines: name -> DeepSpeed engine that trains.
            averages: name -> (engine of a moving average, the engine it follows).
            tracked: whatever else has a ``state_dict()`` of numbers, strings and lists, and a ``load_state_dict()``;
                and NumPy generators.
        """
        self._writer, self._engines, self._averages, self._tracked = writer, engines, averages or {}, tracked
        self._position, self._prompt_format = [0, 0], getattr(dataset, "prompt_format", None)
        self._rows = rows_fingerprint(dataset) if self.enabled or self.resumed_from else None
        for engine in engines.values():
            prepare_engine(engine)
        if self.resumed_from is not None:
            start = time.perf_counter()
            self._load()
            print_rank_0(
                f"resumed from {self.resumed_from.folder}: {self.steps} steps are done "
                f"(read in {time.perf_counter() - start:.1f} s)"
            )
        elif self.weights_from is not None:
            self._load_weights()
            print_rank_0(
                f"--resume_weights_only: the weights are those of {self.weights_from.folder}, after "
                f"{self.weights_from.state['steps']} steps; all else begins anew"
            )
        if self.enabled:
            self._rank_state, self._updates = self._take_rank_state(), self._count_updates()
            self._process = os.getpid()
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def _count_updates(self) -> list[int]:
        return [engine.global_steps - engine.skipped_steps for engine in self._engines.values()]

    def _take_rank_state(self) -> dict:
        """The small state of this rank, as between two steps."""
        tracked = {
            name: thing.bit_generator.state if isinstance(thing, np.random.Generator) else thing.state_dict()
            for name, thing in self._tracked.items()
        }
        return {"random": random_states(), "tracked": tracked}

    def _restore_rank_state(self, state: dict) -> None:
        saved = self.resumed_from.state
        same_ranks = saved["world_size"] == get_world_size()
        if "unsupervised" in state["tracked"] and not same_ranks:
            rows = saved["flags"]["per_device_training_batch_size"] * saved["world_size"]
            state["tracked"]["unsupervised"].setdefault("rows", rows)  # which earlier versions did not note
        own_stream = self.args.seed, self.steps, get_rank()
        for name, thing in self._tracked.items():
            if name == "evaluations" and name not in state["tracked"]:
                continue  # a checkpoint of an earlier version: the comparison of evaluations begins anew
            if isinstance(thing, np.random.Generator) and not same_ranks:
                thing.bit_generator.state = np.random.default_rng(own_stream).bit_generator.state
            elif isinstance(thing, np.random.Generator):
                thing.bit_generator.state = state["tracked"][name]
            else:
                thing.load_state_dict(state["tracked"][name])
        if same_ranks:
            restore_random_states(state["random"])
        else:
            set_random_seed(derived_seed(*own_stream))
            print_rank_0("--resume: dropout and sampling go on with random numbers derived from seed, step and rank")

    def _load(self) -> None:
        folder, state = self.resumed_from.folder, self.resumed_from.state
        same_ranks = state["world_size"] == get_world_size()
        file, rank_state = folder / rank_file(get_rank() if same_ranks else 0), None

        def read_rank_state() -> None:
            nonlocal rank_state
            if self._rows != state["rows"]:
                raise UserError(f"--resume: {folder} is of another run: its training rows were other ones")
            try:
                rank_state = json.loads(read_small_file(file))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"--resume: {file}: {error}") from error

        def restore() -> None:
            for name, (average, followed) in self._averages.items():
                if self._other_layout:
                    shapes = SavedEngine(folder / _name_of(followed, self._engines)).shapes
                    load_average_from(average, followed, SavedAverage(folder, name, shapes))
                else:
                    load_average(average, followed, folder, name)
            with refused_content(file):
                self._restore_rank_state(rank_state)

        agree(read_rank_state)
        saved_engines: dict[str, SavedEngine] = {}
        self.steps = self._steps_saved = state["steps"]
        self._position = state["position"]
        for name, engine in self._engines.items():
            settings = _Settings(engine)
            if self._other_layout:
                agree(lambda name=name: saved_engines.update({name: SavedEngine(folder / name)}))
                load_from_other_layout(engine, saved_engines[name])
            else:
                load_engine(engine, folder, name)
            if self.args.allow_changed:
                print_rank_0(f"--allow_changed: {name}: {settings.restore()}")
        agree(restore)

    def _load_weights(self) -> None:
        """Those of --resume_weights_only, into each engine and average of this run that the checkpoint has too."""
        folder, state = self.weights_from.folder, self.weights_from.state
        saved: dict[str, SavedEngine] = {}

        def read() -> None:
            for name in self._engines:
                if not (folder / name).is_dir():
                    raise UserError(f"--resume_weights_only: {folder} holds no {name}: it is of another step")
                saved[name] = SavedEngine(folder / name)

        agree(read)
        start_of = {"model": "model_name_or_path"}
        for name, engine in self._engines.items():
            start = start_of.get(name, f"{name}_model_name_or_path")
            load_weights(engine, saved[name], state["models"].get(start) == self._fingerprints.get(start))
        for name, (average, followed) in self._averages.items():
            start_average(average, followed)
            if any(file.startswith(f"{name}-rank") for file in state["files"]):
                shapes = saved[_name_of(followed, self._engines)].shapes
                load_average_from(average, followed, SavedAverage(folder, name, shapes))

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
        self._rank_state, self._updates = self._take_rank_state(), self._count_updates()
        stop, written = self._told_by_ranks()
        if written:
            self.complete()
        if stop or (self.args.checkpoint_steps and self.steps % self.args.checkpoint_steps == 0):
            self._save(beside=self.args.async_checkpoint and not stop)
        if stop:
            self._writer.close()
            raise EndOfRun(
                f"stopped by {stop} after {self.steps} steps; all is in {self.folder / self._name}. "
                "The same command with --resume auto goes on from there"
            )

    def _told_by_ranks(self) -> tuple[str | None, bool]:
        """What asked any rank to stop, and whether all have written a checkpoint under way; on all ranks alike."""
        told = [int(self._stop_asked == number) for number in STOP_SIGNALS]
        told.append(int(self._pending is not None and self._pending.files.done()))
        *counts, written = all_reduce_sum(torch.tensor(told, device=get_accelerator().current_device_name())).tolist()
        stop = next((name for name, count in zip(STOP_SIGNALS.values(), counts, strict=True) if count), None)
        return stop, written == get_world_size()

    def _on_signal(self, number: int, _frame) -> None:
        if os.getpid() != self._process:  # a forked worker (of a reward function's pool, say)
            if number == signal.SIGTERM:  # it ends as one does; a Ctrl-C is the run's, which needs it to the step's end
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        text = f"rank {get_rank()}: {STOP_SIGNALS[number]}: finishing the step, then saving a checkpoint\n"
        if self._stop_asked is None:
            self._stop_asked, self._asked_at = number, time.monotonic()
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

    def save_before_step(self) -> str:
        """For a step that cannot be made: save the run as it was before it, so that a resumed run begins with it.

        In step 3 updates of the step may have been made already: then the last checkpoint is the way back.

        Returns:
            where the run can be taken up, for messages
        """
        try:
            self.complete()
            if self.enabled and self._steps_saved != self.steps and self._updates == self._count_updates():
                self._save()
        except UserError as error:
            return str(error)
        return self.last()

    def last(self) -> str:
        """Where a run that fails now can be taken up, for messages."""
        is_own = self.resumed_from is not None or self._steps_saved is not None
        newest = newest_checkpoint(self.folder) if self.folder is not None and is_own else None
        return "there is no checkpoint of this run" if newest is None else f"the last checkpoint is {newest.folder}"

    def finish(self) -> None:
        """The run is over and its model saved: a later start with --resume auto has nothing to do."""
        if note := nothing_saved(self.args):
            print_rank_0(note)
        if not self.enabled:
            return
        self.complete()
        state = self._common_state() | {"output_dir": self.args.output_dir}
        self._on_rank_0(lambda: write_text(self.folder / FINISHED_FILE, json.dumps(state, indent=1), flush=True))
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    # ------------------------------------------------------------ saving

    @property
    def _name(self) -> str:
        return _name_after(self.steps)

    def _common_state(self) -> dict:
        return {
            "steps": self.steps,
            "saved_at": time.time(),
            "world_size": get_world_size(),
            "flags": flags_of(self.args),
            "models": self._fingerprints,
            "versions": versions(),
        }

    def _save(self, beside: bool = False) -> None:
        """Save the run as it is now. ``beside``: training goes on once all is copied; ``complete`` does the rest."""
        self.complete()  # one at a time
        scratch, start, state, files = self.folder / f".{self._name}", time.perf_counter(), {}, WritesBeside()
        agree(self._check_weights)
        with self._removed_if_refused(scratch):
            self._on_rank_0(scratch.mkdir)
            self._on_rank_0(lambda: state.update(self._state()))
            self._write(scratch, files.put if beside else write_now)
            if not beside:
                self._on_rank_0(lambda: self._publish(scratch, state))
        seconds = time.perf_counter() - start
        if beside:
            files.start()
            self._pending = Pending(self.steps, scratch, state, files, seconds, time.perf_counter())
        else:
            self._steps_saved = self.steps
            print_rank_0(f"checkpoint {self.folder / self._name} ({seconds:.1f} s)")

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
            self._on_rank_0(lambda: self._publish(pending.scratch, pending.state))
        self._steps_saved, end = pending.steps, time.perf_counter()
        print_rank_0(
            f"checkpoint {self.folder / _name_after(pending.steps)} (written in {end - pending.start:.1f} s; training "
            f"waited {pending.seconds:.2f} s for copies and {end - start:.2f} s for the end)"
        )

    @contextlib.contextmanager
    def _removed_if_refused(self, scratch: Path) -> Iterator[None]:
        try:
            yield
        except UserError:
            if get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _check_weights(self) -> None:
        """The checkpoint before is worth more than one that no training can go on from."""
        for name, engine in self._engines.items():
            if not has_finite_weights(engine):
                raise UserError(
                    f"the weights of the engine {name!r} are not finite in step {self.steps}, so no checkpoint was "
                    f"written; {self.last()}"
                )

    def _write(self, scratch: Path, put: Put) -> None:
        """The shards of every rank."""
        write_errors = [save_engine(engine, scratch, name, put) for name, engine in self._engines.items()]

        def write_other_files() -> None:
            for error in filter(None, write_errors):
                raise self._cannot_write(error)
            try:
                for name, (average, followed) in self._averages.items():
                    save_average(average, followed, scratch, name, put)
                put(_write_text, json.dumps(self._rank_state), scratch / rank_file(get_rank()))
            except WRITE_ERRORS as error:
                raise self._cannot_write(error) from error

        agree(write_other_files)

    def _state(self) -> dict:
        """What the state file holds, but for the files."""
        return self._common_state() | {
            "position": self._position,
            "rows": self._rows,
            "prompt_format": self._prompt_format,
            "metrics": self._writer.position(),
        }

    def _publish(self, scratch: Path, state: dict) -> None:
        """Rank 0 alone: the state file, the checkpoint's name, and the removal of older ones."""
        files = {
            str(file.relative_to(scratch)): file.stat().st_size for file in sorted(scratch.rglob("*")) if file.is_file()
        }
        write_text(scratch / STATE_FILE, json.dumps(state | {"files": files}, indent=1), flush=True)
        name = _name_after(state["steps"])
        target = self.folder / name
        if target.exists():  # of a run that was taken up again at an earlier step
            remove_checkpoint(target)
        scratch.rename(target)
        flush_to_disk(self.folder)
        write_text(self.folder / LATEST_FILE, name + "\n", flush=True)
        # Whatever the clocks of its hosts say, the one just written stays.
        others = [other.folder for other in complete_checkpoints(self.folder) if other.folder != target]
        for old in others[: max(0, len(others) + 1 - self.args.keep_checkpoints)]:
            remove_checkpoint(old)

    def _on_rank_0(self, write: Callable[[], None]) -> None:
        """Write something on rank 0; a failure there reaches all ranks."""

        def write_or_refuse() -> None:
            try:
                write()
            except OSError as error:
                raise self._cannot_write(error) from error

        agree(write_or_refuse if get_rank() == 0 else lambda: None)

    def _cannot_write(self, error: Exception, steps: int | None = None) -> UserError:
        free, steps = shutil.disk_usage(self.folder).free / 2**20, self.steps if steps is None else steps
        return UserError(
            f"the checkpoint of step {steps} could not be written to {self.folder}, where {free:.1f} MiB are "
            f"free: {error}; {self.last()}"
        )


def _name_after(steps: int) -> str:
    return f"{PREFIX}{steps:08d}"


def _write_text(text: str, path: Path) -> None:
    write_text(path, text, flush=True)


def _name_of(engine, engines: dict) -> str:
    return next(name for name, other in engines.items() if other is engine)


class _Settings:
    """What this run's flags say of learning rates, weight decay and the schedule, which loading an engine replaces."""

    def __init__(self, engine):
        self._schedule = engine.lr_scheduler
        self._groups = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self._schedule.optimizer.param_groups
        ]
        self._rates = list(self._schedule.base_lrs)

    def restore(self) -> str:
        """Let them count from the next step on; returns what becomes of the learning rate, in words."""
        schedule, groups = self._schedule, self._schedule.optimizer.param_groups
        before = groups[0]["lr"]
        schedule.base_lrs = self._rates
        for group, own, rate, rule in zip(groups, self._groups, self._rates, schedule.lr_lambdas, strict=True):
            group.update(own, lr=rate * rule(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in groups]
        return (
            f"the schedule is at optimizer step {schedule.last_epoch} of its new course: the learning rate of the next "
            f"is {groups[0]['lr']:.6g}, and would have been {before:.6g}"
        )


def _folder_of(args) -> Path | None:
    """--checkpoint_dir, else the folder checkpoints in --output_dir, where there is one."""
    if args.checkpoint_dir is not None:
        return Path(args.checkpoint_dir)
    return None if args.output_dir is None else Path(args.output_dir) / "checkpoints"
