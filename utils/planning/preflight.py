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
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModel, AutoModelForCausalLM

from utils import arguments
from utils.data.preparation import datasets_of_step
from utils.data.unsupervised import get_unsupervised_data
from utils.model.loading import WEIGHT_FILES, load_config
from utils.model.model_utils import check_model, check_positions
from utils.model.reward_functions import load_reward_functions
from utils.model.reward_model import reward_scale
from utils.model.soft_prompt import check_soft_prompt_inputs
from utils.model.tokenizer import check_same_tokenizer, load_hf_tokenizer
from utils.planning.engine_memory import GIB, Bytes, Machine
from utils.planning.estimate import Estimate, estimate, models_of_step
from utils.planning.plan import Plan, suggest
from utils.process.errors import UserError
from utils.process.operators import load_operator
from utils.process.world import get_rank, get_world_size, ranks_per_node

# flag -> (package, name to install)
PACKAGES = {
    "soft_prompt": ("peft", "peft"),
    "paged_optimizer": ("bitsandbytes", "bitsandbytes"),
}


class Checks:
    """Numbered lines, printed by rank 0 as they come."""

    def __init__(self):
        self.count = self.problems = 0

    def run(self, name: str, check):
        """Print what ``check()`` says, or its problem; returns whether it went well.

        Every rank must call this, since checks hold collectives.
        """
        noise = io.StringIO()
        try:
            with contextlib.redirect_stdout(noise):
                found, text = "ok", check()
        except (UserError, OSError) as error:
            found, text = "problem", str(error)
            self.problems += 1
        self.count += 1
        say(f"{self.count:2}. {name:14}{found:9}{text}")
        return found == "ok"


def say(text: str = "") -> None:
    if get_rank() == 0:
        print(text, flush=True)


def preflight(args, step: int) -> None:
    """Check a run of a step and print what it would need; every rank must call this.

    Raises:
        UserError: it would not run.
    """
    say(f"dry run of step {step}: {get_world_size()} rank(s), nothing is trained or saved")
    checks = Checks()
    settled = []
    flags_are_fine = checks.run("flags", lambda: _flags(args, step, settled))
    args = settled[0] if settled else args
    checks.run("packages", lambda: _packages(args))
    configs, tokenizer, datasets = {}, None, None
    paths = _paths(args, step)
    for name in paths:
        checks.run(name, lambda name=name: _model(args, step, name, paths[name], configs))
    tokenizers = []
    if checks.run("tokenizer", lambda: _tokenizer(args, step, paths, tokenizers)):
        tokenizer = tokenizers[0]
        checks.run("pad and EOS", lambda: _pad(tokenizer))
    found = []
    if tokenizer is None:
        say("    data          skipped: it needs the tokenizer")
    elif checks.run("data", lambda: _data(args, step, tokenizer, found)):
        datasets = found[0]
    checks.run("batches", lambda: _batches(args, step, datasets))

    models, machine = {}, this_machine()
    if len(configs) < len(paths) or not flags_are_fine:
        say("    memory        not estimated: it needs the flags and the configuration of every model")
    elif checks.run("parameters", lambda: _parameters(args, step, configs, tokenizer, models)):
        checks.run("disk", lambda: _disk(args, step, paths, models))
        longest = _longest(args, step, datasets)
        plan = Plan(longest, step, configs, tokenizer, machine)
        result = estimate(longest, step, models, machine, both_ways=True)
        say()
        say(memory_table(result))
        say()
        checks.run("memory", lambda: _fits(result, plan, longest))
    say()
    if checks.problems:
        raise UserError(f"{checks.problems} of {checks.count} checks found a problem; the run would not work as it is")
    say(f"{checks.count} checks, no problem: the run can start")


def _paths(args, step: int) -> dict[str, str]:
    """The models of a step by the flag that names them, shortened."""
    if step < 3:
        return {"model": args.model_name_or_path}
    paths = {"actor": args.actor_model_name_or_path, "critic": args.critic_model_name_or_path}
    return {name: path for name, path in paths.items() if path is not None}


