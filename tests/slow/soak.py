#!/usr/bin/env python
"""Kill a run again and again, with kill -9, at random moments; start it again with --resume auto; compare the end.

    python tests/slow/soak.py --steps 1 2 3 --kills 30 --ranks 2

Of each step an undisturbed run comes first. Then the same run is started with checkpoints, and the launcher, one of its
ranks, or all at once get SIGKILL; so until it has been killed --kills times and has come to its end (a run that ends
before is begun anew, data preparation included). The moment is a random time, or a random one after the first sign of a
phase, so that the short ones are met too: preparing data, writing a checkpoint, saving the model. Every time no process
may be left over a few seconds later, and every checkpoint that calls itself whole must be; at the end no half-written
file may be left, and the saved weights and losses must be those of the undisturbed run, bit for bit. Works in the demo
world, on a CPU; not part of the CI.

With --change_ranks each start has another number of ranks than the one before, 1 and 2 by turns; without dropout, with
greedy answers, and with losses that are those of the undisturbed run within 1e-4.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import psutil
from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from utils.demo.tiny_model import create_demo_model
from utils.run.checkpoint_files import LOCK_FILE, STATE_FILE, read_checkpoint

RESUME = ("--resume", "auto")
MAINS = {
    1: PROJECT / "training/step1_supervised_finetuning/main.py",
    2: PROJECT / "training/step2_reward_model_finetuning/main.py",
    3: PROJECT / "training/step3_rlhf_finetuning/main.py",
}
COMMON = "--data_path local/demo --data_split 4,3,3 --dtype fp32 --seed 7 --num_train_epochs 2 --dropout 0.1"
FLAGS = {
    1: "--max_seq_len 48 --per_device_train_batch_size 4 --max_train_samples 320 --max_eval_samples 16 --zero_stage 2",
    2: "--max_seq_len 48 --per_device_train_batch_size 4 --max_train_samples 320 --max_eval_samples 16 --zero_stage 3",
    3: "--max_prompt_seq_len 24 --max_answer_seq_len 64 --per_device_generation_batch_size 4 "
    "--per_device_training_batch_size 2 --max_train_samples 96 --enable_ema --enable_hybrid_engine "
    "--actor_zero_stage 2 --critic_zero_stage 2 --num_warmup_steps 0 --print_answers",
}
# For --change_ranks: nothing is drawn, and each update of step 3 is one optimizer step over all its answers.
COMPARABLE = {1: "--dropout 0", 2: "--dropout 0"}
COMPARABLE[3] = "--actor_dropout 0 --no-do_sample --per_device_training_batch_size 4"
SAME_ROWS = {1: {1: "--gradient_accumulation_steps 2", 2: ""}}
SAME_ROWS |= {2: SAME_ROWS[1], 3: {1: "--generation_batches 2 --gradient_accumulation_steps 2", 2: ""}}
TOLERANCE = 1e-4  # of losses, relative to the largest
PREPARING, LOADING, SAVING_CHECKPOINT, SAVING_MODEL = "preparing data", "loading", "writing a checkpoint", "saving"
TRAINING, GENERATING, UPDATING = "training", "generating", "updating"
PHASES = {  # of a step: how many seconds at most from its first sign to the kill
    **{1: {PREPARING: 0.1, TRAINING: 1, SAVING_CHECKPOINT: 0.02, SAVING_MODEL: 0.05}},
    **{3: {PREPARING: 0.1, GENERATING: 0.03, UPDATING: 0.5, SAVING_CHECKPOINT: 0.02, SAVING_MODEL: 0.05}},
}
PHASES[2] = PHASES[1]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", choices=[1, 2, 3], default=[1, 2, 3], help="of the pipeline (default all)")
    add("--kills", type=int, default=30, help="of each step (default 30)")
    add("--ranks", type=int, default=2, help="processes of a run (default 2)")
    add("--launcher", choices=["deepspeed", "torchrun", "python"], default="deepspeed", help="(default deepspeed)")
    add("--change_ranks", action="store_true", help="start with 1 and 2 ranks by turns; off: with --ranks")
    add("--async_checkpoint", action="store_true", help="checkpoints are written beside training; off: training waits")
    add("--checkpoint_steps", type=int, default=3, help="steps between checkpoints (default 3)")
    add("--seed", type=int, default=0, help="of moments and victims (default 0)")
    add("--folder", type=Path, default=Path("output/soak"), help="for all files, emptied first (default output/soak)")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of the step, last on the command line")
    return parser.parse_args()


class Run:
    """A launch of a step, known among all processes by a mark in its environment."""

    def __init__(self, args, step: int, output: Path, *flags, ranks: int | None = None):
        ranks = ranks or args.ranks
        self.step, self.output, self.data = step, output, Path(f"{output}_data")
        self.mark, binaries = uuid.uuid4().hex, Path(sys.executable).parent
        command = {
            "python": [sys.executable],
            "torchrun": [binaries / "torchrun", "--standalone", f"--nproc_per_node={ranks}"],
            "deepspeed": [
                binaries / "deepspeed",
                "--num_gpus",
                ranks,
                "--master_port",
                random.randint(20000, 60000),
            ],
        }[args.launcher]
        paths = {
            1: ["--model_name_or_path", args.folder / "base"],
            2: ["--model_name_or_path", args.folder / "base"],
            3: [
                "--actor_model_name_or_path",
                args.folder / "base",
                "--critic_model_name_or_path",
                args.folder / "reward",
            ],
        }[step]
        dropout = COMMON if step < 3 else COMMON.replace("--dropout", "--actor_dropout")
        command += [MAINS[step], *dropout.split(), *FLAGS[step].split(), *paths, "--output_dir", output]
        command += ["--data_output_path", self.data, *flags, *args.flags]
        if args.change_ranks:
            command += COMPARABLE[step].split() + SAME_ROWS[step][ranks].split()
        environment = os.environ | {"SOAK_MARK": self.mark, "PATH": f"{binaries}:{os.environ['PATH']}"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self.log = output.with_suffix(".log")
        self.told_before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log:
            self.process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=environment)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SOAK_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    @property
    def phase(self) -> str:
        """What the run is at, from its console and its files."""
        with self.log.open("rb") as log:
            log.seek(self.told_before)
            told = log.read().decode(errors="replace")
        if "***** Running training" not in told:
            prepared = "data (eval)" in told or (self.step == 3 and "data (train)" in told)
            return LOADING if prepared or not self.data.exists() else PREPARING
        if "saving model ..." in told or "saving the final model ..." in told:
            return SAVING_MODEL
        if list(self.output.glob("checkpoints/.step-*")):
            return SAVING_CHECKPOINT
        if self.step < 3:
            return TRAINING
        return UPDATING if told.rfind("--- ans") > told.rfind("-" * 85) else GENERATING

    def wait_for(self, phase: str | None, seconds: float) -> bool:
        """Until so much time is over, or it is in the phase. False if the run has ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and (phase or time.monotonic() < end):
            if phase and self.phase == phase:
                return True
            time.sleep(0.003)
        return self.process.poll() is None

    def kill_one(self, generator: random.Random) -> tuple[str, str] | None:
        """(victim, phase), or None if nothing was left to kill. Of the launcher, which may be two processes, and its
        ranks one gets it, or, one time in five, all of them, as when a machine loses its power."""
        victims = [process for process in self.processes() if "main.py" in " ".join(process.cmdline())]
        if not victims or self.process.poll() is not None:
            return None
        phase, everyone = self.phase, generator.random() < 0.2
        chosen = victims if everyone else [generator.choice(victims)]
        command = " ".join(chosen[0].cmdline())
        names = ("launcher.launch", "bin/deepspeed", "bin/torchrun")
        for victim in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        return "all" if everyone else next((name for name in names if name in command), "rank"), phase

    def wait_for_all(self, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > end:
                raise SystemExit(f"left over after {seconds} s: {[' '.join(p.cmdline()) for p in left]}")
            time.sleep(0.2)
        self.process.wait()


def weights(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*.safetensors") if "checkpoints" not in file.parts)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def losses(folder: Path) -> list:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        [row["step"]] + [row.get(f"train/{name}") for name in ("loss", "critic_loss", "score", "kl", "actor_loss")]
        for row in rows
    ]


def differ(plain: list, other: list) -> bool:
    """Whether losses are further apart than the order of sums explains."""
    if [row[0] for row in plain] != [row[0] for row in other]:
        return True
    # Not the last, actor_loss: with whitened advantages and a ratio of 1 it is 0 but for rounding.
    columns = list(zip(zip(*plain, strict=True), zip(*other, strict=True), strict=True))[:-1]
    return any(
        abs(a - b) > TOLERANCE * max(map(abs, filter(None, want)), default=1)
        for want, got in columns
        for a, b in zip(want, got, strict=True)
        if a is not None
    )


def undisturbed(args, step: int, output: Path) -> float:
    start, run = time.monotonic(), Run(args, step, output)
    if run.process.wait() != 0:
        raise SystemExit(run.log.read_text())
    return time.monotonic() - start


def assert_whole(folder: Path) -> None:
    """What calls itself a checkpoint or a row is one, whenever the run was killed."""
    for checkpoint in folder.glob("checkpoints/step-*"):
        if (checkpoint / STATE_FILE).exists():
            read_checkpoint(checkpoint)
    for file in folder.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            load_file(file)


def left_over(*folders: Path) -> list[Path]:
    """What a run hides while it writes, other than the lock of its checkpoints."""
    return [file for folder in folders for file in folder.rglob(".*") if file != folder / "checkpoints" / LOCK_FILE]


def soak(args, step: int, generator: random.Random) -> None:
    plain, killed = args.folder / f"step{step}", args.folder / f"step{step}_killed"
    seconds = undisturbed(args, step, plain)
    kills, ends, victims, phases, starts = 0, 0, Counter(), Counter(), 0
    while kills < args.kills or not ends:
        start, ranks = time.monotonic(), 1 + starts % 2 if args.change_ranks else args.ranks
        saving = ["--checkpoint_steps", args.checkpoint_steps] + ["--async_checkpoint"] * args.async_checkpoint
        run = Run(args, step, killed, *saving, *RESUME, ranks=ranks)
        starts += 1
        if kills < args.kills:
            phase, fresh = None, not run.data.exists()
            if generator.random() < 0.6:
                phase = generator.choice([p for p in PHASES[step] if fresh or p != PREPARING])
            # From the loading of packages on; a run that resumes is shorter than the whole one.
            if run.wait_for(phase, generator.uniform(0.3, 1.0) * seconds):
                time.sleep(generator.uniform(0, PHASES[step].get(phase, 0)))
                if found := run.kill_one(generator):
                    kills += 1
                    victims[found[0]] += 1
                    phases[found[1]] += 1
                    run.wait_for_all()
                    assert_whole(killed)
                    continue
        run.process.wait()
        if run.process.returncode != 0:
            raise SystemExit(f"a start after {kills} kills failed:\n{run.log.read_text()[-3000:]}")
        run.wait_for_all()
        same = not differ(losses(plain), losses(killed)) if args.change_ranks else losses(killed) == losses(plain)
        if not same or (not args.change_ranks and weights(killed) != weights(plain)):
            raise SystemExit(f"after {kills} kills the model is another one: {killed}, {plain}")
        if litter := left_over(killed, run.data):
            raise SystemExit(f"after {kills} kills and an end this is left over: {litter}")
        ends += 1
        seconds = min(seconds, time.monotonic() - start)  # the undisturbed run may have built operators, or waited
        print(f"step {step}: {kills} kills so far, the model of end {ends} equals the undisturbed one", flush=True)
        if kills < args.kills:
            shutil.rmtree(killed)
            shutil.rmtree(run.data)
    print(
        f"step {step}: survived {kills} of {kills} kills, {ends} times to the end; undisturbed it takes "
        f"{seconds:.0f} s\n    killed: {dict(victims)}\n    while: {dict(phases)}",
        flush=True,
    )


def main() -> None:
    args = parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    args.folder = args.folder.resolve()
    create_demo_model(args.folder / "base", seed=7)
    if 3 in args.steps:
        undisturbed(args, 2, args.folder / "reward")
    generator = random.Random(args.seed)
    for step in args.steps:
        soak(args, step, generator)


if __name__ == "__main__":
    main()
