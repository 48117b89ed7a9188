"""``--dry_run``: everything that would stop a run, looked at before it costs anything. No weight is read.

One line for each check, then the memory the run would take against what the machine has, and flags that would make it
fit. Nothing is written but the cache of token ids, which the run itself would write.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
from collections import Counter
from pathlib import Path

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from utils import arguments
from utils.accelerators import accelerator_of
from utils.data.encoding import REWARD
from utils.data.preparation import datasets_of_step
from utils.data.unsupervised import get_unsupervised_data
from utils.engine.build import load_tokenizer
from utils.model.loading import WEIGHT_FILES, load_config
from utils.model.model_utils import check_model, check_positions
from utils.model.packing import refuse_state
from utils.model.reward_functions import RewardFunction, check_columns, columns_wanted, load_reward_functions
from utils.model.reward_model import reward_scale
from utils.model.soft_prompt import check_soft_prompt_inputs
from utils.model.tokenizer import check_same_tokenizer
from utils.module.lora import check_packing_share
from utils.planning.engine_memory import GIB, Bytes, Machine
from utils.planning.estimate import CPU_MARGIN, Estimate, estimate, models_of_step
from utils.planning.estimate_time import time_of_step
from utils.planning.machines import cluster_of, measure_cpu
from utils.planning.meta_model import MetaModel
from utils.planning.plan import Plan, suggest
from utils.planning.step_time import hours
from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.operators import is_built
from utils.process.world import get_world_size, ranks_per_node


class Checks:
    """Numbered lines, printed by rank 0 as they come."""

    def __init__(self):
        self.count = self.problems = 0

    def find(self, name: str, check, show: bool = False):
        """Print the text of ``check() -> (text, what it found)``, or its problem; returns what it found, or None.

        Every rank must call this, since checks hold collectives.

        Args:
            show: print also what the check printed, below its result.
        """
        result = None
        noise = io.StringIO()
        try:
            with contextlib.redirect_stdout(noise):
                (text, result), outcome = check(), "ok"
        except (UserError, OSError) as error:
            text, outcome = str(error), "problem"
            self.problems += 1
        self.count += 1
        print_rank_0(f"{self.count:2}. {name:14}{outcome:9}{text}")
        for line in noise.getvalue().splitlines() if show else ():
            print_rank_0(f"    {line}")
        return result

    def run(self, name: str, check) -> bool:
        """As ``find``, for a check that only says something; returns whether it went well."""
        return self.find(name, lambda: (check(), True)) is not None


def preflight(args, step: arguments.Step) -> None:
    """Check a run of a step and print what it would need; every rank must call this.

    Raises:
        UserError: it would not run.
    """
    print_rank_0(f"dry run of {arguments.TITLES[step]}: {get_world_size()} rank(s), nothing is trained or saved")
    checks = Checks()
    settled = checks.find("flags", lambda: _flags(args, step), show=True)
    args = args if settled is None else settled
    functions = []
    if step == 3 and args.reward_function:
        functions = checks.find("rewards", lambda: _reward_functions(args)) or []
    checks.run("packages", lambda: _packages(args, step))
    paths = _paths(args, step)
    configs = {}
    for name, path in paths.items():
        checks.run(name, lambda name=name, path=path: _model(args, step, name, path, configs))
    tokenizer = checks.find("tokenizer", lambda: _tokenizer(args, step, paths), show=True)
    datasets = None
    if tokenizer is None:
        print_rank_0("    data          skipped: it needs the tokenizer")
    else:
        checks.run("pad and EOS", lambda: _pad(tokenizer))
        datasets = checks.find("data", lambda: _data(args, step, tokenizer, functions), show=True)
    checks.run("batches", lambda: _batches(args, step, datasets))

    machine = this_machine()
    if len(configs) < len(paths) or settled is None:
        print_rank_0("    memory        not estimated: it needs the flags and the configuration of every model")
    elif models := checks.find("parameters", lambda: _parameters(args, step, configs, tokenizer)):
        checks.run("disk", lambda: _disk(args, paths, models))
        longest = _longest(args, step, datasets)
        result = estimate(longest, step, models, machine, both_ways=True)
        print_rank_0("")
        print_rank_0(memory_table(result))
        print_rank_0("")
        checks.run("memory", lambda: _fits(result, Plan(longest, step, configs, tokenizer, machine)))
        checks.run("time", lambda: _time(longest, step, models, machine, datasets))
    print_rank_0("")
    if checks.problems:
        raise UserError(f"{checks.problems} of {checks.count} checks found a problem; the run would not work as it is")
    print_rank_0(f"{checks.count} checks, no problem: the run can start")


def _paths(args, step: arguments.Step) -> dict[str, str]:
    """The models of a step by the flag that names them, shortened."""
    if step != 3:
        return {"model": args.model_name_or_path}
    paths = {"actor": args.actor_model_name_or_path, "critic": args.critic_model_name_or_path}
    return {name: path for name, path in paths.items() if path is not None}


def _flags(args, step: arguments.Step) -> tuple[str, arguments.Settled]:
    settled = arguments.settle(args, step)
    return f"they go together; training in {settled.dtype}", settled


def _reward_functions(args) -> tuple[str, list[RewardFunction]]:
    functions = load_reward_functions(args.reward_function)
    return ", ".join(f"{function.weight:g} x {function.name}" for function in functions), functions


def _packages(args, step: arguments.Step) -> str:
    wanted = {}  # flag -> (module, package)
    if step == 1 and args.soft_prompt is not None:
        wanted["soft_prompt"] = ("peft", "peft")
    if step != 3 and args.paged_optimizer:
        wanted["paged_optimizer"] = ("bitsandbytes", "bitsandbytes")
    if step != 3 and args.quantize == "nf4":
        wanted["quantize nf4"] = ("bitsandbytes", "bitsandbytes")
    if args.attn_implementation == "flash_attention_2":
        wanted["attn_implementation flash_attention_2"] = ("flash_attn", "flash-attn")
    wanted |= {f"report_to {name}": (name, name) for name in args.report_to}
    for flag, (module, package) in wanted.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--{flag} needs the package {package}: pip install {package}")
    found = ", ".join(f"{package} is there (--{flag})" for flag, (_, package) in wanted.items())
    compiles = args.offload and not is_built("cpu_adam")
    return (found or "none but the usual") + "; DeepSpeed's cpu_adam will be compiled, about a minute" * compiles


def _model(args, step: arguments.Step, name: str, path: str, configs: dict) -> str:
    """Also puts the configuration into ``configs``, where it is wanted if there is a problem with the weights."""
    configs[name] = config = load_config(path, args.trust_remote_code)
    causal = name == "actor" or (name == "model" and step != 2)
    kind = f"{type(config).__name__.removesuffix('Config')}, vocabulary {config.get_text_config().vocab_size:,}"
    lengths = ("max_seq_len",) if step != 3 else ("max_prompt_seq_len", "max_answer_seq_len")
    lengths = {f"--{flag}": getattr(args, flag) for flag in lengths}
    check_positions(config, path, lengths)
    if name == "critic" and args.normalize_reward:
        reward_scale(config)
    if not _weights_are_here(path):
        if Path(path).is_dir():
            raise UserError(f"{path!r} holds no weights: there is none of {', '.join(WEIGHT_FILES)}")
        return f"{kind}; its weights are not downloaded yet, so that they were not compared with the configuration"
    model_class = AutoModelForCausalLM if causal else AutoModel
    check_model(model_class, path, args.trust_remote_code, trained_head=name == "critic", lengths=lengths)
    return f"{kind}; its weights are there, whole and of this shape"


def _weights_are_here(path: str) -> bool:
    """In the folder, or in the cache of the hub; nothing is downloaded."""
    if Path(path).is_dir():
        return any((Path(path) / file).exists() for file in WEIGHT_FILES)
    return any(isinstance(try_to_load_from_cache(path, file), str) for file in WEIGHT_FILES)


def _tokenizer(args, step: arguments.Step, paths: dict) -> tuple[str, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(args, next(iter(paths.values())))
    if "critic" in paths:
        check_same_tokenizer(
            tokenizer,
            args.actor_model_name_or_path,
            args.critic_model_name_or_path,
            arguments.end_token(args),
            args.trust_remote_code,
            args.prompt_format,
        )
    if step == 1 and args.soft_prompt is not None:
        check_soft_prompt_inputs(args, tokenizer)
    same = ", the same for actor and critic" if "critic" in paths else ""
    return f"{len(tokenizer):,} entries{same}", tokenizer


def _pad(tokenizer) -> str:
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"pad and EOS are one token, {tokenizer.eos_token!r}: a model could never learn to end")
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    return f"pad {pad!r} ({tokenizer.pad_token_id}) and EOS {eos!r} ({tokenizer.eos_token_id}) differ"


def _data(args, step: arguments.Step, tokenizer, functions: list[RewardFunction]) -> tuple[str, tuple]:
    limit, phase = args.max_seq_len if step != 3 else args.max_prompt_seq_len, arguments.TRAIN_PHASES[step]
    train, evaluation = datasets_of_step(args, tokenizer, phase, limit, keep_columns=columns_wanted(functions))
    check_columns(functions, train.columns)
    rows = "prompts" if step == 3 else "rows"
    text = f"{len(train):,} {rows} to train, {len(evaluation):,} to evaluate, the longest {max(train.lengths):,} tokens"
    if step == 3 and args.unsupervised_dataset_name:
        text += f"; {len(get_unsupervised_data(args, tokenizer)):,} blocks of plain text"
    return text, (train, evaluation)


def _batches(args, step: arguments.Step, datasets) -> str:
    ranks = get_world_size()
    if step != 3:
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        rows = micro * ranks * accumulation
        text = f"{micro} per device x {ranks} rank(s) x {accumulation} accumulated = {rows} per optimizer step"
        if datasets is None or (step == 1 and args.packing):
            return text
        steps = -(-len(datasets[0]) // rows)
        total = steps * args.num_train_epochs
        return f"{text}; {steps:,} steps per epoch, {total:,} in all{_warmup(args, total)}"
    batch = arguments.RLHFBatchSizes.of(args)
    if datasets is None:
        return batch.explain()
    updates = batch.updates(len(datasets[0]), ranks) * args.num_train_epochs
    total = updates * args.ppo_epochs * batch.steps_per_pass
    return f"{batch.explain()}; {updates:,} updates in all{_warmup(args, total)}"


def _warmup(args, total_steps: int) -> str:
    note = arguments.warmup_note(args, total_steps)
    return "" if note is None else f". {note}"


def _parameters(args, step: arguments.Step, configs: dict, tokenizer) -> tuple[str, dict[str, MetaModel]]:
    models = models_of_step(args, step, configs, tokenizer)
    if step == 1 and args.packing:
        refuse_state(models["model"].model)
    if step != 3 and args.quantize is not None:
        check_packing_share(models["model"].model)
    parts = []
    for name, model in models.items():
        sizes, layers = model.sizes, len(model.adapted)
        if not model.spec.trains:
            parts.append(f"{name} {sizes.total / 1e6:,.1f} M, frozen")
            continue
        lora = f" (LoRA on {layers} layers)" if layers else ""
        share = 100 * sizes.trained / sizes.total
        parts.append(f"{name} {sizes.trained / 1e6:,.2f} of {sizes.total / 1e6:,.1f} M train, {share:.2f} %{lora}")
        if model.left_out is not None:
            parts.append(model.left_out)
    return "; ".join(parts), models


def _free(folder: str) -> tuple[Path, int]:
    """The nearest folder that is there, and the free bytes of its disk."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    return there, shutil.disk_usage(there).free


