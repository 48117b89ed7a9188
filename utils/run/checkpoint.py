"""Stopping and resuming: checkpoints of a whole run, and going on from one as if nothing had happened.

A checkpoint is a folder ``step-00000050`` of --checkpoint_dir:

    state.json            flags, step, metrics files, name and size of every other file; written last
    rank00000.json        per rank: random states, and the small state of whatever the run tracks
    ENGINE/               DeepSpeed's shards of a trained engine (weights, optimizer, schedule)
    NAME-rank00000.safetensors   shards of a moving average

It is written under another name and renamed when complete; then ``latest`` names it, and older ones go. On resuming
every file must be there in its full size, and every flag that shapes the training must be what it was.
"""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.process.console import print_rank_0
from utils.process.errors import EndOfRun, UserError, trouble_between_ranks
from utils.process.files import flush_to_disk, write_text
from utils.process.ranks import agree, all_gather_objects, all_reduce_sum
from utils.process.world import get_local_rank, get_rank, get_world_size, ranks_per_node
from utils.run.checkpoint_files import (
    FINISHED,
    FINISHED_FILE,
    LATEST_FILE,
    LOCK_FILE,
    PREFIX,
    STATE_FILE,
    Found,
    SafeFiles,
    _check_kinds,
    _read_small,
    _remove,
    complete_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from utils.run.same_run import differences, flags_of, model_fingerprint, rows_fingerprint, versions

LOCK_SECONDS = 120  # how long a start waits for the end of the run before it; a dead NFS client keeps locks for 90


def random_states() -> dict:
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
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["accelerator"] is not None:
        get_accelerator().set_rng_state(torch.tensor(states["accelerator"], dtype=torch.uint8))


class Checkpoints:
    """Saves a run's checkpoints and resumes it from one; every rank makes all its calls alike.

    Args:
        args: of the run. models: the flags that name the models it starts from.

    Attributes:
        found: what the run resumes from, or None for a fresh start.
        steps: optimizer steps done (step 3: updates).

    Raises:
        UserError: a folder, checkpoint or flag that does not fit; on all ranks alike.
        EndOfRun: --resume auto, and the run has finished.
    """

    def __init__(self, args, *models: str):
        self.args, self.models, self.steps, self.found = args, models, 0, None
        self.folder = None if args.checkpoint_dir is None else Path(args.checkpoint_dir)
        self.enabled = self.folder is not None and (args.checkpoint_steps > 0 or args.checkpoint_dir_given)
        self._lock, self._stop, self._saved = None, False, None
        self._fingerprints = {name: model_fingerprint(getattr(args, name)) for name in models}
        finished = None

        def look() -> None:
            nonlocal finished
            if self.enabled:
                self._take_folder()
            finished = self._read_finished()
            if finished is None:
                self.found = self._choose()
                if self.enabled:  # an earlier run's, from here on
                    (self.folder / FINISHED_FILE).unlink(missing_ok=True)

        agree(look if get_rank() == 0 else lambda: None)
        if self.enabled and get_world_size() > ranks_per_node():
            self._check_shared()
        finished, self.found = all_gather_objects((finished, self.found))[0]
        if finished is not None:
            raise EndOfRun(
                f"--resume auto: this run has finished after {finished['steps']} steps; its model is in "
                f"{finished['output_dir']}. To save that again delete {self.folder / FINISHED_FILE}, to train anew "
                f"{self.folder}"
            )
        if self.found is not None:
            agree(self._check_found)
        elif args.resume == "auto":
            print_rank_0(f"--resume auto: no checkpoint in {self.folder}, so this is a fresh start")

    # ------------------------------------------------------------ at the start

    def _take_folder(self) -> None:
        """Make the folder this run's own: two runs that write the same checkpoints would ruin them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)  # held until the process ends
        except OSError as error:
            raise UserError(f"--checkpoint_dir {self.folder}: cannot be written: {error.strerror}") from error
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                    break
                if time.monotonic() > end:
                    raise UserError(
                        f"--checkpoint_dir {self.folder}: another run that is not over writes its checkpoints there"
                    ) from error
                time.sleep(0.5)
        for scratch in self.folder.glob(f".{PREFIX}*"):  # of a run that was killed while it saved
            shutil.rmtree(scratch, ignore_errors=True)

    def _check_shared(self) -> None:
        """Refuse a folder of which each node has its own: every rank writes its part of a checkpoint there."""
        mark = f".node-{all_gather_objects(uuid.uuid4().hex)[0]}-"
        own = self.folder / f"{mark}{get_rank()}"

        def write() -> None:
            try:
                if get_local_rank() == 0:
                    own.touch()
            except OSError as error:
                raise refused(error.strerror) from error

        def look() -> None:
            if not (self.folder / f"{mark}0").exists():
                raise refused("what the first node writes there is not to be seen")

        def refused(reason: str) -> UserError:
            return UserError(
                f"--checkpoint_dir {self.folder}: on {socket.gethostname()}: {reason}; checkpoints of several nodes "
                "belong on storage that all of them share"
            )

        try:
            agree(write)
            agree(look)
        finally:
            own.unlink(missing_ok=True)

    def _read_finished(self) -> dict | None:
        if self.args.resume != "auto":
            return None
        try:
            finished = json.loads(_read_small(self.folder / FINISHED_FILE))
            _check_kinds(finished, FINISHED)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None
        self._refuse(f"the run that finished in {self.folder}", differences(self.args, finished))
        return finished

    def _choose(self) -> Found | None:
        resume = self.args.resume
        if resume == "auto":
            return newest_checkpoint(self.folder)
        if resume is not None:
            found = read_checkpoint(Path(resume))
            if (
                self.enabled
                and newest_checkpoint(self.folder)
                and found.folder.resolve().parent != self.folder.resolve()
            ):
                raise UserError(
                    f"--checkpoint_dir {self.folder} holds checkpoints already, and not {found.folder}: those of this "
                    "run would replace them. Go on from them with --resume auto, or name another folder"
                )
            return found
        if self.enabled and newest_checkpoint(self.folder) is not None:
            raise UserError(
                f"--checkpoint_dir {self.folder} holds checkpoints of an earlier run: go on from them with "
                "--resume auto, delete them, or name another folder"
            )
        return None

    def _check_found(self) -> None:
        if not (self.found.folder / STATE_FILE).is_file():
            raise UserError(
                f"{self.found.folder} is not to be seen on every node: checkpoints belong on storage that all share"
            )
        self._refuse(f"{self.found.folder} is of another run", differences(self.args, self.found.state))
        other = [
            f"{name} {then}" for name, then in self.found.state["versions"].items() if versions().get(name) != then
        ]
        if other and get_rank() == 0:
            print(f"note: the checkpoint was written with {', '.join(other)}: losses may differ in their last digits")

    @staticmethod
    def _refuse(what: str, reasons: list[str]) -> None:
        if reasons:
            raise UserError(f"--resume: {what}: {'; '.join(reasons)}")

    @property
    def resumed(self) -> dict | None:
        """The state of the checkpoint that the run goes on from."""
        return None if self.found is None else self.found.state

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
        self._position = [0, 0]
        self._rows = rows_fingerprint(dataset) if self.enabled or self.found else None
        for engine in engines.values():
            engine.checkpoint_engine = SafeFiles()
            # Among the shards DeepSpeed puts a script of its own, on rank 0 alone: no use here, and on a full disk the
            # others would wait for rank 0.
            engine._copy_recovery_script = lambda folder: None
        if self.found is not None:
            start = time.perf_counter()
            self._load()
            print_rank_0(
                f"resumed from {self.found.folder}: {self.steps} steps are done "
                f"(read in {time.perf_counter() - start:.1f} s)"
            )
        if self.enabled:
            self._rank_state, self._updates = self._take_rank_state(), self._count_updates()
            self._process = os.getpid()
            signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _count_updates(self) -> list[int]:
        return [engine.global_steps - engine.skipped_steps for engine in self._engines.values()]

    def _take_rank_state(self) -> dict:
        """The small state of this rank, as between two steps."""
        tracked = {
            name: thing.bit_generator.state if isinstance(thing, np.random.Generator) else thing.state_dict()
            for name, thing in self._tracked.items()
        }
        return {"random": random_states(), "tracked": tracked}

    def _load(self) -> None:
        folder, state = self.found.folder, self.found.state
        rank_state = None

        def look() -> None:
            nonlocal rank_state
            if self._rows != state["rows"]:
                raise UserError(f"--resume: {folder} is of another run: its training rows were other ones")
            try:
                rank_state = json.loads(_read_small(folder / _rank_name("rank", ".json")))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"--resume: {folder / _rank_name('rank', '.json')}: {error}") from error

        agree(look)
        self.steps = self._saved = state["steps"]
        self._position = state["position"]
        for name, engine in self._engines.items():
            weights = {key for key, param in engine.module.named_parameters() if param.requires_grad}
            engine.checkpoint_engine.wanted = weights
            with _taking_up(folder / name):
                # What is frozen is not in the files: it came from the model that the run starts from, as it did then.
                loaded, _ = engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)
                if loaded is None:
                    raise ValueError("no weights")

        def take_up() -> None:
            for name, (average, followed) in self._averages.items():
                file = folder / _average_file(name, average)
                with _taking_up(file):
                    saved = load_file(file)
                    for part, target in _moving_parts(average, followed):
                        if saved[part].shape != target.shape:
                            raise ValueError(f"{part} has the shape {list(saved[part].shape)}")
                        target.copy_(saved[part])
            with _taking_up(folder / _rank_name("rank", ".json")):
                for name, thing in self._tracked.items():
                    if isinstance(thing, np.random.Generator):
                        thing.bit_generator.state = rank_state["tracked"][name]
                    else:
                        thing.load_state_dict(rank_state["tracked"][name])
                restore_random_states(rank_state["random"])

        agree(take_up)

    # ------------------------------------------------------------ in the loop

    def epochs(self, count: int) -> Iterator[tuple[int, int]]:
        """(epoch, steps of it that are done) for every epoch that is not over, evaluation included."""
        epoch, done = self._position
        for later in range(epoch, count):
            yield later, done if later == epoch else 0

    def end_step(self, epoch: int, done: int) -> None:
        """After each step: save where a checkpoint is due; after a SIGTERM to any rank save and end the run.

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
        stop = bool(all_reduce_sum(torch.tensor(int(self._stop), device=_device())))
        if stop or (self.args.checkpoint_steps and self.steps % self.args.checkpoint_steps == 0):
            self._save()
        if stop:
            self._writer.close()
            raise EndOfRun(
                f"stopped by SIGTERM after {self.steps} steps; all is in {self.folder / self._name}. "
                "The same command with --resume auto goes on from there"
            )

    def finish(self) -> None:
        """The run is over and its model saved: a later start with --resume auto has nothing to do."""
        if not self.enabled:
            return
        state = self._common_state() | {"output_dir": self.args.output_dir}
        self._on_rank_0(lambda: write_text(self.folder / FINISHED_FILE, json.dumps(state, indent=1), flush=True))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def save_before_step(self) -> str:
        """For a step that cannot be made: save the run as it was before it, so that it begins with this step when it is
        taken up. In step 3 updates of the step may have been made already: then the last checkpoint is the way back.

        Returns:
            where the run can be taken up, for messages
        """
        if self.enabled and self._saved != self.steps and self._updates == self._count_updates():
            try:
                self._save()
            except UserError as error:
                return str(error)
        return self.last()

    def last(self) -> str:
        """Where a run that fails now can be taken up, for messages."""
        found = newest_checkpoint(self.folder) if self.folder is not None else None
        return "there is no checkpoint of this run" if found is None else f"the last checkpoint is {found.folder}"

    def _ask_to_stop(self, *_signal) -> None:
        if os.getpid() != self._process:  # a forked worker (of a reward function's pool, say) ends as one does
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._stop = True
        # Not print: the signal may come in the middle of one.
        os.write(1, f"rank {get_rank()}: SIGTERM: finishing the step, then saving a checkpoint\n".encode())

    # ------------------------------------------------------------ saving

    @property
    def _name(self) -> str:
        return f"{PREFIX}{self.steps:08d}"

    def _common_state(self) -> dict:
        return {
            "steps": self.steps,
            "saved_at": time.time(),
            "world_size": get_world_size(),
            "flags": flags_of(self.args),
            "models": self._fingerprints,
            "versions": versions(),
        }

    def _save(self) -> None:
        scratch, start = self.folder / f".{self._name}", time.perf_counter()
        agree(self._check_weights)
        try:
            self._on_rank_0(lambda: scratch.mkdir())
            self._write(scratch)
            self._on_rank_0(lambda: self._complete(scratch))
        except UserError:
            if get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._saved = self.steps
        print_rank_0(f"checkpoint {self.folder / self._name} ({time.perf_counter() - start:.1f} s)")

    def _check_weights(self) -> None:
        """The checkpoint before is worth more than one that no training can go on from."""
        for name, engine in self._engines.items():
            if not _is_finite(engine):
                raise UserError(
                    f"the weights of the engine {name!r} are not finite in step {self.steps}, so no checkpoint was "
                    f"written; {self.last()}"
                )

    def _write(self, scratch: Path) -> None:
        """The shards of every rank."""
        problems = []
        for name, engine in self._engines.items():
            engine.checkpoint_engine.problem = None
            engine.save_checkpoint(str(scratch), tag=name, save_latest=False, exclude_frozen_parameters=True)
            problems.append(engine.checkpoint_engine.problem)

        def write() -> None:
            for problem in filter(None, problems):
                raise self._could_not(problem)
            try:
                for name, (average, followed) in self._averages.items():
                    if get_rank() == 0 or _is_sharded(average):
                        parts = {n: part.to("cpu", copy=True) for n, part in _moving_parts(average, followed)}
                        save_file(parts, scratch / _average_file(name, average))
                        flush_to_disk(scratch / _average_file(name, average))
                write_text(scratch / _rank_name("rank", ".json"), json.dumps(self._rank_state), flush=True)
            except (OSError, SafetensorError) as error:
                raise self._could_not(error) from error

        agree(write)

    def _complete(self, scratch: Path) -> None:
        files = [file for file in scratch.rglob("*") if file.is_file()]
        state = self._common_state() | {
            "position": self._position,
            "rows": self._rows,
            "metrics": self._writer.position(),
            "files": {str(file.relative_to(scratch)): file.stat().st_size for file in sorted(files)},
        }
        write_text(scratch / STATE_FILE, json.dumps(state, indent=1), flush=True)
        target = self.folder / self._name
        if target.exists():  # of a run that was taken up again at an earlier step
            _remove(target)
        scratch.rename(target)
        flush_to_disk(self.folder)
        write_text(self.folder / LATEST_FILE, self._name + "\n", flush=True)
        # Whatever the clocks of its hosts say, the one just written stays.
        others = [found.folder for found in complete_checkpoints(self.folder) if found.folder != target]
        for old in others[: max(0, len(others) + 1 - self.args.keep_checkpoints)]:
            _remove(old)

    def _on_rank_0(self, work) -> None:
        """A failure there reaches all."""

        def telling() -> None:
            if get_rank() == 0:
                try:
                    work()
                except OSError as error:
                    raise self._could_not(error) from error

        agree(telling)

    def _could_not(self, error: Exception) -> UserError:
        free = shutil.disk_usage(self.folder).free / 2**20
        return UserError(
            f"the checkpoint of step {self.steps} could not be written to {self.folder}, where {free:.1f} MiB are "
            f"free: {error}; {self.last()}"
        )


def _device() -> str:
    accelerator = get_accelerator()
    return "cpu" if accelerator.device_name() == "cpu" else accelerator.current_device_name()


def _rank_name(prefix: str, suffix: str) -> str:
    return f"{prefix}{get_rank():05d}{suffix}"


@contextmanager
def _taking_up(file: Path) -> Iterator[None]:
    """Content that is not what a checkpoint holds there becomes an error that names the file."""
    wrong = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError, OverflowError)
    try:
        yield
    except (*wrong, OSError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or trouble_between_ranks(error):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"--resume: {file} does not hold what a checkpoint of this run does: {reason}") from error


def _is_finite(engine) -> bool:
    """Whether this rank's part of the weights that train is."""
    parts = (getattr(param, "ds_tensor", param) for param in engine.module.parameters() if param.requires_grad)
    return all(part.isfinite().all() for part in parts)


def _is_sharded(engine) -> bool:
    return any(hasattr(param, "ds_id") for param in engine.module.parameters())


def _average_file(name: str, average) -> str:
    return _rank_name(f"{name}-rank", ".safetensors") if _is_sharded(average) else f"{name}-rank00000.safetensors"


def _moving_parts(average, followed) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of each weight of an average that moves: of those that train."""
    pairs = zip(average.module.named_parameters(), followed.module.parameters(), strict=True)
    for (name, param), source in pairs:
        if source.requires_grad:
            yield name, (param.ds_tensor if hasattr(param, "ds_id") else param).data
