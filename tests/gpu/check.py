"""The stages of ``bash tests/gpu/run.sh``: commands with a time limit, a log and figures each; one table at the end.

This process starts programs and reads what they leave behind. It imports neither torch nor anything of the project, so
that it holds no memory of a GPU and outlives whatever goes wrong in a stage.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
MEASURE = [sys.executable, str(PROJECT / "tests/gpu/measure.py")]
STEPS = {
    1: "training/step1_supervised_finetuning/main.py",
    2: "training/step2_reward_model_finetuning/main.py",
    "dpo": "training/step2_dpo_finetuning/main.py",
    3: "training/step3_rlhf_finetuning/main.py",
}
LEAST_SECONDS = 15  # a stage is not begun with less
FIRST_PORT = 29611  # each run of a launcher meets at a port of its own, since stages run side by side

Figures = dict[str, float | int | str]


@dataclass(frozen=True)
class Stage:
    """Commands that run one after another until one fails.

    Args:
        seconds: limit of all commands together.
        figures: called as (the stage's log) -> what its row of the table says.
        missing: why this machine cannot run it; "" if it can.
        error: a regular expression: the last command is to fail with a line ``error: ...`` that it matches.
        alone: it measures time, so that nothing runs beside it.
    """

    name: str
    seconds: int
    commands: list[list]
    figures: Callable[[str], Figures] = lambda log: {}
    missing: str = ""
    error: str = ""
    alone: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    name: str
    outcome: str  # ok, failed, timed out, skipped
    seconds: float = 0.0
    limit: int = 0
    figures: Figures = field(default_factory=dict)
    note: str = ""


# ---------------------------------------------------------------- running


class Runner:
    """Runs stages within a time for all of them, and keeps the results, in the order of the stages.

    Args:
        work: folder of the logs, and of a folder for each stage that writes, made anew.
        seconds: for all stages. only: regular expression of names.
    """

    def __init__(self, work: Path, seconds: float, only: str = ".*"):
        self.work, self.logs = work, work / "logs"
        self.end, self.only = time.monotonic() + seconds, re.compile(only)
        self.results: list[Result] = []
        self.logs.mkdir(parents=True, exist_ok=True)

    def run(self, stages: list[Stage], together: int = 1) -> None:
        """All stages whose name was asked for; up to ``together`` side by side where they measure no time."""
        stages = [stage for stage in stages if self.only.fullmatch(stage.name)]
        results: dict[str, Result] = {}
        if together > 1:
            beside = [stage for stage in stages if not stage.alone]
            with ThreadPoolExecutor(together) as pool:
                results = {result.name: result for result in pool.map(self._run, beside)}
        self.results += [results.get(stage.name) or self._run(stage) for stage in stages]

    def _run(self, stage: Stage) -> Result:
        left = self.end - time.monotonic()
        if stage.missing:
            result = Result(stage.name, "skipped", note=stage.missing)
        elif left < LEAST_SECONDS:
            result = Result(stage.name, "skipped", note=f"{max(left, 0):.0f} s of LIMIT were left")
        else:
            result = self._run_commands(stage, min(stage.seconds, left))
        print(line_of(result), flush=True)
        return result

    def _run_commands(self, stage: Stage, seconds: float) -> Result:
        path, start = self.logs / f"{stage.name}.log", time.monotonic()
        outcome = "ok"
        shutil.rmtree(self.work / stage.name, ignore_errors=True)  # of an earlier check: no run writes over it
        with path.open("w") as log:
            for number, command in enumerate(stage.commands, 1):
                command = [str(word) for word in command]
                print("$", shlex.join(command), file=log, flush=True)
                code = run_command(command, log, start + seconds - time.monotonic(), stage.environment)
                if code is None:
                    outcome = "timed out"
                elif (code != 0) != bool(stage.error and number == len(stage.commands)):
                    outcome = "failed"
                if outcome != "ok":
                    break
        text, figures, note = path.read_text(errors="replace"), {}, ""
        if outcome == "ok" and stage.error:
            said = re.search(r"^error: .*", text, re.MULTILINE)
            note = said[0] if said else ""
            outcome = "ok" if re.search(stage.error, note) else "failed"
        if outcome == "ok":
            try:
                figures = stage.figures(text)
            except Exception as error:  # figures that are not there are a failure of the stage, not of the check
                outcome, note = "failed", f"no figures: {error!r}"
        if outcome != "ok":
            note = note or last_words(text)
        return Result(stage.name, outcome, round(time.monotonic() - start, 1), stage.seconds, figures, note)


def run_command(command: list[str], log, seconds: float, environment: dict[str, str]) -> int | None:
    """The exit code of a program whose output goes to ``log``; None if it took too long. All its processes end."""
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=PROJECT,
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        return process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def last_words(log: str) -> str:
    """The line that most likely says why a stage failed: our last error, or the last of anyone, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("$")]
    ours = [line for line in lines if line.startswith("error: ")]  # launchers raise one of their own behind it
    errors = ours or [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


# ---------------------------------------------------------------- the table


def text_of(figures: Figures) -> str:
    def short(value) -> str:
        if isinstance(value, str):
            return value
        return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"

    return ", ".join(f"{name} {short(value)}" for name, value in figures.items())


def line_of(result: Result) -> str:
    what = "; ".join(part for part in (text_of(result.figures), result.note) if part)
    return f"{result.outcome:9} {result.name:26} {result.seconds:6.1f} s  {what}"


def write_tables(results: list[Result], out: Path, title: str) -> str:
    """results.md and results.json in ``out``; returns the Markdown."""
    rows = ["| stage | outcome | seconds | limit | figures |", "|---|---|---|---|---|"]
    for result in results:
        what = "; ".join(part for part in (text_of(result.figures), result.note) if part).replace("|", "\\|")
        rows.append(f"| {result.name} | {result.outcome} | {result.seconds:.0f} | {result.limit} | {what} |")
    text = f"# {title}\n\n" + "\n".join(rows) + "\n"
    (out / "results.md").write_text(text)
    document = {"title": title, "stages": [vars(result) for result in results]}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    return text


# ---------------------------------------------------------------- figures


def measured(log: str) -> Figures:
    """What measure.py wrote: the last line ``figures {...}`` of a log."""
    return json.loads(re.findall(r"^figures (\{.*\})$", log, re.MULTILINE)[-1])


def training_rows(folder: Path) -> list[dict]:
    """The rows of training in a run's metrics.jsonl, names without ``train/``."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name.removeprefix("train/"): value for name, value in row.items()}
        for row in rows
        if any(name.startswith("train/") for name in row)
    ]


REPORTED = {  # name in metrics.jsonl -> name in the table
    "tokens_per_second": "tokens/s",
    "samples_per_second": "samples/s",
    "seconds": "s/step",
    "generate_seconds": "s generating",
    "training_seconds": "s training",
    "token_latency_ms": "ms/token",
    "mfu": "MFU",
    "training_mfu": "MFU training",
}


def figures_of_run(folder: Path, warmup: int = 1) -> Figures:
    """Medians over a run's steps after the first ones, its last loss and its highest memory."""
    rows = training_rows(folder)
    later = rows[warmup:] or rows
    figures: Figures = {"steps": len(rows)}
    for name, title in REPORTED.items():
        values = [row[name] for row in later if row.get(name) is not None]
        if values:
            figures[title] = float(f"{statistics.median(values):.4g}")
    figures["GiB"] = max(row["memory_gib"] for row in rows if "memory_gib" in row)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def estimate_in(log: str) -> Figures:
    """What a dry run expects at most, less what is there before any model, which no run's own figure counts."""
    peak = re.search(r"([\d.]+) (?:of [\d.]+ GiB on the device|GiB per rank at most)", log)
    before = re.search(r"before any model +([\d.]+)", log)
    on_device = "GiB on the device" in log
    return {"estimated GiB": round(float(peak[1]) - float(before[1]) * on_device, 2)}


def largest_difference(one: Path, other: Path) -> tuple[int, float]:
    """(steps that both runs have, the largest difference of their losses)."""
    one_loss, other_loss = ({row["step"]: row["loss"] for row in training_rows(folder)} for folder in (one, other))
    both = one_loss.keys() & other_loss.keys()
    return len(both), max((abs(one_loss[step] - other_loss[step]) for step in both), default=float("inf"))


# ---------------------------------------------------------------- what both parts share


@dataclass(frozen=True)
class Kit:
    """What the stages are made of: folders, sizes, and what the machine has.

    Args:
        machine: figures of ``measure.py versions``.
    """

    work: Path
    tiny: bool
    machine: Figures

    @property
    def gpus(self) -> int:
        return int(self.machine.get("GPUs", 0))

    def lacks(self, package: str) -> str:
        return "" if package in self.machine else f"{package} is not installed"

    def launcher(self, name: str, number: int) -> list:
        """The words that start a script under a launcher, on all GPUs of the machine but for plain python."""
        port = FIRST_PORT + number
        ranks = max(1, self.gpus)
        return {
            "python": [sys.executable],
            "torchrun": ["torchrun", f"--nproc_per_node={ranks}", f"--master_port={port}"],
            "deepspeed": ["deepspeed", "--num_gpus", ranks, "--master_port", port],
        }[name]

    def three_steps(self, name: str, launcher: list, supervised: str, rlhf: str) -> list[list]:
        """Commands of the three steps in a few updates each, on the quickstart's data and model.

        Args:
            supervised, rlhf: flags of steps 1 and 2, and of step 3.
        """
        out, rows = self.work / name, 32 if self.tiny else 160
        data = words(f"--data_path local/demo --data_split 4,3,3 --data_output_path {self.work / 'data'} --seed 1")
        short = words("--max_seq_len 48 --max_eval_samples 16 --per_device_train_batch_size 8 --num_train_epochs 1")
        one = [*launcher, STEPS[1], "--model_name_or_path", self.work / "demo", "--output_dir", out / "1"]
        two = [*launcher, STEPS[2], "--model_name_or_path", out / "1", "--output_dir", out / "2"]
        three = [*launcher, STEPS[3], "--actor_model_name_or_path", out / "1", "--output_dir", out / "3"]
        three += ["--critic_model_name_or_path", out / "2"]
        three += words("--max_prompt_seq_len 24 --max_answer_seq_len 16 --per_device_generation_batch_size 8")
        three += words("--per_device_training_batch_size 4 --num_warmup_steps 0")
        sample = ["--max_train_samples", rows]
        return [
            [*one, *data, *short, *sample, *words(supervised)],
            [*two, *data, *short, *sample, *words(supervised)],
            [*three, *data, *sample, *words(rlhf)],
        ]


def words(text: str) -> list[str]:
    return shlex.split(text)


# ---------------------------------------------------------------- smoke: does it work


def smoke_stages(kit: Kit) -> list[Stage]:
    hybrid = "--enable_hybrid_engine"
    stage_2, stage_3 = (f"--actor_zero_stage {n} --critic_zero_stage {n}" for n in (2, 3))
    rlhf_checkpointing = "--actor_gradient_checkpointing --critic_gradient_checkpointing"
    half = "fp16" if kit.gpus else "fp32"  # DeepSpeed has no fp16 on CPUs
    scaled = "--align_overflow" if kit.gpus else ""
    made: list[Stage] = []

    def three(name: str, launcher: str, supervised: str, rlhf: str, seconds: int = 240, missing: str = "") -> None:
        commands = kit.three_steps(name, kit.launcher(launcher, len(made)), supervised, rlhf)
        made.append(
            Stage(name, seconds, commands, lambda _: figures_of_run(kit.work / name / "3"), missing=missing),
        )

    three("bf16_z0_python", "python", "--dtype bf16", f"--dtype bf16 {hybrid} --enable_ema")
    three(
        "bf16_z2_torchrun",
        "torchrun",
        "--dtype bf16 --zero_stage 2 --gradient_checkpointing",
        f"--dtype bf16 {stage_2} {hybrid} {rlhf_checkpointing}",
    )
    three(
        "bf16_z3_deepspeed",
        "deepspeed",
        "--dtype bf16 --zero_stage 3",
        f"--dtype bf16 {stage_3} {hybrid} --enable_ema",
    )
    three(
        "offload",  # the first run also compiles DeepSpeed's cpu_adam
        "python",
        "--dtype bf16 --zero_stage 2 --offload",
        f"--dtype bf16 {stage_3} --offload --offload_reference_model --offload_reward_model {hybrid} "
        "--unpin_actor_parameters",
        seconds=360,
    )
    three(
        f"{half}_lora",
        "python",
        f"--dtype {half} --zero_stage 2 --lora_dim 8 --only_optimize_lora",
        f"--dtype {half} {stage_2} {scaled} --actor_lora_dim 8 --only_optimize_lora {hybrid}",
    )
    three(
        "flash_attention",
        "python",
        "--dtype bf16 --attn_implementation flash_attention_2",
        f"--dtype bf16 --attn_implementation flash_attention_2 {hybrid}",
        missing=kit.lacks("flash_attn"),
    )
    one, two, _ = kit.three_steps("dpo", kit.launcher("torchrun", len(made)), *2 * ["--dtype bf16 --zero_stage 2"])
    two = [STEPS["dpo"] if word == STEPS[2] else word for word in two]
    made.append(Stage("dpo", 180, [one, two], lambda _: figures_of_run(kit.work / "dpo/2")))
    qlora = "--dtype bf16 --quantize nf4 --lora_dim 8 --only_optimize_lora"
    first = kit.three_steps("qlora", kit.launcher("python", 0), qlora, "")[0]
    made.append(
        Stage("qlora", 150, [first], lambda _: figures_of_run(kit.work / "qlora/1"), missing=kit.lacks("bitsandbytes"))
    )
    return [
        Stage("demo_model", 90, [[sys.executable, "-m", "utils.demo.tiny_model", "--output", kit.work / "demo"]]),
        *made,
        resume_stage(kit),
        quickstart_stage(kit),
        too_many_ranks_stage(kit),
    ]


def resume_stage(kit: Kit) -> Stage:
    """A run of 8 steps; the same again, for what the device itself varies; once more from its fourth step on."""
    folder = kit.work / "resume"
    base = kit.three_steps("resume", kit.launcher("python", 0), "--dtype bf16 --zero_stage 2 --dropout 0.1", "")[0]
    base += ["--max_train_samples", 64]

    def run(name: str, *more) -> list:
        return [*base, "--output_dir", folder / name, *more]

    def compare(log: str) -> Figures:
        repeated = largest_difference(folder / "plain", folder / "again")
        resumed = largest_difference(folder / "plain", folder / "resumed")
        allowed = 2 * repeated[1] + (0.01 if kit.gpus else 0)
        if resumed[0] < 4 or resumed[1] > allowed:
            raise ValueError(f"{resumed[0]} steps of the resumed run, losses differ by {resumed[1]}, not {allowed}")
        return {"steps": resumed[0], "plain runs differ by": repeated[1], "the resumed one by": resumed[1]}

    checkpoints = folder / "checkpoints"
    commands = [
        run("plain", "--checkpoint_steps", 4, "--keep_checkpoints", 9, "--checkpoint_dir", checkpoints),
        run("again"),
        run("resumed", "--resume", checkpoints / "step-00000004"),
    ]
    return Stage("resume", 240, commands, compare)


def quickstart_stage(kit: Kit) -> Stage:
    """The quickstart with fewer rows, so that its judge still sees some learning."""
    rows = ("64", "32", "128", "1") if kit.tiny else ("4000", "2000", "640", "4")
    environment = dict(zip(("SFT_ROWS", "PAIRS", "PROMPTS", "ANSWERS"), rows, strict=True))
    environment |= {"RANKS": "1", "MASTER_PORT": str(FIRST_PORT + 50)}
    folder = kit.work / "quickstart"

    def right(log: str) -> Figures:
        models = json.loads((folder / "summary.json").read_text())["models"]
        return {f"{name} right": round(model["right"], 3) for name, model in models.items()}

    script = ["bash", "training_scripts/quickstart.sh", folder]
    return Stage("quickstart", 600, [script], right, environment=environment)


def too_many_ranks_stage(kit: Kit) -> Stage:
    """More ranks than GPUs: refused in a line that can be read."""
    launcher = ["torchrun", f"--nproc_per_node={kit.gpus + 1}", f"--master_port={FIRST_PORT + 51}"]
    command = kit.three_steps("too_many", launcher, "", "")[0]
    missing = "" if kit.gpus else "on a CPU any number of ranks will do"
    return Stage("too_many_ranks", 90, [command], missing=missing, error="ranks on .* torch sees")


# ---------------------------------------------------------------- bench: how fast is it


def bench_stages(kit: Kit) -> list[Stage]:
    size = dict(length=64, half=16, rows=2, batch=8, micro=4) if kit.tiny else {}
    size = dict(length=2048, half=256, rows=8, batch=32, micro=8) | size
    sft = bench_sft(kit, size)
    ppo = bench_ppo(kit, size)
    checkpointing = "--gradient_checkpointing"
    both = "--actor_gradient_checkpointing --critic_gradient_checkpointing"
    hybrid = "--enable_hybrid_engine"
    qlora = f"{checkpointing} --quantize nf4 --lora_dim 16 --only_optimize_lora"
    stages = [Stage("bench_models", 120, [[*MEASURE, "models"]], measured)]
    stages += [
        sft("sft_checkpointing", f"--zero_stage 2 {checkpointing}"),
        sft("sft_plain", f"--zero_stage 2 --per_device_train_batch_size {size['rows'] // 2}"),
        sft("sft_qlora", qlora, kit.lacks("bitsandbytes")),
        ppo("ppo_z0_hybrid", f"{hybrid} {both}"),
        ppo("ppo_z0", both),
    ]
    for zero in (2, 3):
        of_stage = f"--actor_zero_stage {zero} --critic_zero_stage {zero} {both}"
        stages += [ppo(f"ppo_z{zero}_hybrid", f"{hybrid} {of_stage}"), ppo(f"ppo_z{zero}", of_stage)]
    stages.append(ppo("ppo_z0_compiled", f"{hybrid} --compile_generation {both}", seconds=240))
    vllm = f"{hybrid} --hybrid_engine_backend vllm {both}"
    stages.append(ppo("ppo_z0_vllm", vllm, seconds=300, missing=kit.lacks("vllm")))
    for way in ("generate", "own", "compiled"):
        stages.append(
            Stage(f"decode_{way}", 300 if way == "compiled" else 150, [[*MEASURE, "decode", way]], measured, alone=True)
        )
    stages.append(Stage("scoring", 90, [[*MEASURE, "scoring"]], measured, alone=True))
    return stages


def _with_estimate(kit: Kit, name: str, command: list, seconds: int, missing: str = "") -> Stage:
    """A dry run of a command, then the command itself; its weights are not kept."""
    out = kit.work / name

    def figures(log: str) -> Figures:
        for file in out.glob("**/*.safetensors"):
            file.unlink()
        return figures_of_run(out, warmup=2) | estimate_in(log)

    commands = [[*command, "--dry_run"], [*command, "--output_dir", out]]
    return Stage(name, seconds, commands, figures, missing, alone=True)


def bench_sft(kit: Kit, size: dict) -> Callable[..., Stage]:
    """Stages of step 1: rows of exactly ``length`` tokens."""

    def stage(name: str, flags: str, missing: str = "") -> Stage:
        launcher = kit.launcher("python" if kit.gpus < 2 else "deepspeed", 40)
        command = [*launcher, STEPS[1], "--model_name_or_path", kit.work / "actor", "--data_path", kit.work / "sft"]
        command += [
            "--data_output_path",
            kit.work / "data",
            "--max_train_samples",
            12 * size["rows"] * max(1, kit.gpus),
        ]
        command += words(
            f"--data_split 10,0,0 --max_seq_len {size['length']} --max_eval_samples 2 --num_train_epochs 1 "
            f"--per_device_train_batch_size {size['rows']} --per_device_eval_batch_size 2 --num_warmup_steps 1 "
            f"--learning_rate 1e-5 --dtype bf16 --log_interval 1 --no-group_by_length {flags}"
        )
        return _with_estimate(kit, name, command, 180, missing)

    return stage


def bench_ppo(kit: Kit, size: dict) -> Callable[..., Stage]:
    """Stages of step 3: prompts and answers of up to ``half`` tokens."""

    def stage(name: str, flags: str, seconds: int = 180, missing: str = "") -> Stage:
        launcher = kit.launcher("python" if kit.gpus < 2 else "deepspeed", 41)
        command = [*launcher, STEPS[3], "--actor_model_name_or_path", kit.work / "actor"]
        command += ["--critic_model_name_or_path", kit.work / "critic", "--data_path", kit.work / "ppo"]
        command += [
            "--data_output_path",
            kit.work / "data",
            "--max_train_samples",
            5 * size["batch"] * max(1, kit.gpus),
        ]
        command += words(
            f"--data_split 0,0,10 --max_prompt_seq_len {size['half']} --max_answer_seq_len {size['half']} "
            f"--per_device_generation_batch_size {size['batch']} --per_device_training_batch_size {size['micro']} "
            "--dtype bf16 --actor_learning_rate 1e-6 --critic_learning_rate 1e-6 --num_warmup_steps 1 "
            f"--enable_test_mode --test_stop_step 4 {flags}"
        )
        return _with_estimate(kit, name, command, seconds, missing)

    return stage


# ---------------------------------------------------------------- all of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="tests/gpu/run.sh")
    parser.add_argument("part", nargs="?", choices=["smoke", "bench", "all"], default="all", help="which stages")
    part = parser.parse_args().part
    tiny = os.environ.get("TINY") == "1"
    out = Path(os.environ.get("OUT") or PROJECT / "output/gpu_check").resolve()
    work = Path(os.environ.get("WORK") or out / "work").resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "WORK": str(work),
        "PYTHONPATH": str(PROJECT),
    }
    runner = Runner(work, float(os.environ.get("LIMIT") or 3600), os.environ.get("ONLY") or ".*")
    asked, runner.only = runner.only, re.compile("versions")
    runner.run([Stage("versions", 90, [[*MEASURE, "versions"]], measured)])
    runner.only = asked
    machine = runner.results[0].figures
    if not machine or (not tiny and not machine["GPUs"]):
        print("error: torch finds no GPU here. TINY=1 tries the check itself on a CPU", file=sys.stderr)
        return 1
    kit = Kit(work, tiny, machine)
    cores = len(os.sched_getaffinity(0))
    together = int(os.environ.get("TOGETHER") or (max(1, min(6, cores // 3)) if kit.gpus else 1))
    runner.run([Stage("ceilings", 90, [[*MEASURE, "ceilings"]], measured, alone=True)])
    if part != "bench":
        demo, *others = smoke_stages(kit)
        runner.run([demo])
        runner.run(others, together)
    if part != "smoke":
        runner.run(bench_stages(kit))
    print()
    print(write_tables(runner.results, out, f"GPU check ({part}): {machine['device']}" + ", toy sizes" * tiny))
    print(f"results: {out}/results.md and results.json; logs: {runner.logs}")
    return int(any(result.outcome in ("failed", "timed out") for result in runner.results))


if __name__ == "__main__":
    sys.exit(main())