def _disk(args, paths: dict[str, str], models: dict[str, MetaModel]) -> str:
    texts, of_disks = [], Counter()
    for folder, size in _needed_on_disks(args, paths, models).items():
        there, free = _free(folder)
        if not os.access(there, os.W_OK):
            raise UserError(f"{folder} cannot be written: {there} is not yours")
        disk = there.stat().st_dev
        of_disks[disk] += size
        if free < of_disks[disk]:
            others = "" if of_disks[disk] == size else f", {of_disks[disk] / 1e9:.1f} GB with what else goes there"
            raise UserError(f"{folder} needs {size / 1e9:.1f} GB{others}, and its disk has {free / 1e9:.1f} GB free")
        texts.append(f"{folder} needs {size / 1e9:.1f} of {free / 1e9:.1f} GB free")
    return "; ".join(texts)


def _needed_on_disks(args, paths: dict[str, str], models: dict[str, MetaModel]) -> Counter:
    """Folder -> bytes: models, checkpoints with one more than stay, while it is written, and what is downloaded."""
    needs: Counter = Counter()
    saved = sum(model.saved_bytes for name, model in models.items() if model.spec.trains or name == "EMA")
    if args.output_dir is not None:
        kept = 0 if args.save_interval is None else args.save_total_limit or 1  # without a limit one is known of
        needs[args.output_dir] += saved * (1 + bool(args.save_best) + kept)
    checkpoints = args.checkpoint_dir or (args.output_dir and str(Path(args.output_dir) / "checkpoints"))
    if checkpoints is not None and (args.checkpoint_steps or args.checkpoint_dir):
        each = sum(_checkpoint_bytes(name, model) for name, model in models.items())
        needs[checkpoints] += each * (args.keep_checkpoints + 1 if args.checkpoint_steps else 1)
    needs[args.data_output_path] += 100_000_000  # an indication: the cache takes 4 bytes per token
    missing = [path for path in paths.values() if not _weights_are_here(path)]
    if missing:
        needs[HF_HUB_CACHE] += max(model.saved_bytes for model in models.values()) * len(missing)
    return needs


