"""Which settings of a step fit a machine: estimated from a model's configuration, without its weights or a GPU.

    python -m utils.plan --model Qwen/Qwen3-8B --gpus 8 --gpu_memory 80
    python -m utils.plan --model output/sft --critic output/reward --step 3 --gpus 4 --gpu_memory 40 --host_memory 500

Prints the combinations of ZeRO stage, offload and checkpointing with the largest micro-batch that fits each, marks the
one to take, and its command. Any other flag of the step may follow and becomes part of the command.
"""

import argparse
import contextlib
import io
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from utils import arguments
from utils.arguments.kinds import new_parser
from utils.model.loading import load_config
from utils.model.tokenizer import load_hf_tokenizer
from utils.planning.engine_memory import CUDA_BASELINE, CUDA_HOST_BASELINE, GIB, Bytes, Machine
from utils.planning.estimate import Estimate, engines_of_step, estimate, models_of_step, states_alone
from utils.precision import default_dtype
from utils.process.errors import UserError

# Settings that change the models themselves, not only how they are trained.
OF_MODELS = {"dtype", "lora_dim", "actor_lora_dim", "critic_lora_dim", "only_optimize_lora"}

Settings = dict[str, object]  # flag -> value


def as_flags(settings: Settings) -> list[str]:
    """The words of a command line: {"offload": True, "zero_stage": 3} -> --offload --zero_stage 3."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@dataclass
class Plan:
    """A step and a machine, to try settings on.

    Args:
        args: the step's arguments, settled. configs: as ``models_of_step`` takes them.
    """

    args: argparse.Namespace
    step: int
    configs: dict
    tokenizer: object
    machine: Machine
    _models: dict = field(default_factory=dict)  # settings of OF_MODELS -> models
    notes: dict[str, None] = field(default_factory=dict)  # what LoRA leaves out of the models that were tried, in order

    def estimate_with(self, settings: Settings) -> Estimate | None:
        """The estimate with other settings (of the states alone, if they do not fit); None for a combination that the
        step refuses."""
        args = argparse.Namespace(**vars(self.args) | settings)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                arguments.check_step(args, self.step)
                key = frozenset((name, value) for name, value in settings.items() if name in OF_MODELS)
                if key not in self._models:
                    self._models[key] = models_of_step(args, self.step, self.configs, self.tokenizer)
        except UserError:
            return None
        models = self._models[key]
        self.notes |= {f"{name}: {model.left_out}": None for name, model in models.items() if model.left_out}
        alone = states_alone(engines_of_step(args, self.step, models, self.machine), self.machine)
        return estimate(args, self.step, models, self.machine) if alone.fits else alone


def _batches(args, step: int) -> Iterator[Settings]:
    """Ever smaller micro-batches with the same rows per optimizer step."""
    if step < 3:
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        while micro % 2 == 0:
            micro, accumulation = micro // 2, 2 * accumulation
            yield {
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": accumulation,
                "per_device_eval_batch_size": min(args.per_device_eval_batch_size, 2 * micro),
            }
        return
    generated, rounds = args.per_device_generation_batch_size, args.generation_batches
    micro, accumulation = args.per_device_training_batch_size, args.gradient_accumulation_steps
    while generated % 2 == 0 and micro % 2 == 0 and generated > args.num_generations_per_prompt:
        generated, rounds, micro, accumulation = generated // 2, 2 * rounds, micro // 2, 2 * accumulation
        yield {
            "per_device_generation_batch_size": generated,
            "generation_batches": rounds,
            "per_device_training_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
        }


def _prefixes(args, step: int) -> tuple[str, ...]:
    """What the flags of the models that train begin with."""
    if step < 3:
        return ("",)
    return ("actor_", "critic_") if args.advantage_estimator == "gae" else ("actor_",)


def smaller_settings(args, step: int, machine: Machine) -> list[list[Settings]]:
    """What makes a run smaller: groups of settings of growing effect, what costs the run least first."""
    prefixes = _prefixes(args, step)
    stages = [getattr(args, f"{prefix}zero_stage") for prefix in prefixes]
    trains_lora = getattr(args, f"{prefixes[0]}lora_dim") > 0 or (step == 1 and args.soft_prompt is not None)
    groups = []
    if args.dtype == "fp32" and default_dtype().dtype == "bf16":
        groups.append([{"dtype": "bf16"}])
    groups.append([{f"{prefix}gradient_checkpointing": True for prefix in prefixes}])
    if machine.ranks > 1:
        groups.append(
            [{f"{prefix}zero_stage": stage for prefix in prefixes} for stage in (2, 3) if stage > min(stages)]
        )
    groups.append(list(_batches(args, step)))
    if not machine.on_cpu:
        if step == 3:
            groups.append([{"offload_reference_model": True, "offload_reward_model": True}])
        managed = {f"{prefix}zero_stage": max(stage, 1) for prefix, stage in zip(prefixes, stages, strict=True)}
        groups.append([{"offload": True} | managed])
    if not trains_lora:
        groups.append([{f"{prefix}lora_dim": 16 for prefix in prefixes} | {"only_optimize_lora": True}])
    length = "max_seq_len" if step < 3 else "max_answer_seq_len"
    groups.append([{length: getattr(args, length) // 2}, {length: getattr(args, length) // 4}])
    return groups


def suggest(plan: Plan) -> tuple[str, Estimate] | None:
    """(flags, the estimate with them): what to change so that a run fits; None if nothing does.

    Group by group until it fits, then back again where it fits without.
    """
    groups = smaller_settings(plan.args, plan.step, plan.machine)
    levels = [0] * len(groups)

    def settings() -> Settings:
        chosen: Settings = {}
        for group, level in zip(groups, levels, strict=True):
            if level:
                # Two groups may set a stage; the higher one holds.
                for name, value in group[level - 1].items():
                    chosen[name] = max(value, chosen.get(name, value)) if name.endswith("zero_stage") else value
        return chosen

    def fitting() -> Estimate | None:
        result = plan.estimate_with(settings())
        return result if result is not None and result.fits else None

    steps = ((index, level) for index, group in enumerate(groups) for level in range(1, len(group) + 1))
    for index, level in steps:
        levels[index] = level
        if result := fitting():
            break
    else:
        return None
    for index, level in enumerate(list(levels)):
        for fewer in range(level):
            levels[index] = fewer
            if smaller := fitting():
                result = smaller
                break
            levels[index] = level
    changed = {name: value for name, value in settings().items() if getattr(plan.args, name) != value}
    return " ".join(as_flags(changed)), result


# ---------------------------------------------------------------- the command: python -m utils.plan


@dataclass
class Candidate:
    """One way to train: its settings as flags, and what they say whatever the step calls its flags."""

    stage: int
    offload: bool
    checkpointing: bool
    micro: int  # rows of a micro-batch
    accumulation: int  # micro-batches per optimizer step
    settings: Settings
    result: Estimate
    recommended: bool = False


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Which ZeRO stage, offload and batch sizes of a step fit a machine.")
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name; its configuration is read, its weights are not")
    add("--critic", default=None, help="step 3: the reward model; None for one of the model's size")
    add("--step", type=int, choices=[1, 2, 3], default=1, help="the step to plan")
    add("--gpus", type=int, default=1, help="devices in all")
    add("--gpus_per_node", type=int, default=8, help="devices of one machine, which share its host memory")
    add("--gpu_memory", type=float, default=80, help="GiB of one device")
    add("--host_memory", type=float, default=None, help="GiB of one machine's host memory; None: not looked at")
    add("--batch_size", type=int, default=64, help="rows (pairs, answers) per optimizer step, of all devices")
    add("--max_seq_len", type=int, default=512, help="tokens of a row; step 3: half of it prompt, half answer")
    add("--lora_dim", type=int, default=0, help="rank of LoRA, with everything else frozen; 0 for full training")
    add("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="training precision")
    add("--json", action="store_true", help="print the candidates as JSON")
    return parser


def base_command(options, rest: list[str]) -> list[str]:
    """The step's flags that hold for all candidates."""
    words = ["--dtype", options.dtype, "--output_dir", f"output/step{options.step}"]
    if options.step < 3:
        words += ["--model_name_or_path", options.model, "--max_seq_len", str(options.max_seq_len)]
        words += ["--lora_dim", str(options.lora_dim)] if options.lora_dim else []
    else:
        words += ["--actor_model_name_or_path", options.model]
        words += ["--critic_model_name_or_path", options.critic or options.model, "--enable_hybrid_engine"]
        half = options.max_seq_len // 2
        words += ["--max_prompt_seq_len", str(options.max_seq_len - half), "--max_answer_seq_len", str(half)]
        for role in ("actor", "critic") if options.lora_dim else ():
            words += [f"--{role}_lora_dim", str(options.lora_dim)]
    return words + (["--only_optimize_lora"] if options.lora_dim else []) + rest


