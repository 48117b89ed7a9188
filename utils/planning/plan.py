"""Which settings of a step fit a machine, and how long they take: estimated from a model's configuration, without its
weights or a GPU.

    python -m utils.plan --model Qwen/Qwen3-8B --gpus 8 --gpu_memory 80
    python -m utils.plan --model Qwen/Qwen3-8B --step 3 --gpu H100 --gpus 8 64 256 --batch_size 1024 --time
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
from dataclasses import dataclass, field, replace

from utils import arguments
from utils.arguments.kinds import above_zero, new_parser, non_negative_float, positive
from utils.model.loading import load_config
from utils.model.tokenizer import load_hf_tokenizer
from utils.planning.engine_memory import CUDA_BASELINE, CUDA_HOST_BASELINE, GIB, Bytes, Machine
from utils.planning.estimate import Estimate, engines_of_step, estimate, models_of_step, states_alone
from utils.planning.estimate_time import time_of_step
from utils.planning.machines import CPU, Cluster, accelerator_named, cluster_of, efficiency_of, measure_cpu
from utils.planning.step_time import StepTime
from utils.planning.time_table import backend_lines, row_of, scaling_table, time_lines
from utils.precision import default_dtype
from utils.process.errors import UserError

# Settings that change the models themselves, not only how they are trained.
OF_MODELS = {
    *("dtype", "lora_dim", "actor_lora_dim", "critic_lora_dim", "only_optimize_lora", "precompute_ref_log_probs"),
}

Settings = dict[str, object]  # flag -> value

# Backends of generation that are planned side by side: what each needs of the other flags.
BACKENDS: dict[str, Settings] = {
    "own": {
        "enable_hybrid_engine": True,
        "hybrid_engine_backend": "own",
        "inference_tp_size": 1,
        "vllm_kv_cache_gib": None,
        "vllm_gpu_memory_utilization": None,
    },
    "vllm": {"enable_hybrid_engine": True, "hybrid_engine_backend": "vllm"},
}


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
        refusal: why the last combination was refused.
    """

    args: argparse.Namespace
    step: arguments.Step
    configs: dict
    tokenizer: object
    machine: Machine
    _models: dict = field(default_factory=dict)  # settings of OF_MODELS -> models
    notes: dict[str, None] = field(default_factory=dict)  # what LoRA leaves out of the models that were tried, in order
    refusal: UserError | None = None

    def estimate_with(self, settings: Settings) -> Estimate | None:
        """The estimate with other settings (of the states alone, if they do not fit); None for a combination that the
        step refuses."""
        try:
            args, models = self._with(settings)
            self.notes |= {f"{name}: {model.left_out}": None for name, model in models.items() if model.left_out}
            alone = states_alone(engines_of_step(args, self.step, models, self.machine), self.machine)
            return estimate(args, self.step, models, self.machine) if alone.fits else alone
        except UserError as error:
            self.refusal = error
            return None

    def _with(self, settings: Settings) -> tuple[argparse.Namespace, dict]:
        """The checked arguments and the models with other settings."""
        args = argparse.Namespace(**vars(self.args) | settings)
        with contextlib.redirect_stdout(io.StringIO()):
            arguments.check_step(args, self.step, self.machine.ranks)
            key = frozenset((name, value) for name, value in settings.items() if name in OF_MODELS)
            if key not in self._models:
                self._models[key] = models_of_step(args, self.step, self.configs, self.tokenizer)
        return args, self._models[key]

    def time_with(self, settings: Settings, cluster: Cluster) -> StepTime:
        """The time of an optimizer step with other settings, which the step does not refuse."""
        args, models = self._with(settings)
        return time_of_step(args, self.step, models, cluster)


def _batches(args, step: arguments.Step) -> Iterator[Settings]:
    """Ever smaller micro-batches with the same rows per optimizer step."""
    if step != 3:
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


def _prefixes(args, step: arguments.Step) -> tuple[str, ...]:
    """What the flags of the models that train begin with."""
    if step != 3:
        return ("",)
    return ("actor_", "critic_") if args.advantage_estimator == "gae" else ("actor_",)