def _checkpoint_bytes(name: str, model: MetaModel) -> int:
    """Trained weights in the model's precision, and in fp32 with AdamW's two moments; an average in fp32."""
    if name == "EMA":
        return 4 * model.sizes.total
    return model.sizes.trained * (model.itemsize + 12) if model.spec.trains else 0


def _longest(args, step: arguments.Step, datasets):
    """The arguments with the lengths, and of pairs the answers, that the rows really have, where they are known."""
    if datasets is None or (step == 1 and args.packing):
        return args
    known = {}
    if arguments.TRAIN_PHASES[step] == REWARD:
        known["answers_per_row"] = max(dataset.answers_per_row for dataset in datasets)
    if args.pad_to_max_length:
        return argparse.Namespace(**vars(args) | known)
    longest = max(max(dataset.lengths) for dataset in datasets)
    limit = "max_seq_len" if step != 3 else "max_prompt_seq_len"
    padded = min(vars(args)[limit], -(-int(longest) // 8) * 8)
    return argparse.Namespace(**vars(args) | known | {limit: padded})


def this_machine() -> Machine:
    """Where this process runs; what it has by now (libraries, data) is the baseline."""
    accelerator, ranks, baseline = get_accelerator(), get_world_size(), psutil.Process().memory_info().rss
    host = _host_memory()
    if accelerator.device_name() == "cpu":
        share = host // ranks_per_node()
        return Machine(ranks, ranks_per_node(), True, share, host, Bytes(host=baseline))
    if accelerator.device_name() == "cuda":  # the driver's word; DeepSpeed counts this process alone without pynvml
        free, total = torch.cuda.mem_get_info()
    else:
        free, total = accelerator.available_memory(), accelerator.total_memory()
    return Machine(ranks, ranks_per_node(), False, total, host, Bytes(total - free, baseline))


def _host_memory() -> int:
    """Bytes that are free for this run: of the machine, or of the container."""
    free = psutil.virtual_memory().available + ranks_per_node() * psutil.Process().memory_info().rss
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()))
    return free