def _settings(args, step: int, stage: int, offload: bool, checkpointing: bool, micro: int, rounds: int) -> Settings:
    prefixes = _prefixes(args, step)
    settings: Settings = {f"{prefix}zero_stage": stage for prefix in prefixes}
    if checkpointing:
        settings |= {f"{prefix}gradient_checkpointing": True for prefix in prefixes}
    if offload:
        settings["offload"] = True
    if step < 3:
        settings |= {"per_device_train_batch_size": micro, "per_device_eval_batch_size": micro}
    else:
        settings |= {"per_device_generation_batch_size": micro, "generation_batches": rounds}
        settings["per_device_training_batch_size"] = micro
    return settings | {"gradient_accumulation_steps": rounds}


def candidates(plan: Plan, per_device: int) -> list[Candidate]:
    """Each way of sharding, offloading and checkpointing with the largest micro-batch that fits, or with one row."""
    ranks, found = plan.machine.ranks, []
    for offload in (False, True):
        for stage in (1, 2, 3) if ranks > 1 else (1, 3) if offload else (1,):
            for checkpointing in (False, True):
                best = None
                for micro in (2**i for i in range(11) if 2**i <= per_device and per_device % 2**i == 0):
                    way = stage, offload, checkpointing, micro, per_device // micro
                    settings = _settings(plan.args, plan.step, *way)
                    result = plan.estimate_with(settings)
                    if result is None or (best is not None and not result.fits):
                        break
                    best = Candidate(*way, settings, result)
                    if not result.fits:
                        break
                found += [best] if best else []
    _recommend(found)
    return found


