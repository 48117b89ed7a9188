"""Where a run begins: afresh, with the weights of a checkpoint, or in the middle, as if it had never stopped.

A run that goes on may have another number of ranks or another ZeRO stage than its checkpoint: each rank reads its share
from the files of all (see ``other_layout``), and a step keeps its rows. Every flag that shapes the training must be
what it was, but for those that --allow_changed names.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.arguments import MAY_CHANGE_AT_RESUME, Settled
from utils.process.console import print_rank_0
from utils.process.errors import EndOfRun, UserError
from utils.process.ranks import agree, all_gather_objects
from utils.process.seeds import derived_seed, random_states, restore_random_states, set_random_seed
from utils.process.versions import versions
from utils.process.world import get_rank, get_world_size, ranks_per_node
from utils.run.checkpoint_files import (
    FINISHED_FILE,
    STATE_FILE,
    SavedCheckpoint,
    check_shared_folder,
    newest_checkpoint,
    rank_file,
    read_checkpoint,
    read_finished,
    read_small_file,
    take_folder,
)
from utils.run.engine_state import load_average, load_engine, refused_content
from utils.run.former_run import former_checkpoints
from utils.run.other_layout import load_average_from, load_from_other_layout, load_weights, start_average
from utils.run.same_run import (
    BATCH_FLAGS,
    LAYOUT_FLAGS,
    NO_FLAGS,
    changed_flags,
    differences,
    other_layout,
    same_global_batch,
    same_model,
)
from utils.run.saved_average import SavedAverage
from utils.run.saved_engine import SavedEngine


class StartingPoint:
    """Chooses the checkpoint that a run begins from, if there is one; every rank makes all calls alike.

    Args:
        args: of the run.
        folder: of its checkpoints; None for none. writes: whether it will write any there.
        models: the flags that name the models it starts from.

    Attributes:
        args: of the run; where its ranks are others than the checkpoint's, with the accumulation that keeps a step's
            rows.
        resumed_from: the checkpoint that the run goes on from, or None for a fresh start.
        weights_from: the checkpoint that a fresh start takes its weights from, or None.

    Raises:
        UserError: a folder, checkpoint or flag that does not fit; on all ranks alike.
        EndOfRun: --resume auto, and the run has finished.
    """

    def __init__(self, args, folder: Path | None, writes: bool, models: Sequence[str]):
        self.args, self._folder, self._writes, self._models = args, folder, writes, models
        self.resumed_from: SavedCheckpoint | None = None
        self.weights_from: SavedCheckpoint | None = None
        self._other_layout: list[str] = []
        # Checkpoints under the output folder go with all else there; those in a folder of their own do not.
        self._replaces = args.overwrite_output_dir and args.output_dir is not None and args.checkpoint_dir is None
        finished = None

        def choose_start() -> None:
            nonlocal finished
            if writes or (self._replaces and former_checkpoints(folder)):
                self._lock = take_folder(folder)  # held until the process ends
            finished = self._read_finished()
            if finished is None:
                self.resumed_from = self._choose()
                if writes:  # an earlier run's, from here on
                    (folder / FINISHED_FILE).unlink(missing_ok=True)

        agree(choose_start if get_rank() == 0 else lambda: None)
        if writes and get_world_size() > ranks_per_node():
            check_shared_folder(folder)
        finished, self.resumed_from = all_gather_objects((finished, self.resumed_from))[0]
        if args.resume_weights_only:
            self.weights_from, self.resumed_from = self.resumed_from, None
        if finished is not None:
            raise EndOfRun(
                f"--resume auto: this run has finished after {finished['steps']} steps; its model is in "
                f"{finished['output_dir']}. To save that again delete {folder / FINISHED_FILE}, to train anew {folder}"
            )
        if self.resumed_from is not None:
            agree(self._check_resumed)
        elif args.resume == "auto":
            print_rank_0(f"--resume auto: no checkpoint in {folder}, so this is a fresh start")

    # ------------------------------------------------------------ the choice

    def _read_finished(self) -> dict | None:
        finished = read_finished(self._folder) if self.args.resume == "auto" else None
        if finished is None:
            return None
        self._refuse_other_run(f"the run that finished in {self._folder}", finished)
        epochs = finished["flags"].get("num_train_epochs")
        if "num_train_epochs" in self.args.allow_changed and self.args.num_train_epochs > epochs:
            print(f"--allow_changed num_train_epochs: the run had finished after {epochs} epochs, and goes on")
            return None
        return finished

    def _choose(self) -> SavedCheckpoint | None:
        resume = self.args.resume
        if resume == "auto":
            return newest_checkpoint(self._folder)
        own = newest_checkpoint(self._folder) if self._writes else None
        if resume is not None:
            chosen = read_checkpoint(Path(resume))
            elsewhere = own is not None and chosen.folder.resolve().parent != self._folder.resolve()
            if own is not None and self.args.resume_weights_only and not self._replaces:
                raise UserError(
                    f"--checkpoint_dir {self._folder} holds checkpoints already, which those of this run, a new one, "
                    "would replace: name another folder"
                )
            if elsewhere and not self.args.resume_weights_only:
                raise UserError(
                    f"--checkpoint_dir {self._folder} holds checkpoints already, and not {chosen.folder}: those of "
                    "this run would replace them. Go on from them with --resume auto, or name another folder"
                )
            return chosen
        if own is not None and not self._replaces:
            raise UserError(
                f"--checkpoint_dir {self._folder} holds checkpoints of an earlier run: go on from them with "
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
        if reasons := differences(self.args, self._models, state):
            raise UserError(f"--resume: {what}: {'; '.join(reasons)}")

    # ------------------------------------------------------------ the state

    def load(self, rows, engines: dict, averages: dict, tracked: dict) -> None:
        """Put the run into the state of the checkpoint that it goes on from, or give it that one's weights, if any.

        Args:
            rows: fingerprint of the training rows, which must be those of the checkpoint.
            engines, averages, tracked: as ``Checkpoints.resume`` takes them.
        """
        if self.resumed_from is not None:
            self._load_all(rows, engines, averages, tracked)
        elif self.weights_from is not None:
            self._load_weights(engines, averages)
            print_rank_0(
                f"--resume_weights_only: the weights are those of {self.weights_from.folder}, after "
                f"{self.weights_from.state['steps']} steps; all else begins anew"
            )

    def _load_all(self, rows, engines: dict, averages: dict, tracked: dict) -> None:
        folder, state = self.resumed_from.folder, self.resumed_from.state
        same_ranks = state["world_size"] == get_world_size()
        file, rank_state = folder / rank_file(get_rank() if same_ranks else 0), None

        def read_rank_state() -> None:
            nonlocal rank_state
            if rows != state["rows"]:
                raise UserError(f"--resume: {folder} is of another run: its training rows were other ones")
            try:
                rank_state = json.loads(read_small_file(file))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"--resume: {file}: {error}") from error

        def restore() -> None:
            for name, (average, followed) in averages.items():
                if self._other_layout:
                    shapes = SavedEngine(folder / _name_of(followed, engines)).shapes
                    load_average_from(average, followed, SavedAverage(folder, name, shapes))
                else:
                    load_average(average, followed, folder, name)
            with refused_content(file):
                self._restore_rank_state(rank_state, tracked)

        agree(read_rank_state)
        saved_engines: dict[str, SavedEngine] = {}
        for name, engine in engines.items():
            settings = _Settings(engine)
            if self._other_layout:
                agree(lambda name=name: saved_engines.update({name: SavedEngine(folder / name)}))
                load_from_other_layout(engine, saved_engines[name])
            else:
                load_engine(engine, folder, name)
            if self.args.allow_changed:
                print_rank_0(f"--allow_changed: {name}: {settings.restore()}")
        agree(restore)

    def _restore_rank_state(self, state: dict, tracked: dict) -> None:
        saved = self.resumed_from.state
        same_ranks = saved["world_size"] == get_world_size()
        if "unsupervised" in state["tracked"] and not same_ranks:
            rows = saved["flags"]["per_device_training_batch_size"] * saved["world_size"]
            state["tracked"]["unsupervised"].setdefault("rows", rows)  # which earlier versions did not note
        own_stream = self.args.seed, saved["steps"], get_rank()
        for name, thing in tracked.items():
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

    def _load_weights(self, engines: dict, averages: dict) -> None:
        """Those of --resume_weights_only, into each engine and average of this run that the checkpoint has too."""
        folder, state = self.weights_from.folder, self.weights_from.state
        saved: dict[str, SavedEngine] = {}

        def read() -> None:
            for name in engines:
                if not (folder / name).is_dir():
                    raise UserError(f"--resume_weights_only: {folder} holds no {name}: it is of another step")
                saved[name] = SavedEngine(folder / name)

        agree(read)
        start_of = {"model": "model_name_or_path"}
        for name, engine in engines.items():
            start = start_of.get(name, f"{name}_model_name_or_path")
            same_start = same_model(getattr(self.args, start), state["models"].get(start))
            load_weights(engine, saved[name], same_start)
        for name, (average, followed) in averages.items():
            start_average(average, followed)
            if any(file.startswith(f"{name}-rank") for file in state["files"]):
                shapes = saved[_name_of(followed, engines)].shapes
                load_average_from(average, followed, SavedAverage(folder, name, shapes))


def take_rank_state(tracked: dict) -> dict:
    """The small state of this rank, as between two steps, which ``StartingPoint.load`` restores."""
    states = {
        name: thing.bit_generator.state if isinstance(thing, np.random.Generator) else thing.state_dict()
        for name, thing in tracked.items()
    }
    return {"random": random_states(), "tracked": states}


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