def _time(args, step: arguments.Step, models: dict[str, MetaModel], machine: Machine, datasets) -> str:
    """Seconds of a step with rows as long as the longest, and hours of the run, where its rows are known."""
    if machine.on_cpu:
        device = measure_cpu(args.dtype)
    else:
        name = torch.cuda.get_device_name() if get_accelerator().device_name() == "cuda" else ""
        device = accelerator_of(name, machine.device / GIB)
        if device is None or not device.peak(args.dtype):
            return f"not estimated: utils/accelerators.py has no figures of this device in {args.dtype}"
    step_time = time_of_step(args, step, models, cluster_of(device, machine.ranks, machine.ranks_per_node))
    waits = ", ".join(f"{limit} {seconds / step_time.seconds:.0%}" for limit, seconds in step_time.by("limit").items())
    what = "update" if step == 3 else "optimizer step"
    text = f"about {step_time.seconds:.3g} s per {what} if all rows were as long as the longest ({waits})"
    if datasets is None or (step == 1 and args.packing):
        return f"{text}; an estimate"
    answers = args.num_generations_per_prompt if step == 3 else 1
    total = hours(step_time, len(datasets[0]) * answers * args.num_train_epochs)
    return f"{text}, {total:.3g} hours in all; an estimate"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def memory_table(result: Estimate) -> str:
    """Rows of parts by engines, then the phases of a step; GiB on one rank."""
    machine, engines = result.machine, result.engines
    where = "one rank, host memory" if machine.on_cpu else "one device"
    rows: dict[str, list[str]] = {}

    def put(name: str, engine: int, size: int, note: str = "") -> None:
        if size:
            rows.setdefault(name, ["-"] * len(engines))[engine] = gib(size) + note

    for column, engine in enumerate(engines):
        for part, size in engine.resident.items():
            put(part, column, size.device)
            put(f"{part} (host)", column, size.host)
        if engine.model.spec.trains:
            put("gradients, at most", column, engine.reduction.device + engine.reduction.host)
            put("optimizer step", column, engine.step.device + engine.step.host)
        plain, checkpointed, checkpoints = result.activations.get(engine.name, (0, 0, False))
        put("activations kept", column, plain, "" if checkpoints else " *")
        put("  with checkpointing", column, checkpointed, " *" if checkpoints else "")
        for part, size in result.details.get(engine.name, {}).items():
            put(part, column, size)
    width = max(12, *(len(engine.name) + 2 for engine in engines))
    lines = [f"{f'estimate, GiB on {where}':34}" + "".join(f"{engine.name:>{width}}" for engine in engines)]
    lines += [f"  {name:32}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows.items()]
    base = machine.baseline.device or machine.baseline.host
    lines += [f"  {'before any model':32}{gib(base):>{width}}", ""]
    lines.append(
        f"{'everything alive in a phase':34}{'rank' if machine.on_cpu else 'device':>{width}}{'host':>{width}}"
    )
    for phase in result.phases:
        device, host = result.needs(phase)
        lines.append(f"  {phase.name:32}{gib(device):>{width}}{gib(host):>{width}}")
    if machine.on_cpu:
        lines.append(f"  (each with a margin of {CPU_MARGIN:.0%} for freed memory that the C library keeps)")
    return "\n".join(lines)


def _fits(result: Estimate, plan: Plan) -> str:
    machine = result.machine
    device, phase = result.device_peak
    host, host_phase = result.host_peak
    if machine.on_cpu:
        text = (
            f"{gib(device)} GiB per rank at most ({phase}), {gib(host)} GiB for {machine.ranks_per_node} rank(s) of "
            f"{gib(machine.host)} GiB free on this host"
        )
    else:
        text = (
            f"{gib(device)} of {gib(machine.device)} GiB on the device ({phase}), {gib(host)} of {gib(machine.host)} "
            f"GiB free on the host ({host_phase})"
        )
    if result.fits:
        return text
    better = suggest(plan)
    if better is None:
        raise UserError(f"{text}. No setting of these flags fits: a smaller model, or more memory or devices")
    flags, then = better
    peak = then.device_peak[0] if machine.on_cpu or machine.device < device else then.host_peak[0]
    raise UserError(f"{text}. It would fit ({gib(peak)} GiB) with {flags}")