def _flags(args, step: int, settled: list) -> str:
    settled.append(arguments.settle(args, step))
    if step == 3:
        load_reward_functions(args.reward_function)
    return f"they go together; training in {settled[0].dtype}"


def _packages(args) -> str:
    wanted = {flag: names for flag, names in PACKAGES.items() if getattr(args, flag, None)}
    if getattr(args, "quantize", None) == "nf4":
        wanted["quantize nf4"] = ("bitsandbytes", "bitsandbytes")
    if args.attn_implementation == "flash_attention_2":
        wanted["attn_implementation flash_attention_2"] = ("flash_attn", "flash-attn")
    wanted |= {f"report_to {name}": (name, name) for name in args.report_to}
    for flag, (module, package) in wanted.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--{flag} needs the package {package}: pip install {package}")
    if args.offload:
        if shutil.which("c++") is None and shutil.which("g++") is None:
            raise UserError("--offload compiles DeepSpeed's CPU Adam: install a C++ compiler (apt-get install g++)")
        load_operator("CPUAdamBuilder")
    return ", ".join(f"{package} is there (--{flag})" for flag, (_, package) in wanted.items()) or "none but the usual"


def _model(args, step: int, name: str, path: str, configs: dict) -> str:
    configs[name] = config = load_config(path, args.trust_remote_code)
    causal = name == "actor" or (name == "model" and step == 1)
    kind = f"{type(config).__name__.removesuffix('Config')}, vocabulary {config.get_text_config().vocab_size:,}"
    lengths = ("max_seq_len",) if step < 3 else ("max_prompt_seq_len", "max_answer_seq_len")
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


def _tokenizer(args, step: int, paths: dict, tokenizers: list) -> str:
    tokenizer = load_hf_tokenizer(
        next(iter(paths.values())),
        add_special_tokens=arguments.end_token(args),
        trust_remote_code=args.trust_remote_code,
    )
    tokenizers.append(tokenizer)
    if "critic" in paths:
        check_same_tokenizer(
            tokenizer,
            args.actor_model_name_or_path,
            args.critic_model_name_or_path,
            arguments.end_token(args),
            args.trust_remote_code,
        )
    if getattr(args, "soft_prompt", None) is not None:
        check_soft_prompt_inputs(args, tokenizer)
    same = ", the same for actor and critic" if "critic" in paths else ""
    return f"{len(tokenizer):,} entries{same}"


def _pad(tokenizer) -> str:
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"pad and EOS are one token, {tokenizer.eos_token!r}: a model could never learn to end")
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    return f"pad {pad!r} ({tokenizer.pad_token_id}) and EOS {eos!r} ({tokenizer.eos_token_id}) differ"


def _data(args, step: int, tokenizer, found: list) -> str:
    limit = args.max_seq_len if step < 3 else args.max_prompt_seq_len
    train, evaluation = datasets_of_step(args, tokenizer, step, limit)
    found.append((train, evaluation))
    rows = "prompts" if step == 3 else "rows"
    text = f"{len(train):,} {rows} to train, {len(evaluation):,} to evaluate, the longest {max(train.lengths):,} tokens"
    if getattr(args, "unsupervised_dataset_name", None):
        text += f"; {len(get_unsupervised_data(args, tokenizer)):,} blocks of plain text"
    return text


