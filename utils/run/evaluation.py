"""What happens beside the training while a run goes on: evaluations, the best model, saved models, an early end.

Nothing here leaves a trace in the training: with and without it a run has the same losses and the same weights.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from utils.arguments import Step
from utils.arguments.watching import LOWER_IS_BETTER, watched_metric, worse_than_at_start
from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.files import BEST_FOLDER, SAVED_FOLDER, write_text
from utils.process.ranks import agree
from utils.process.seeds import random_states_kept
from utils.process.world import is_rank_0

BEST_RECORD = "best.json"
Figures = dict[str, float]


def saved_folder(steps: int) -> str:
    return f"step-{steps:06d}"


class Evaluations:
    """Evaluates a model when that is due, and acts on what comes out; every rank makes all its calls alike.

    Args:
        args: of the run.
        measure: the figures of the model as it is, from so many batches of each rank (0: all); the same on every rank.
        console: is told before an evaluation, evaluating(steps, epoch), and after it, evaluated(steps, epoch, figures).
        writer: of the metrics.
        save: writes the model to a folder under --output_dir: save(sub_folder, figures), with the figures of the last
            evaluation.
        batches: of a whole evaluation on each rank.

    Attributes:
        stopped: whether the run ends here (--early_stopping_patience).
        figures: of the last evaluation.
    """

    def __init__(
        self,
        args,
        step: Step,
        measure: Callable[[int], Figures],
        console,
        writer,
        save: Callable[[str, Figures], None],
        batches: int,
    ):
        self.args, self._measure, self._console, self._writer, self._save = args, measure, console, writer, save
        self._limit = getattr(args, "eval_iters", 0)
        self._limit = 0 if self._limit >= batches else self._limit
        self._saves_with_figures = step == 2  # a reward model holds the scale of its scores
        self._step, self._metric = step, watched_metric(args, step)
        self._evaluates = step != 3 or args.eval_interval > 0
        self._best: float | None = None
        self._best_step, self._waited, self._steps, self._whole = 0, 0, -1, False
        self._start: Figures = {}  # of the model before training
        self.figures: Figures = {}

    def state_dict(self) -> dict:
        """What a checkpoint holds: the best value so far, and how long ago it was; where the last evaluation was."""
        return {
            "metric": self._metric,
            "best": self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "steps": self._steps,
            "whole": self._whole,
            "start": self._start,
            "figures": self.figures,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError or TypeError: what ``state_dict`` does not give."""
        self._steps, self._whole = int(state["steps"]), bool(state["whole"])
        self.figures = {str(name): float(value) for name, value in state["figures"].items()}
        self._start = {str(name): float(value) for name, value in state.get("start", {}).items()}  # older ones: without
        if state["metric"] == self._metric and state["best"] is not None:  # else the comparison begins anew
            self._best, self._best_step = float(state["best"]), int(state["best_step"])
            self._waited = int(state["waited"])

    @property
    def stopped(self) -> bool:
        return self.args.early_stopping_patience is not None and self._waited >= self.args.early_stopping_patience

    # ------------------------------------------------------------ when

    def before_training(self, resumed: dict | None) -> None:
        """The figures of the model that a fresh run starts from; they take no part in the comparison."""
        if resumed is None and self._evaluates and not self.args.skip_initial_evaluation:
            self._evaluate(0, 0, self._limit)
            self._start = self.figures

    def after_step(self, steps: int, epoch: int) -> None:
        """After each optimizer step, before the run's checkpoint of it: what the flags ask for.

        Args:
            steps: done. epoch: the one that is going on, from 1.
        """
        saves = self.args.save_interval is not None and steps % self.args.save_interval == 0
        if self.args.eval_interval and steps % self.args.eval_interval == 0:
            self._evaluate(steps, epoch, self._limit)
            self._compare()
        elif saves and self._saves_with_figures:
            self._evaluate(steps, epoch, self._limit)
        if saves:
            self._save(saved_folder(steps), self.figures)
            agree(lambda: self._remove_old(steps) if is_rank_0() else None)

    def after_epoch(self, steps: int, epoch: int) -> None:
        """After a whole epoch of a step that trains one model. The last one is compared on as many batches as the
        others; at_end follows it."""
        if self._steps != steps and (epoch < self.args.num_train_epochs or self._metric):
            self._evaluate(steps, epoch, self._limit)
            self._compare()

    def at_end(self, steps: int, epoch: int) -> None:
        """When the run ends, early or not: on all batches, unless that is done. Says what got worse."""
        if not self._evaluates:
            return
        is_done = self._steps == steps
        as_at_start = self.figures if is_done and self._whole != bool(self._limit) else None  # on as many batches
        if not (is_done and self._whole):
            self._evaluate(steps, epoch, 0)
            if not is_done:
                self._compare()
        if self._start and self._limit and as_at_start is None:
            with random_states_kept():  # of other rows a difference would say nothing
                as_at_start = self._measure(self._limit)
        for line in worse_than_at_start(self.args, self._step, self._start, as_at_start or self.figures):
            print_rank_0(line)

    # ------------------------------------------------------------ what

    def _evaluate(self, steps: int, epoch: int, limit: int) -> None:
        self._console.evaluating(steps, epoch)
        with random_states_kept():
            self.figures = self._measure(limit)
        self._steps, self._whole = steps, limit == 0
        self._console.evaluated(steps, epoch, self.figures)
        self._writer.write(steps, self.figures, "eval")

    def _compare(self) -> None:
        """Keep the model if it is the best one so far; count the evaluations since the best."""
        if self._metric is None:
            return
        value = self.figures[self._metric]
        if math.isfinite(value) and (self._best is None or self._is_better(value)):
            self._best, self._best_step, self._waited = value, self._steps, 0
            if self.args.save_best:
                self._keep_best()
            return
        self._waited += 1
        if self.stopped:
            best = f"{self._best:.6g} (step {self._best_step})" if self._best is not None else "none that is finite"
            print_rank_0(
                f"early stopping: {self._waited} evaluations without a better {self._metric} than {best}: the run ends "
                f"here, after {self._steps} steps"
            )

    def _is_better(self, value: float) -> bool:
        return value < self._best if self._metric in LOWER_IS_BETTER else value > self._best

    def _keep_best(self) -> None:
        self._save(BEST_FOLDER, self.figures)
        folder = Path(self.args.output_dir) / BEST_FOLDER
        record = {"step": self._steps, "metric": self._metric, "value": self._best, "figures": self.figures}

        def write_record() -> None:
            try:
                write_text(folder / BEST_RECORD, json.dumps(record, indent=1) + "\n")
            except OSError as error:
                raise UserError(f"{folder / BEST_RECORD} could not be written: {error}") from error

        agree(write_record if is_rank_0() else lambda: None)
        print_rank_0(f"best so far: {self._metric} {self._best:.6g} at step {self._steps}, saved in {folder}")

    def _remove_old(self, steps: int) -> None:
        """Rank 0: leave the newest --save_total_limit models of this run."""
        if self.args.save_total_limit is None:
            return
        found = [(SAVED_FOLDER.fullmatch(entry.name), entry) for entry in Path(self.args.output_dir).iterdir()]
        # Later ones are of a run that was taken up again at an earlier step: it will write them anew.
        saved = sorted((int(match[1]), entry) for match, entry in found if match and int(match[1]) <= steps)
        for _, folder in saved[: -self.args.save_total_limit]:
            going = folder.with_name(f".{folder.name}-going")  # in one step it is no model any more
            try:
                shutil.rmtree(going, ignore_errors=True)
                folder.rename(going)
                shutil.rmtree(going)
            except OSError as error:
                raise UserError(f"--save_total_limit: {folder} could not be removed: {error}") from error