def smaller_settings(args, step: arguments.Step, machine: Machine) -> list[list[Settings]]:
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
    if step == arguments.DPO and arguments.has_reference_engine(args) and not args.separate_ref:
        groups.append([{"precompute_ref_log_probs": True}])
    if not machine.on_cpu:
        if step == 3:
            groups.append([{"offload_reference_model": True, "offload_reward_model": True}])
        managed = {f"{prefix}zero_stage": max(stage, 1) for prefix, stage in zip(prefixes, stages, strict=True)}
        groups.append([{"offload": True} | managed])
    if not trains_lora:
        groups.append([{f"{prefix}lora_dim": 16 for prefix in prefixes} | {"only_optimize_lora": True}])
    length = "max_seq_len" if step != 3 else "max_answer_seq_len"
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
    time: StepTime | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Which ZeRO stage, offload and batch sizes of a step fit a machine.")
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name; its configuration is read, its weights are not")
    add("--critic", default=None, help="step 3: the reward model; None for one of the model's size")
    add("--step", type=arguments.step_of, choices=list(arguments.SCRIPTS), default=1, help="the step to plan")
    add("--gpus", type=positive, nargs="+", default=[1], help="devices in all; several numbers: one row for each")
    add("--gpus_per_node", type=positive, default=8, help="devices of one machine, which share its host memory")
    add("--gpu", default=None, help="the kind of device, as in H100, A100-40GB, cpu (this one, measured); for --time")
    add("--gpu_memory", type=above_zero, default=None, help="GiB of one device; None: that of --gpu, without it 80")
    add("--host_memory", type=above_zero, default=None, help="GiB of one machine's host memory; None: not looked at")
    add("--batch_size", type=positive, default=64, help="rows (pairs, answers) per optimizer step, of all devices")
    add("--max_seq_len", type=int, default=512, help="tokens of a row; step 3: half of it prompt, half answer")
    add("--lora_dim", type=int, default=0, help="rank of LoRA, with everything else frozen; 0 for full training")
    add("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="training precision")
    add = parser.add_argument_group("time and price (estimates)").add_argument
    add("--time", action="store_true", help="seconds of an optimizer step, by what they go to; needs --gpu")
    add("--rows", type=positive, default=None, help="rows to train on (step 3: answers), for hours; None: not known")
    add("--gpu_price", type=non_negative_float, default=None, help="of one device and hour; None: no prices")
    add(
        "--network",
        type=above_zero,
        default=None,
        help="GB/s of one machine to others; None: as usual in clouds",
    )
    add(
        "--efficiency",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what you measured, in place of what was fitted: compute, bandwidth, network (shares of the data "
        "sheet's), launch (seconds of a layer at least)",
    )
    add(
        "--objective",
        choices=["time", "price", "memory"],
        default=None,
        help="what is recommended: the fastest, the cheapest, or the least memory; None: what costs a run least by "
        "rule, with --time the fastest",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print the candidates as JSON")
    return parser


def base_command(options, rest: list[str]) -> list[str]:
    """The step's flags that hold for all candidates."""
    words = ["--dtype", options.dtype, "--output_dir", f"output/{arguments.NAMES[options.step]}"]
    if options.step != 3:
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


def _settings(
    args, step: arguments.Step, stage: int, offload: bool, checkpointing: bool, micro: int, rounds: int
) -> Settings:
    prefixes = _prefixes(args, step)
    settings: Settings = {f"{prefix}zero_stage": stage for prefix in prefixes}
    if checkpointing:
        settings |= {f"{prefix}gradient_checkpointing": True for prefix in prefixes}
    if offload:
        settings["offload"] = True
    if step != 3:
        settings |= {"per_device_train_batch_size": micro, "per_device_eval_batch_size": micro}
    else:
        settings |= {"per_device_generation_batch_size": micro, "generation_batches": rounds}
        settings["per_device_training_batch_size"] = micro
    return settings | {"gradient_accumulation_steps": rounds}


def candidates(
    plan: Plan, per_device: int, cluster: Cluster | None = None, objective: str | None = None
) -> list[Candidate]:
    """Each way of sharding, offloading and checkpointing with the largest micro-batch that fits, or with one row.

    Args:
        cluster: to tell the times of those that fit. objective: what is recommended, as the flag.
    """
    ranks, found = plan.machine.ranks, []
    for offload in (False, True):
        for stage in (1, 2, 3) if ranks > 1 else (1, 3) if offload else (1,):
            for checkpointing in (False, True):
                best = None
                for micro in (2**i for i in range(11) if 2**i <= per_device and per_device % 2**i == 0):
                    way = stage, offload, checkpointing, micro, per_device // micro
                    settings = _settings(plan.args, plan.step, *way)
                    result = plan.estimate_with(settings)
                    if result is None and best is None:
                        continue  # one row does not divide into the answers to a prompt, say, and more may
                    if result is None or (best is not None and not result.fits):
                        break
                    best = Candidate(*way, settings, result)
                    if not result.fits:
                        break
                found += [best] if best else []
    for candidate in found if cluster is not None else ():
        if candidate.result.fits:
            candidate.time = plan.time_with(candidate.settings, cluster)
    _recommend(found, objective)
    return found


def _recommend(found: list[Candidate], objective: str | None) -> None:
    """By time or price the fastest (of so many devices both are one), by memory the smallest.

    Without an objective the first that fits with 4 rows or more at a time (or the whole share), in the order of what
    the ways cost: recomputing activations a third more, ZeRO-3 gathers weights for each pass, offloading waits for the
    host.
    """

    def cost(way: Candidate) -> tuple:
        too_few = way.micro < min(4, way.micro * way.accumulation)
        return too_few, way.offload, way.stage == 3, way.checkpointing, -way.stage, -way.micro

    order = {
        None: cost,
        "memory": lambda way: way.result.device_peak[0],
        "time": lambda way: way.time.seconds,
        "price": lambda way: way.time.seconds,
    }
    fitting = [candidate for candidate in found if candidate.result.fits]
    if fitting:
        min(fitting, key=order[objective]).recommended = True


def command_of(options, gpus: int, words: list[str], settings: Settings) -> str:
    """The command line that starts the step with these settings."""
    start = ["--num_gpus", str(gpus)] if gpus <= options.gpus_per_node else ["--hostfile", "HOSTFILE"]
    script = str(arguments.SCRIPTS[options.step].relative_to(arguments.PROJECT))
    return shlex.join(["deepspeed", *start, script, *words, *as_flags(settings)])


def check_options(options) -> None:
    """Refuse machines that cannot be, and flags that do nothing without another.

    Raises:
        UserError: naming them.
    """
    needs_time = {
        "--gpu_price": options.gpu_price is not None,
        "--rows": options.rows is not None,
        "--network": options.network is not None,
        "--efficiency": bool(options.efficiency),
        f"--objective {options.objective}": options.objective in ("time", "price"),
        f"--gpus {' '.join(map(str, options.gpus))}": len(options.gpus) > 1,
    }
    for flag, given in needs_time.items():
        if given and not options.time:
            raise UserError(f"{flag} asks for estimated times: add --time")
    if options.time and options.gpu is None:
        raise UserError("--time needs the kind of device: --gpu H100, say (utils/accelerators.py has the table)")
    if len(options.gpus) == 1 and options.batch_size % options.gpus[0]:
        raise UserError(f"--batch_size {options.batch_size} rows do not divide into --gpus {options.gpus[0]}")


@dataclass
class Planned:
    """The ways to train on so many devices, the best of them marked.

    Attributes:
        backend: of generation, where several are planned. problem: why there is no way.
    """

    gpus: int
    found: list[Candidate]
    plan: Plan | None = None
    cluster: Cluster | None = None
    problem: str | None = None
    backend: str | None = None

    @property
    def best(self) -> Candidate | None:
        return next((candidate for candidate in self.found if candidate.recommended), None)


def _machine(options, gpus: int, device) -> Machine:
    """What --gpu, --gpus and the flags of memory describe.

    Raises:
        UserError: more memory than such a device has.
    """
    memory = options.gpu_memory
    if device is not None and device.memory:
        if memory is not None and memory > 1.1 * device.memory:
            raise UserError(f"--gpu_memory {memory:g}: a --gpu {device.name} has {device.memory:g} GiB")
        memory = memory or device.memory
    host = None if options.host_memory is None else int(options.host_memory * GIB)
    baseline = Bytes(int(CUDA_BASELINE), int(CUDA_HOST_BASELINE))
    return Machine(gpus, min(gpus, options.gpus_per_node), False, int((memory or 80) * GIB), host, baseline)


def backends_of(options, args) -> list[str | None]:
    """The backends to plan for each number of devices: both in a scaling table of step 3, unless a third is given."""
    both = len(options.gpus) > 1 and options.step == 3 and args.hybrid_engine_backend in ("auto", *BACKENDS)
    return list(BACKENDS) if both else [None]


def plan_for(options, gpus: int, device, shared: Plan, backend: str | None = None) -> Planned:
    """The ways to train on so many devices.

    Args:
        shared: a plan whose models others use, too. backend: one of BACKENDS; None for that of the flags.
    """
    if options.batch_size % gpus:
        problem = f"batch too small: {options.batch_size} rows do not divide into {gpus}"
        return Planned(gpus, [], problem=problem, backend=backend)
    args = argparse.Namespace(**vars(shared.args) | BACKENDS.get(backend, {}))
    plan = replace(shared, args=args, machine=_machine(options, gpus, device), refusal=None)
    cluster = None
    if options.time:
        if device.name == CPU and gpus > 1:
            device = measure_cpu(options.dtype, min(gpus, options.gpus_per_node))
        cluster = cluster_of(device, gpus, options.gpus_per_node, options.network)
        cluster = replace(cluster, efficiency=efficiency_of(options.efficiency, cluster.efficiency))
    objective = options.objective or ("time" if options.time else None)
    found = candidates(plan, options.batch_size // gpus, cluster, objective)
    if not found and plan.refusal is not None:
        if backend in (None, shared.args.hybrid_engine_backend):
            raise plan.refusal
        return Planned(gpus, [], problem=f"{backend}: {plan.refusal}", backend=backend)
    problem = None if any(candidate.recommended for candidate in found) else "nothing fits"
    return Planned(gpus, found, plan, cluster, problem, backend)


def main(given=None) -> int:
    options, rest = build_parser().parse_known_args(given)
    check_options(options)
    device = None if options.gpu is None else accelerator_named(options.gpu, options.dtype)
    words = base_command(options, rest)
    args = arguments.build_parser(options.step).parse_args(words)
    actor = load_config(options.model, args.trust_remote_code)
    critic = actor if options.critic is None else load_config(options.critic, args.trust_remote_code)
    configs = {"model": actor} if options.step != 3 else {"actor": actor, "critic": critic}
    tokenizer = None
    if options.step == 1 and args.soft_prompt is not None:  # its vectors start from embeddings of tokens
        tokenizer = load_hf_tokenizer(options.model, trust_remote_code=args.trust_remote_code)
    shared = Plan(args, options.step, configs, tokenizer, _machine(options, options.gpus[0], device))
    backends = backends_of(options, args)
    planned = [plan_for(options, gpus, device, shared, backend) for gpus in options.gpus for backend in backends]
    for note in shared.notes:
        print(note, file=sys.stderr if options.json else None)
    if options.json:
        print(json.dumps([row for one in planned for row in json_rows(options, words, one)], indent=1))
    elif len(planned) == 1:
        print(table(options, planned[0], words))
    else:
        print(scaling(options, planned, words))
    return 0 if any(one.best for one in planned) else 1


def json_rows(options, words: list[str], planned: Planned) -> list[dict]:
    return [
        {
            "settings": candidate.settings,
            "device_gib": round(candidate.result.device_peak[0] / GIB, 2),
            "host_gib": round(candidate.result.host_peak[0] / GIB, 2),
            "fits": candidate.result.fits,
            "recommended": candidate.recommended,
            "command": command_of(options, planned.gpus, words, candidate.settings | _of_backend(planned)),
        }
        | ({"gpus": planned.gpus} if len(options.gpus) > 1 else {})
        | ({"backend": planned.backend} if planned.backend else {})
        | ({} if candidate.time is None else row_of(candidate.time, planned.gpus, options.rows, options.gpu_price))
        for candidate in planned.found
    ]


def _other_backend(planned: Planned) -> list[str]:
    """Step 3: the recommended settings with the project's own loop and with vLLM, and what each is assumed to do."""
    best, ways = planned.best, {}
    for backend, flags in BACKENDS.items():
        settings = best.settings | flags
        result = planned.plan.estimate_with(settings)
        if result is None:
            ways[backend] = str(planned.plan.refusal)
        else:
            time = planned.plan.time_with(settings, planned.cluster)
            ways[backend] = time, result.device_peak[0] / GIB, result.fits
    return backend_lines(ways)


def _of_backend(planned: Planned) -> Settings:
    """What the command of a plan says more than the flags that were given."""
    return {"hybrid_engine_backend": planned.backend} if planned.backend == "vllm" else {}


def scaling(options, planned: list[Planned], words: list[str]) -> str:
    """A row for each number of devices (step 3: and backend of generation), and the command of the one that the
    objective asks for, among those of the backend that was asked for."""
    objective = options.objective or "time"
    order = {
        "time": lambda one: one.best.time.seconds,
        "price": lambda one: one.best.time.seconds * one.gpus,
        "memory": lambda one: one.best.result.device_peak[0],
    }
    head = f"{arguments.TITLES[options.step]}, {options.model} on {options.gpu}, {options.batch_size} rows per step"
    rows = [(one.gpus, one.backend, one.problem or (one.best.time, one.best)) for one in planned]
    lines = [head, "", *scaling_table(rows, options.rows, options.gpu_price)]
    asked = arguments.build_parser(options.step).parse_args(words)
    wanted = getattr(asked, "hybrid_engine_backend", "auto")
    fitting = [one for one in planned if one.best and (wanted == "auto" or one.backend in (None, wanted))]
    if not fitting:
        return "\n".join([*lines, "", NOTHING_FITS])
    best = min(fitting, key=order[objective])
    generated = f", --hybrid_engine_backend {best.backend}" if best.backend else ""
    lines += ["", f"by --objective {objective}: {best.gpus} devices{generated}", ""]
    lines += time_lines(best.best.time, best.gpus, best.cluster, options.rows, options.gpu_price)
    return "\n".join([*lines, "", command_of(options, best.gpus, words, best.best.settings | _of_backend(best))])


NOTHING_FITS = "nothing fits: a smaller model, more devices, LoRA or shorter rows"


def table(options, planned: Planned, words: list[str]) -> str:
    host = "not looked at" if options.host_memory is None else f"{options.host_memory:g} GiB of host memory"
    memory = planned.plan.machine.device / GIB
    lines = [
        f"{arguments.TITLES[options.step]}, {options.model}: {planned.gpus} devices of {memory:g} GiB, {host}",
        "",
        "   ZeRO  offload  checkpointing  micro-batch  accumulation  device GiB  host GiB per machine"
        + ("  s/step    MFU" if options.time else ""),
    ]
    for candidate in planned.found:
        mark = "->" if candidate.recommended else "  "
        (device, _), (on_host, _) = candidate.result.device_peak, candidate.result.host_peak
        note = "" if candidate.result.fits else "  too large"
        if candidate.time is not None:
            note = f"{candidate.time.seconds:20.2f} {candidate.time.mfu:6.1%}"
        lines.append(
            f"{mark} {candidate.stage:4}  {'yes' if candidate.offload else 'no':>7}  "
            f"{'yes' if candidate.checkpointing else 'no':>13}  {candidate.micro:11}  {candidate.accumulation:12}  "
            f"{device / GIB:10.1f}  {on_host / GIB:8.1f}{note}"
        )
    best = planned.best
    if best is None:
        return "\n".join([*lines, "", NOTHING_FITS])
    if best.time is not None:
        lines += ["", *time_lines(best.time, planned.gpus, planned.cluster, options.rows, options.gpu_price)]
        lines += _other_backend(planned) if options.step == 3 else []
    return "\n".join([*lines, "", command_of(options, planned.gpus, words, best.settings)])