def _batches(args, step: int, datasets) -> str:
    ranks = get_world_size()
    if step < 3:
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        rows = micro * ranks * accumulation
        text = f"{micro} per device x {ranks} rank(s) x {accumulation} accumulated = {rows} per optimizer step"
        if datasets is None or getattr(args, "packing", False):
            return text
        steps = -(-len(datasets[0]) // rows)
        return f"{text}; {steps:,} steps per epoch, {steps * args.num_train_epochs:,} in all"
    batch = arguments.RLHFBatchSizes.of(args)
    if datasets is None:
        return batch.explain()
    per_update = batch.prompts_per_round * ranks * batch.rounds
    updates = len(datasets[0]) // (batch.prompts_per_round * ranks) // batch.rounds
    if updates == 0:
        raise UserError(
            f"{len(datasets[0])} prompts do not fill one update of {per_update}; lower "
            "--per_device_generation_batch_size or --gradient_accumulation_steps, or give more data"
        )
    return f"{batch.explain()}; {updates * args.num_train_epochs:,} updates in all"


def _parameters(args, step: int, configs: dict, tokenizer, models: dict) -> str:
    models |= models_of_step(args, step, configs, tokenizer)
    parts = []
    for name, model in models.items():
        sizes, layers = model.sizes, len(model.adapted)
        if not model.trains:
            parts.append(f"{name} {sizes.total / 1e6:,.1f} M, frozen")
            continue
        lora = f" (LoRA on {layers} layers)" if layers else ""
        share = 100 * sizes.trained / sizes.total
        parts.append(f"{name} {sizes.trained / 1e6:,.2f} of {sizes.total / 1e6:,.1f} M train, {share:.2f} %{lora}")
    return "; ".join(parts)


def _free(folder: str) -> tuple[Path, int]:
    """The nearest folder that is there, and the free bytes of its disk."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    return there, shutil.disk_usage(there).free


def _disk(args, step: int, paths: dict, models: dict) -> str:
    texts = []
    needs = {}  # folder -> bytes
    if args.output_dir is not None:
        saved = [model for name, model in models.items() if model.trains or name == "EMA"]
        needs[args.output_dir] = sum(model.sizes.total * model.itemsize for model in saved)
    needs[args.data_output_path] = 100_000_000  # an indication: the cache takes 4 bytes per token
    missing = [path for path in paths.values() if not _weights_are_here(path)]
    if missing:
        from huggingface_hub.constants import HF_HUB_CACHE

        size = max(model.sizes.total * model.itemsize for model in models.values())
        needs[HF_HUB_CACHE] = size * len(missing)
    for folder, size in needs.items():
        there, free = _free(folder)
        if not os.access(there, os.W_OK):
            raise UserError(f"{folder} cannot be written: {there} is not yours")
        if free < size:
            raise UserError(f"{folder} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free")
        texts.append(f"{folder} needs {size / 1e9:.1f} of {free / 1e9:.1f} GB free")
    return "; ".join(texts)


def _longest(args, step: int, datasets):
    """The arguments with the lengths that the rows really have, where they are known."""
    if datasets is None or args.pad_to_max_length or getattr(args, "packing", False):
        return args
    longest = max(max(dataset.lengths) for dataset in datasets)
    limit = "max_seq_len" if step < 3 else "max_prompt_seq_len"
    padded = min(vars(args)[limit], -(-int(longest) // 8) * 8)
    return argparse.Namespace(**vars(args) | {limit: padded})


def this_machine() -> Machine:
    """Where this process runs; what it has by now (libraries, data) is the baseline."""
    accelerator, ranks, baseline = get_accelerator(), get_world_size(), psutil.Process().memory_info().rss
    host = _host_memory()
    if accelerator.device_name() == "cpu":
        share = host // ranks_per_node()
        return Machine(ranks, ranks_per_node(), True, share, host, Bytes(host=baseline))
    total = accelerator.total_memory()
    free = accelerator.available_memory()
    return Machine(ranks, ranks_per_node(), False, total, host, Bytes(total - free, baseline))


def _host_memory() -> int:
    """Bytes that are free for this run: of the machine, or of the container."""
    free = psutil.virtual_memory().available + ranks_per_node() * psutil.Process().memory_info().rss
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()))
    return free


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
        if engine.model.trains:
            put("gradients, at most", column, engine.reduced.device + engine.reduced.host)
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
    if kept := result.kept_by_heap:
        lines.append(
            f"  {'freed, but kept by the C library':32}{gib(kept):>{width}}{gib(kept * machine.ranks):>{width}}"
        )
    return "\n".join(lines)


def _fits(result: Estimate, plan: Plan, args) -> str:
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