def _recommend(found: list[Candidate]) -> None:
    """The first that fits with 4 rows or more at a time (or the whole share), in the order of what the ways cost.

    Recomputing activations costs a third more, ZeRO-3 gathers weights for each pass, offloading waits for the host.
    """

    def cost(way: Candidate) -> tuple:
        too_few = way.micro < min(4, way.micro * way.accumulation)
        return too_few, way.offload, way.stage == 3, way.checkpointing, -way.stage, -way.micro

    fitting = [candidate for candidate in found if candidate.result.fits]
    if fitting:
        min(fitting, key=cost).recommended = True


def command_of(options, words: list[str], settings: Settings) -> str:
    """The command line that starts the step with these settings."""
    start = ["--num_gpus", str(options.gpus)] if options.gpus <= options.gpus_per_node else ["--hostfile", "HOSTFILE"]
    script = str(arguments.SCRIPTS[options.step].relative_to(arguments.PROJECT))
    return shlex.join(["deepspeed", *start, script, *words, *as_flags(settings)])


def main(given=None) -> int:
    options, rest = build_parser().parse_known_args(given)
    words = base_command(options, rest)
    args = arguments.build_parser(options.step).parse_args(words)
    actor = load_config(options.model, args.trust_remote_code)
    critic = actor if options.critic is None else load_config(options.critic, args.trust_remote_code)
    configs = {"model": actor} if options.step < 3 else {"actor": actor, "critic": critic}
    tokenizer = None
    if options.step == 1 and args.soft_prompt is not None:  # its vectors start from embeddings of tokens
        tokenizer = load_hf_tokenizer(options.model, trust_remote_code=args.trust_remote_code)
    per_node = min(options.gpus, options.gpus_per_node)
    machine = Machine(
        options.gpus,
        per_node,
        False,
        int(options.gpu_memory * GIB),
        None if options.host_memory is None else int(options.host_memory * GIB),
        Bytes(int(CUDA_BASELINE), int(CUDA_HOST_BASELINE)),
    )
    if options.batch_size % options.gpus:
        raise UserError(f"--batch_size {options.batch_size} rows do not divide into --gpus {options.gpus}")
    plan = Plan(args, options.step, configs, tokenizer, machine)
    found = candidates(plan, options.batch_size // options.gpus)
    for note in plan.notes:
        print(note, file=sys.stderr if options.json else None)
    rows = [
        {
            "settings": candidate.settings,
            "device_gib": round(candidate.result.device_peak[0] / GIB, 2),
            "host_gib": round(candidate.result.host_peak[0] / GIB, 2),
            "fits": candidate.result.fits,
            "recommended": candidate.recommended,
            "command": command_of(options, words, candidate.settings),
        }
        for candidate in found
    ]
    print(json.dumps(rows, indent=1) if options.json else table(options, found, rows))
    return 0 if any(row["recommended"] for row in rows) else 1


def table(options, found: list[Candidate], rows: list[dict]) -> str:
    host = "not looked at" if options.host_memory is None else f"{options.host_memory:g} GiB of host memory"
    lines = [
        f"step {options.step}, {options.model}: {options.gpus} devices of {options.gpu_memory:g} GiB, {host}",
        "",
        "   ZeRO  offload  checkpointing  micro-batch  accumulation  device GiB  host GiB per machine",
    ]
    for candidate, row in zip(found, rows, strict=True):
        mark = "->" if candidate.recommended else "  "
        note = "" if row["fits"] else "  too large"
        lines.append(
            f"{mark} {candidate.stage:4}  {'yes' if candidate.offload else 'no':>7}  "
            f"{'yes' if candidate.checkpointing else 'no':>13}  {candidate.micro:11}  {candidate.accumulation:12}  "
            f"{row['device_gib']:10.1f}  {row['host_gib']:8.1f}{note}"
        )
    best = next((row for row in rows if row["recommended"]), None)
    lines += ["", best["command"] if best else "nothing fits: a smaller model, more devices, LoRA or shorter rows"]
    return "\n".join(lines)
