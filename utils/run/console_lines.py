"""What a person is told of a run: what its stage does, how it goes, what to do with its result; and the classic lines
of steps 1 and 2, which programs read."""

import datetime
import shlex
from pathlib import Path

from utils import perf
from utils.arguments import DPO, PROJECT, TITLES, Step
from utils.model.losses import warn_diverged
from utils.process.console import print_brief, print_classic

EVALUATION = {
    1: "***** Evaluating perplexity, Epoch",
    2: "***** Evaluating reward, Epoch",
    DPO: "***** Evaluating rewards, Epoch",
}
EVALUATED = {
    1: "ppl: {perplexity}, loss: {loss}",
    2: "chosen_last_scores (higher is better) : {chosen_score}, "
    "rejected_last_scores (lower is better) : {rejected_score}, acc (higher is better) : {accuracy}",
    DPO: "chosen: {rewards/chosen}, rejected: {rewards/rejected}, loss: {loss}",
}
SAVING = {1: "saving the final model ...", 2: "saving model ...", DPO: "saving the final model ..."}


def rounded(value: float | None) -> str:
    """A figure for reading: three places for what is small, separators for what is large."""
    if value is None:
        return "none"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def short_path(path) -> str:
    """Relative where the run's own folder holds it, and ready for a shell."""
    path = Path(path).absolute()
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def command(script: str, *words: str) -> str:
    """A line to copy: a program of the project with its arguments."""
    return f"    python {short_path(PROJECT / script)} {' '.join(words)}"


class TimeLeft:
    """How long a run goes on at the pace of this start; evaluations and checkpoints are not in it."""

    def __init__(self):
        self._seconds, self._steps = 0.0, 0

    def step(self, seconds: float) -> None:
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1

    def text(self, steps: int) -> str:
        """For so many steps more."""
        return duration(self._seconds / max(self._steps, 1) * steps)


class SupervisedConsole:
    """The lines of a run that trains one model; every rank makes the calls, rank 0 prints.

    Args:
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, args, step: Step, total_steps: int):
        self.args, self._step, self._total, self._left = args, step, total_steps, TimeLeft()

    def begin(self, rows: int) -> None:
        args, model = self.args, self.args.model_name_or_path
        what = {
            1: f"supervised finetuning: {model} learns from {rows:,} rows with good answers",
            2: f"reward model: {model} learns from {rows:,} rows which of several answers people prefer",
            DPO: f"{model} learns from {rows:,} rows to give the answers that people prefer",
        }
        epochs = f"{args.num_train_epochs} epoch{'s' if args.num_train_epochs > 1 else ''}"
        print_brief(f"{TITLES[self._step]}, {what[self._step]}, in {self._total:,} steps ({epochs})")
        print_classic("***** Running training *****")

    def epoch(self, epoch: int, micro_batches: int) -> None:
        """``epoch`` counts from 0."""
        print_classic(
            f"Beginning of Epoch {epoch + 1}/{self.args.num_train_epochs}, Total Micro Batches {micro_batches}"
        )

    def step(self, steps: int, figures: dict, engine, seconds: float, tokens: float, rows: float, shows: bool) -> dict:
        """After each step; its line where the step ``shows`` one.

        Args:
            steps: done.

        Returns:
            the throughput of a step that shows a line, for its metrics
        """
        self._left.step(seconds)
        if not shows:
            return {}
        throughput = perf.print_throughput(engine, self.args, seconds, tokens=int(tokens), rows=int(rows))
        print_classic(f"Step: {steps}/{self._total}, Loss: {figures['loss']:.6g}, Learning Rate: {figures['lr']:.6g}")
        parts = [f"step {steps}/{self._total}", f"loss {rounded(figures['loss'])}"]
        parts += [f"accuracy {figures['accuracy']:.2f}"] if "accuracy" in figures else []
        parts += [f"kl {rounded(figures['kl'])}"] if "kl" in figures else []
        parts += [f"lr {figures['lr']:.1e}", f"{throughput['tokens_per_second']:,.0f} tokens/s"]
        parts += [f"left {self._left.text(self._total - steps)}"]
        parts += [f"skipped {figures['skipped_steps']}"] if figures["skipped_steps"] else []
        print_brief("  ".join(parts))
        return throughput

    def evaluating(self, steps: int, epoch: int) -> None:
        print_classic(f"{EVALUATION[self._step]} {epoch}/{self.args.num_train_epochs} *****")

    def evaluated(self, steps: int, epoch: int, figures: dict) -> None:
        when = f"evaluation after step {steps}" if steps else "evaluation before training"
        print_classic(EVALUATED[self._step].format_map(figures))
        if self._step == 1:
            print_brief(f"{when}: perplexity {rounded(figures['perplexity'])}, loss {rounded(figures['loss'])}")
            warn_diverged(figures["loss"])
            return
        right = f"{100 * figures['accuracy']:.1f} % of {figures['pairs']:,.0f} pairs right"
        margin = f", margin {rounded(figures['margin'])}" if "margin" in figures else ""
        print_brief(f"{when}: {right}{margin}, loss {rounded(figures['loss'])}")

    def saving(self) -> None:
        print_classic(SAVING[self._step])

    def end(self) -> None:
        """Where the result is, and what to do with it."""
        if self.args.output_dir is None:
            return
        folder = short_path(self.args.output_dir)
        if self._step != 2:
            then = "; steps 2 and 3 start from that folder" if self._step == 1 else ""
            print_brief(f"the model is in {folder}{then}. To talk to it:")
            print_brief(command("inference/chatbot.py", "--path", folder))
        else:
            print_brief(f"the reward model is in {folder}; step 3 takes it as --critic_model_name_or_path. To try it:")
            print_brief(command("evaluation_scripts/rw_eval.py", "--model_name_or_path", folder))
