"""Every command-line flag of the three steps, each defined once; a main.py composes the groups it needs."""

import argparse
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import SchedulerType
from transformers.utils import is_flash_attn_2_available

from utils.distributed import COMM_TIMEOUT, UserError, check_same_on_all_nodes, deepspeed, get_accelerator
from utils.ds_utils import get_train_ds_config, merge_config_file, offload_device
from utils.files import scratch_beside

QUANTIZATIONS = ("nf4", "int8")
# Flags whose values may differ between nodes: where things lie there.
OF_A_NODE = re.compile("rank|path|_dir|resume|deepspeed_config|reward_function|dataset_name|num_workers")
TRACKERS = ("tensorboard", "wandb", "trackio")
SOFT_PROMPT_LEARNING_RATES = {"prompt_tuning": 1e-2, "p_tuning": 1e-4}


def cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "three-steps-to-chat" / "data_files")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=38, width=100)


def new_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)


LARGEST = 2**31 - 1  # more of anything is a slip, and some libraries' numbers end here


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and {LARGEST}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if not 0 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {LARGEST}")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _size(text: str) -> int:
    """Bytes; units are powers of 1000, as on the hub."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size as in 5GB or 500MB")
    number, unit = match.groups()
    value = int(float(number) * 1000 ** (1 + "KMGT".index(unit)))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_data_arguments(parser, step: int) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data_path",
        nargs="*",
        default=["Dahoas/rm-static"],
        help="datasets to blend: names of known datasets, local/jsonfile, local/demo, or paths of your own files",
    )
    add(
        "--data_split",
        default="2,4,4",
        help="shares of the data for step 1, 2 and 3, as in 6,2,2; only this step's share is read",
    )
    if step == 1:
        add(
            "--sft_only_data_path",
            nargs="*",
            default=[],
            help="datasets used whole, in this step only; none to turn off",
        )
    add("--data_output_path", default=cache_folder(), help="where the split indices and the tokenised cache are kept")
    add(
        "--preprocessing_num_workers",
        type=_positive,
        default=None,
        help="threads that tokenise, on the first rank of each node; None for all cores",
    )
    for name in ("prompt", "chosen", "rejected", "messages"):
        add(
            f"--{name}_column",
            default=None,
            help=f"column of your own files that holds {name}; None for its usual name",
        )
    add(
        "--chat_template",
        action="store_true",
        help="write conversations and prompts by the tokenizer's chat template; off for the datasets' own text",
    )
    add(
        "--allow_special_tokens",
        action="store_true",
        help="texts of the data that spell a special token (<|endoftext|>, </s> ...) mean it; off: they are plain text",
    )
    add("--rebuild_cache", action="store_true", help="tokenise again even if the cache has this very data")
    add("--max_train_samples", type=_positive, default=None, help="use at most this many training rows; None for all")
    add("--max_eval_samples", type=_positive, default=None, help="use at most this many evaluation rows; None for all")
    add(
        "--truncation_side",
        choices=["left", "right"],
        default="left",
        help="what a row that is too long loses: the beginning of its prompt, or its end (the published way)",
    )
    add(
        "--pad_to_max_length",
        action="store_true",
        help="pad every batch to the maximum length instead of its longest row",
    )
    add("--add_eot_token", action="store_true", help="add --eot_token to the tokenizer and end every answer with it")
    add("--eot_token", default="<|endoftext|>", help="the token --add_eot_token adds; it becomes the tokenizer's EOS")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with a model; off for safety")


def add_sequence_length_argument(parser) -> None:
    parser.add_argument(
        "--max_seq_len", type=_positive, default=512, help="tokens of a row, prompt and answer and EOS together"
    )


def add_dtype_argument(parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["fp16", "bf16", "fp32"],
        default=None,
        help="training precision; None for bf16 where the accelerator supports it, else fp32 (published scripts: fp16)",
    )
    parser.add_argument(
        "--attn_implementation",
        choices=["sdpa", "eager", "flash_attention_2"],
        default=None,
        help="attention kernels; flash_attention_2 wants the package flash-attn; None for the model's default",
    )
    parser.add_argument(
        "--deepspeed_config_overrides",
        metavar="FILE",
        default=None,
        help="JSON file laid over the configuration of the trained engines, as --deepspeed_config is too",
    )
    parser.add_argument(
        "--compute_fp32_loss",
        action="store_true",
        help="accepted for old command lines: the loss is always computed in fp32 here",
    )


def add_supervised_arguments(parser, learning_rate: float) -> None:
    """Model, optimisation, DeepSpeed and LoRA of step 1 and step 2."""
    group = parser.add_argument_group("model and optimisation")
    add = group.add_argument
    add("--model_name_or_path", required=True, help="folder or hub name of the model to start from")
    add("--per_device_train_batch_size", type=_positive, default=16, help="rows per device and forward pass")
    add("--per_device_eval_batch_size", type=_positive, default=16, help="rows per device in evaluation")
    add_sequence_length_argument(group)
    add("--learning_rate", type=non_negative_float, default=learning_rate, help="peak learning rate")
    add("--weight_decay", type=non_negative_float, default=0.0, help="AdamW's decay of matrices; 0 to turn off")
    add("--num_train_epochs", type=_positive, default=1, help="passes over the training rows")
    add("--gradient_accumulation_steps", type=_positive, default=1, help="forward passes per optimizer step")
    add_schedule_arguments(group, warmup=0)
    add(
        "--group_by_length",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put rows of similar length into a batch: less padding; --no-group_by_length for plain shuffling",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, slower",
    )
    add("--dropout", type=_probability, default=None, help="every dropout probability of the model; None for its own")
    group = parser.add_argument_group("precision and memory")
    add = group.add_argument
    add("--offload", action="store_true", help="keep optimizer states (ZeRO-3: parameters too) in host memory")
    add_dtype_argument(group)
    add(
        "--zero_stage",
        type=int,
        choices=[0, 1, 2, 3],
        default=0,
        help="what is sharded over ranks: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters",
    )
    add_lora_arguments(parser)
    add_quantize_arguments(parser)


def add_schedule_arguments(group, warmup: int) -> None:
    group.add_argument(
        "--lr_scheduler_type",
        type=SchedulerType,
        default=SchedulerType.COSINE,
        choices=[
            SchedulerType(n)
            for n in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
        ],
        metavar="NAME",
        help="linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup",
    )
    group.add_argument(
        "--num_warmup_steps", type=_not_negative, default=warmup, help="optimizer steps of rising learning rate"
    )


def add_lora_arguments(parser, prefix: str = "") -> None:
    """LoRA of one model; step 3 calls this for ``actor_`` and ``critic_``."""
    whose = f"of the {prefix.rstrip('_')} " if prefix else ""
    group = parser.add_argument_group(f"LoRA {whose}".strip())
    add = group.add_argument
    add(
        f"--{prefix}lora_dim",
        type=_not_negative,
        default=0,
        help="rank of the trained update; 0 to train the full weights",
    )
    add(
        f"--{prefix}lora_module_name",
        default="auto",
        help="part of the names of layers to adapt, as in decoder.layers. (published); auto for all linear layers of "
        "the blocks; all-linear for every one but the output head",
    )
    add(
        f"--{prefix}lora_scaling",
        type=_above_zero,
        default=1.0,
        help=f"the update counts this / --{prefix}lora_dim: PEFT's lora_alpha; 1 as published, and twice the rank is "
        "PEFT users' habit (with a learning rate to match)",
    )
    add(
        f"--{prefix}lora_dropout",
        type=_probability,
        default=0.0,
        help="dropout on the input of the LoRA factors while training; 0 to turn off",
    )
    add(
        f"--{prefix}lora_learning_rate", type=non_negative_float, default=5e-4, help="learning rate of the LoRA factors"
    )
    if prefix in ("", "actor_"):
        add(
            "--only_optimize_lora",
            action="store_true",
            help="of each model that has LoRA, freeze everything but it (and a reward model's value head)",
        )
        add(
            "--save_lora_adapters",
            action="store_true",
            help="beside the whole model, save the LoRA factors alone in PEFT's format, in its folder adapter; "
            "needs --only_optimize_lora",
        )


def add_quantize_arguments(parser) -> None:
    """QLoRA of step 1 and 2."""
    add = parser.add_argument_group("QLoRA (nf4 and the paged optimizer need the package bitsandbytes)").add_argument
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        default=None,
        help="pack the frozen weights of all linear layers but the head in 4 or 8 bits; needs --lora_dim; None: off",
    )
    add(
        "--quantize_double",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="nf4: pack the scales of its blocks too, 0.37 bits less per weight",
    )
    add(
        "--quantize_compute_dtype",
        choices=["fp16", "bf16", "fp32"],
        default=None,
        help="precision of products with packed weights; None for --dtype",
    )
    add(
        "--paged_optimizer",
        action="store_true",
        help="AdamW whose states move to host memory while the GPU has no room for them (CUDA)",
    )


def check_quantize(args) -> None:
    """Refuse combinations with --quantize and --paged_optimizer that cannot work; set what QLoRA implies."""
    if args.paged_optimizer and get_accelerator().device_name() != "cuda":
        raise UserError(
            "--paged_optimizer moves optimizer states between the memories of GPU and host, by CUDA's unified memory; "
            f"this machine has {get_accelerator().device_name()} only"
        )
    if args.paged_optimizer and args.offload:
        raise UserError("--offload keeps the optimizer states on the host already: leave out --paged_optimizer")
    if importlib.util.find_spec("bitsandbytes") is None and (args.quantize == "nf4" or args.paged_optimizer):
        flag = "--paged_optimizer" if args.paged_optimizer else "--quantize nf4"
        raise UserError(f"{flag} needs the package bitsandbytes: pip install bitsandbytes")
    if args.quantize is None:
        if args.quantize_compute_dtype is not None:
            raise UserError("--quantize_compute_dtype does nothing without --quantize")
        return
    if args.lora_dim == 0:
        raise UserError("--quantize freezes the packed weights and trains LoRA; give it a rank, as in --lora_dim 16")
    if args.lora_module_name not in ("auto", "all-linear"):
        raise UserError(
            f"--lora_module_name {args.lora_module_name}: with --quantize all linear layers but the head are packed "
            "and adapted; leave the flag out"
        )
    if args.zero_stage == 3:
        raise UserError(
            "--quantize with --zero_stage 3: ZeRO-3 shards weights that are floating-point numbers, not packed codes; "
            "use --zero_stage 0, 1 or 2 (packed weights are small, and each rank keeps them whole)"
        )
    if args.trust_remote_code:
        raise UserError("--quantize with --trust_remote_code: a model with code of its own cannot be folded when saved")
    refuse_in_place("--quantize", args.model_name_or_path, args.output_dir)
    args.lora_module_name, args.only_optimize_lora = "all-linear", True
    args.quantize_compute_dtype = args.quantize_compute_dtype or args.dtype


def add_soft_prompt_arguments(parser) -> None:
    """A trained prompt in front of a frozen model (step 1)."""
    add = parser.add_argument_group("soft prompt (needs the package peft)").add_argument
    add(
        "--soft_prompt",
        choices=list(SOFT_PROMPT_LEARNING_RATES),
        default=None,
        help="freeze the model and train virtual tokens before every row, alone or through a small network; None: off",
    )
    add("--num_virtual_tokens", type=_positive, default=20, help="virtual tokens of the soft prompt")
    add(
        "--soft_prompt_init_text",
        default=None,
        help="prompt_tuning: text whose embeddings the virtual tokens start from; None for random tokens",
    )
    add(
        "--soft_prompt_hidden_size",
        type=_positive,
        default=None,
        help="p_tuning: width of its network; None for the width of the embedding",
    )
    add(
        "--soft_prompt_learning_rate",
        type=non_negative_float,
        default=None,
        help="peak learning rate of the soft prompt; None for "
        + ", ".join(f"{rate:g} ({kind})" for kind, rate in SOFT_PROMPT_LEARNING_RATES.items()),
    )


def check_soft_prompt(args) -> None:
    """Refuse combinations with --soft_prompt that cannot work; fill in its learning rate."""
    if args.soft_prompt is None:
        if args.soft_prompt_init_text is not None:
            raise UserError("--soft_prompt_init_text does nothing without --soft_prompt prompt_tuning")
        for flag in ("soft_prompt_learning_rate", "soft_prompt_hidden_size"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} does nothing without --soft_prompt")
        return
    refuse_in_place("--soft_prompt", args.model_name_or_path, args.output_dir)
    if importlib.util.find_spec("peft") is None:
        raise UserError("--soft_prompt needs the package peft: pip install peft")
    if args.lora_dim > 0:
        raise UserError(
            "--soft_prompt freezes the whole model, and --lora_dim would train layers of it: give one of both"
        )
    if args.packing:
        raise UserError(
            "--soft_prompt with --packing: a soft prompt stands before a row, and a block holds many; leave one"
        )
    if args.soft_prompt == "p_tuning" and args.soft_prompt_init_text is not None:
        raise UserError("--soft_prompt_init_text is for prompt_tuning: a network makes the virtual tokens of p_tuning")
    if args.soft_prompt == "prompt_tuning" and args.soft_prompt_hidden_size is not None:
        raise UserError("--soft_prompt_hidden_size is for p_tuning: prompt_tuning has no network")
    if args.soft_prompt_learning_rate is None:
        args.soft_prompt_learning_rate = SOFT_PROMPT_LEARNING_RATES[args.soft_prompt]


def add_run_arguments(parser, step: int) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--output_dir",
        default=None,
        help="where the model and metrics.jsonl go; None to save nothing",
    )
    add(
        "--max_shard_size",
        type=_size,
        default="5GB",
        help="largest file of saved weights, as in 500MB; a larger model becomes several files with an index",
    )
    add("--seed", type=_not_negative, default=1234, help="of data order, fresh weights, dropout and sampling")
    add(
        "--dry_run",
        action="store_true",
        help="check model, data and flags, estimate the memory against this machine's, and stop; off: train",
    )
    add(
        "--skip_nonfinite",
        type=_not_negative,
        default=0,
        help="optimizer steps with a loss or gradient that is not finite to leave out, without an update; 0 to stop at "
        "the first. What the loss scale of fp16 leaves out does not count",
    )
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    add(
        "--comm_timeout",
        type=_positive,
        default=COMM_TIMEOUT,
        help="seconds a rank waits for the others in a collective before the run ends with an error",
    )
    add("--log_interval", type=_positive, default=1, help="optimizer steps between throughput lines")
    add(
        "--report_to",
        nargs="*",
        choices=TRACKERS,
        default=[],
        help="where the numbers of metrics.jsonl go too: tensorboard, wandb, trackio (the last two are packages to "
        "install); nothing after it, or no flag: nowhere",
    )
    add("--run_name", default=None, help="of the run in wandb or trackio; None for the last part of --output_dir")
    add("--enable_tensorboard", action="store_true", help="the same as --report_to tensorboard")
    add("--tensorboard_path", default=f"step{step}_tensorboard", help="folder of the TensorBoard files")
    deepspeed.add_config_arguments(parser)
    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpoint_steps", type=_not_negative, default=0, help="steps between checkpoints of the run; 0 for none")
    add(
        "--checkpoint_dir",
        default=None,
        help="where they go, on storage that all nodes share; given alone: one when SIGTERM stops the run. None for "
        "checkpoints under --output_dir",
    )
    parser.set_defaults(checkpoint_dir_given=False)  # resolve_checkpoints settles it
    add("--keep_checkpoints", type=_positive, default=2, help="newest checkpoints that are kept")
    add(
        "--resume",
        metavar="{auto,PATH}",
        default=None,
        help="go on from a checkpoint: auto for the newest (none: a fresh start), or the folder of one; None for a "
        "fresh start",
    )


# Flags that say where a run writes and what it shows, not what it computes. A new flag is taken to shape the training
# until it is named here.
MAY_CHANGE_AT_RESUME = {
    *("output_dir", "max_shard_size", "save_lora_adapters", "checkpoint_steps", "checkpoint_dir", "keep_checkpoints"),
    *("resume", "checkpoint_dir_given", "skip_nonfinite", "log_interval", "report_to", "run_name", "comm_timeout"),
    *("enable_tensorboard", "tensorboard_path", "local_rank", "global_rank", "deepspeed", "deepspeed_config"),
    *("data_output_path", "rebuild_cache", "preprocessing_num_workers", "print_loss", "max_eval_samples"),
    *("per_device_eval_batch_size", "eval_interval", "eval_iters", "compute_fp32_loss", "num_padding_at_beginning"),
    *("print_answers", "print_answers_interval", "sample_interval", "samples_shown"),
    *("enable_test_mode", "test_stop_step", "dry_run"),
}


def resolve_checkpoints(args) -> None:
    """Settle --checkpoint_dir; refuse flags that do nothing."""
    args.checkpoint_dir_given = args.checkpoint_dir is not None
    if args.checkpoint_dir is None and args.output_dir is not None:
        args.checkpoint_dir = str(Path(args.output_dir) / "checkpoints")
    if args.checkpoint_dir is None and (args.checkpoint_steps or args.resume == "auto"):
        flag = "--checkpoint_steps" if args.checkpoint_steps else "--resume auto"
        raise UserError(f"{flag} needs a folder: give --checkpoint_dir or --output_dir")


def refuse_inside_data(args) -> None:
    """What a run writes into a folder of data, the next run would read as data."""
    for data in (Path(path) for path in args.data_path if Path(path).is_dir()):
        for name in ("data_output_path", "output_dir", "checkpoint_dir"):
            written = getattr(args, name)
            if written is not None and Path(written).resolve().is_relative_to(data.resolve()):
                raise UserError(f"--{name} {written} lies in --data_path {data}, so it would be read as data; move it")


def resolve_common(args) -> None:
    """Fill in what depends on the machine."""
    refuse_inside_data(args)
    check_output_dir(args.data_output_path, "--data_output_path")
    if args.add_eot_token and not args.eot_token.strip():
        raise UserError("--eot_token: a token that ends answers has letters or signs, and this one is blank")
    accelerator = get_accelerator()
    if args.dtype is None:
        args.dtype = "bf16" if accelerator.is_bf16_supported() else "fp32"
    if args.dtype == "fp16" and not accelerator.is_fp16_supported():
        raise UserError(f"--dtype fp16: {accelerator.device_name()} does not support it; use bf16 or fp32")
    if args.dtype == "bf16" and not accelerator.is_bf16_supported():
        raise UserError(f"--dtype bf16: {accelerator.device_name()} does not support it; use fp16 or fp32")
    if args.attn_implementation == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise UserError(
                "--attn_implementation flash_attention_2 needs a GPU and flash-attn (pip install flash-attn); "
                "sdpa needs neither"
            )
        if args.dtype == "fp32":
            raise UserError("--attn_implementation flash_attention_2 computes in fp16 or bf16, not in --dtype fp32")
    args.deepspeed_config_overrides = args.deepspeed_config_overrides or args.deepspeed_config
    args.end_of_conversation_token = args.eot_token if args.add_eot_token else None
    resolve_checkpoints(args)
    if args.enable_tensorboard and "tensorboard" not in args.report_to:
        args.report_to = ["tensorboard", *args.report_to]
    for name in args.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package {name}: pip install {name}")
    check_same_on_all_nodes({f"--{name}": value for name, value in vars(args).items() if not OF_A_NODE.search(name)})


def check_output_dir(output_dir: str | None, flag: str = "--output_dir") -> None:
    """Raise UserError if the folder cannot be made or written to, before any work is spent."""
    if output_dir is None:
        return
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_beside(folder / "write-test") as probe:
            probe.write_bytes(b"")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {output_dir}: cannot be written: {getattr(error, 'strerror', error)}") from error


def check_models(args, *names: str) -> None:
    """Refuse folders that hold adapters without their model."""
    from utils.model.soft_prompt import check_whole_model

    for name in names:
        if getattr(args, name) is not None:  # step 3 may do without a critic
            check_whole_model(getattr(args, name), f"--{name}")


def refuse_in_place(flag: str, base: str | None, folder) -> None:
    """What is saved needs the model it started from, which saving into its own folder would replace."""
    if (
        base is not None
        and folder is not None
        and Path(base).is_dir()
        and Path(base).resolve() == Path(folder).resolve()
    ):
        raise UserError(f"{flag} needs the model it starts from: let --output_dir be another folder than {base}")


def check_save_lora_adapters(args) -> None:
    if args.save_lora_adapters and args.output_dir is not None:
        for name, folders in (
            ("model_name_or_path", ("",)),
            ("actor_model_name_or_path", ("actor", "actor_ema")),
            ("critic_model_name_or_path", ("critic",)),
        ):
            for folder in folders:
                refuse_in_place("--save_lora_adapters", getattr(args, name, None), Path(args.output_dir) / folder)
    if args.save_lora_adapters and not args.only_optimize_lora:
        raise UserError(
            "--save_lora_adapters needs --only_optimize_lora: without it biases, norms and embeddings train too, and "
            "an adapter holds none of them"
        )


def check_supervised(args) -> None:
    """Refuse combinations of step 1 and 2 that cannot work, before anything is loaded."""
    check_models(args, "model_name_or_path")
    check_quantize(args)
    if args.only_optimize_lora and args.lora_dim == 0:
        raise UserError("--only_optimize_lora trains nothing without --lora_dim; give it a rank, as in --lora_dim 16")
    check_save_lora_adapters(args)
    if args.offload and args.zero_stage == 0:
        raise UserError("--offload moves what ZeRO manages to host memory; it needs --zero_stage 1, 2 or 3")
    args.zero_stage = working_stage(args.zero_stage, args.dtype, "--zero_stage")
    check_config_file(args, args.zero_stage)


def check_config_file(args, zero_stage: int) -> None:
    """Refuse a DeepSpeed configuration file that cannot work at this stage."""
    base = get_train_ds_config(args.offload and zero_stage > 0, args.dtype, zero_stage)
    config = merge_config_file(base, args.deepspeed_config_overrides)
    saves = args.checkpoint_steps or args.checkpoint_dir_given or args.resume
    if saves and offload_device(config, "offload_optimizer") == "nvme":
        raise UserError(
            f"--deepspeed_config_overrides {args.deepspeed_config_overrides}: offload_optimizer to nvme and "
            "checkpoints: DeepSpeed's do not bring weights and optimizer states back from there, and a resumed run "
            "would begin with the first weights. Offload to cpu (--offload), or leave out --checkpoint_steps, "
            "--checkpoint_dir and --resume"
        )


def working_stage(zero_stage: int, dtype: str, flag: str) -> int:
    """Stage 1 in place of 0 for 16-bit training, said aloud.

    DeepSpeed's stage 0 wrappers step wrongly with loss weights of our own: the fp16 one divides gradients by a loss
    scale that was never applied, the bf16 one ages Adam's bias correction before the first step. Stage 1 shards
    the optimizer over ranks and is the same arithmetic otherwise.
    """
    if zero_stage > 0 or dtype == "fp32":
        return zero_stage
    from utils.utils import print_rank_0

    print_rank_0(f"note: {flag} 0 runs as stage 1 in {dtype}: the same training, with the optimizer sharded over ranks")
    return 1


def add_num_padding_argument(group) -> None:
    group.add_argument(
        "--num_padding_at_beginning",
        type=int,
        default=1,
        help="accepted for old command lines and ignored: masks tell where a row begins and ends",
    )


def warn_num_padding(args) -> None:
    from utils.utils import print_rank_0

    if args.num_padding_at_beginning != 1:
        print_rank_0("note: --num_padding_at_beginning is ignored: masks tell where a row begins and ends")


def add_rlhf_arguments(parser) -> None:
    """Everything of step 3 beside data and run."""
    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--actor_model_name_or_path", required=True, help="the model of step 1: actor and reference start from it")
    add(
        "--critic_model_name_or_path",
        default=None,
        help="the reward model of step 2: reward and critic start from it; only --reward_model_weight 0 does without",
    )
    add(
        "--separate_ref",
        action="store_true",
        help="a reference of its own even under --only_optimize_lora, where the actor without its adapters is one",
    )
    add("--actor_dropout", type=_probability, default=None, help="dropout of the actor; None for 0, as PPO wants")
    add("--critic_dropout", type=_probability, default=None, help="dropout of the critic; None for 0")
    add_num_padding_argument(models)
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        default=None,
        help="not available in step 3: give it to step 1 and 2, which save whole models",
    )

    group = parser.add_argument_group("batches and optimisation")
    add = group.add_argument
    add("--per_device_generation_batch_size", type=_positive, default=16, help="answers sampled at a time per device")
    add(
        "--num_generations_per_prompt",
        type=_positive,
        default=1,
        help="answers to each prompt; the generation batch holds this many fewer prompts. rloo and grpo need 2 or more",
    )
    add(
        "--per_device_training_batch_size",
        type=_positive,
        default=16,
        help="answers per device and forward pass of an update",
    )
    add("--generation_batches", type=_positive, default=1, help="rounds of generation before each update")
    add("--ppo_epochs", type=_positive, default=1, help="passes over the answers of an update")
    add(
        "--gradient_accumulation_steps",
        type=_positive,
        default=1,
        help="forward passes per optimizer step; more rounds of generation are made where one does not fill them",
    )
    add(
        "--max_prompt_seq_len", type=_positive, default=256, help="tokens of a prompt; a longer one loses its beginning"
    )
    add("--max_answer_seq_len", type=_positive, default=256, help="tokens of an answer, its EOS included")
    add("--num_train_epochs", type=_positive, default=1, help="passes over the prompts")
    add("--actor_learning_rate", type=non_negative_float, default=9.65e-6, help="peak learning rate of the actor")
    add("--critic_learning_rate", type=non_negative_float, default=5e-6, help="peak learning rate of the critic")
    add(
        "--actor_weight_decay",
        type=non_negative_float,
        default=0.0,
        help="AdamW's decay of the actor's matrices; 0 to turn off",
    )
    add(
        "--critic_weight_decay",
        type=non_negative_float,
        default=0.0,
        help="AdamW's decay of the critic's matrices; 0 to turn off",
    )
    add_schedule_arguments(group, warmup=100)
    add = parser.add_argument_group("PPO").add_argument
    on_off = argparse.BooleanOptionalAction
    add(
        "--do_sample",
        action=on_off,
        default=True,
        help="rollouts are samples of the policy; --no-do_sample for greedy ones",
    )
    add("--temperature", type=non_negative_float, default=1.0, help="of sampling, and of all log-probs; 0 for greedy")
    add(
        "--top_p",
        type=_probability,
        default=1.0,
        help="sample from the smallest set of tokens with this probability; 1 for all",
    )
    add("--top_k", type=_not_negative, default=0, help="sample from this many tokens; 0 for all")
    add("--kl_ctl", type=non_negative_float, default=0.1, help="weight of the KL penalty per token; 0 to turn off")
    add(
        "--kl_estimator",
        choices=["k1", "k3"],
        default="k1",
        help="k1: log p - log q; k3: never negative, less variance",
    )
    add(
        "--kl_target",
        type=_above_zero,
        default=None,
        help="nats per answer the KL weight is steered to; None for a fixed weight",
    )
    add("--kl_horizon", type=_positive, default=10000, help="answers over which the KL weight adapts")
    add("--clip_reward_value", type=_above_zero, default=5.0, help="scores are clipped to plus or minus this")
    add("--normalize_reward", action="store_true", help="scale scores by the mean and std saved with the reward model")
    add(
        "--missing_eos_penalty",
        type=non_negative_float,
        default=None,
        help="taken off the score of an answer without EOS; None for nothing",
    )
    add("--gamma", type=_probability, default=1.0, help="discount per token; 1 for none")
    add("--lam", type=_probability, default=0.95, help="GAE's lambda: 0 trusts the critic, 1 the rewards")
    add(
        "--advantage_estimator",
        choices=["gae", "rloo", "grpo"],
        default="gae",
        help="gae: PPO with a critic. Without one, an answer against the others to its prompt: rloo, less their mean "
        "reward; grpo, less the group's mean and over its std, the KL penalty (k3) in the loss",
    )
    add(
        "--whiten_advantages",
        action=on_off,
        default=None,
        help="mean 0, std 1 over all ranks; None for on with gae (published scripts: off), off with rloo and grpo",
    )
    add("--cliprange", type=_above_zero, default=0.2, help="the policy's ratio is clipped to 1 plus or minus this")
    add(
        "--cliprange_value",
        type=_above_zero,
        default=0.2,
        help="the value is clipped to the old one plus or minus this",
    )
    add(
        "--reward_function",
        nargs="+",
        default=[],
        metavar="FILE.py:NAME[:WEIGHT]",
        help="functions of (prompts, answers) that give each answer a score, added to the reward model's; none for off",
    )
    add(
        "--reward_model_weight",
        type=_finite,
        default=1.0,
        help="how much the reward model's score counts beside --reward_function; 0 to do without the model",
    )
    add("--enable_ema", action="store_true", help="keep an fp32 moving average of the actor and save it too")
    add("--ema_decay", type=_probability, default=0.992, help="how much of the average stays at each applied step")

    add = parser.add_argument_group("unsupervised text (PPO-ptx)").add_argument
    add(
        "--unsupervised_dataset_name",
        default=None,
        help="plain text: .txt files, any file or folder of rows with a field text, or a hub dataset; None for off",
    )
    add("--unsupervised_dataset_config_name", default=None, help="configuration of that hub dataset")
    add("--unsup_coef", type=non_negative_float, default=27.8, help="weight of the language-model loss on that text")

    group = parser.add_argument_group("precision and memory")
    add = group.add_argument
    stages = dict(type=int, choices=[0, 1, 2, 3], default=0)
    add("--actor_zero_stage", **stages, help="ZeRO stage of the actor (and, at 3, of the reference and the EMA)")
    add("--critic_zero_stage", **stages, help="ZeRO stage of the critic (and, at 3, of the reward model)")
    add(
        "--offload",
        action="store_true",
        help="keep optimizer states (ZeRO-3: parameters too) of actor and critic on the host",
    )
    add("--offload_reference_model", action="store_true", help="keep the reference's weights in host memory, by ZeRO-3")
    add("--offload_reward_model", action="store_true", help="keep the reward model's weights in host memory, by ZeRO-3")
    add_dtype_argument(group)
    add(
        "--actor_gradient_checkpointing",
        action="store_true",
        help="recompute the actor's activations: less memory, slower",
    )
    add(
        "--critic_gradient_checkpointing",
        action="store_true",
        help="recompute the critic's activations: less memory, slower",
    )
    add("--align_overflow", action="store_true", help="fp16: actor and critic skip overflowing steps together")

    add = parser.add_argument_group("hybrid engine").add_argument
    add(
        "--enable_hybrid_engine",
        action="store_true",
        help="generate fast: ZeRO-3 weights gathered once, LoRA folded in, finished rows leave the batch (off: by "
        "generate() on the training engine as it is, under ZeRO-3 layer by layer for every token)",
    )
    add(
        "--hybrid_engine_backend",
        choices=["auto", "own", "transformers", "deepspeed"],
        default="auto",
        help="who generates: own (this project's loop), transformers (its generate()), deepspeed (its kernels, CUDA "
        "only); auto: own where its greedy tokens equal those of generate() on a check batch, else transformers",
    )
    add(
        "--compile_generation",
        action="store_true",
        help="compile the step that makes one token (torch.compile; CUDA graphs on a GPU), over a cache of the full "
        "length: a minute or more at the start; off: as it is",
    )
    add("--unpin_actor_parameters", action="store_true", help="gather layer by layer after all: slower, less memory")
    add("--release_inference_cache", action="store_true", help="give cached memory back after each generation phase")
    add("--inference_tp_size", type=_positive, default=1, help="tensor-parallel ranks in generation; only 1 so far")
    add(
        "--tp_gather_partition_size",
        type=_positive,
        default=8,
        help="layers gathered at a time with --inference_tp_size above 1",
    )
    add(
        "--enable_mixed_precision_lora",
        action="store_true",
        help="ZeRO++: quantised gathers of frozen weights (CUDA, ZeRO-3, LoRA)",
    )

    add_lora_arguments(parser, "actor_")
    add_lora_arguments(parser, "critic_")
    add = parser.add_argument_group("looking in and testing").add_argument
    add("--print_answers", action="store_true", help="print prompts and sampled answers of rank 0")
    add("--print_answers_interval", type=_positive, default=1, help="steps between printed answers")
    add(
        "--sample_interval",
        type=_not_negative,
        default=10,
        help="steps between tables of sampled answers (prompt, answer, score, KL), also in samples.jsonl; 0 for none",
    )
    add("--samples_shown", type=_positive, default=4, help="answers in such a table")
    add("--enable_test_mode", action="store_true", help="stop after --test_stop_step steps and save")
    add("--test_stop_step", type=_not_negative, default=0, help="steps of test mode")


@dataclass(frozen=True)
class RLHFBatchSizes:
    """The batch arithmetic of step 3, per device."""

    generation_batch: int  # answers sampled at a time
    rounds: int  # rounds of generation before each update
    micro_batch: int  # answers per forward pass of an update
    accumulation: int  # forward passes per optimizer step
    answers_per_prompt: int = 1

    @property
    def prompts_per_round(self) -> int:
        return self.generation_batch // self.answers_per_prompt

    @property
    def rows_per_update(self) -> int:
        return self.generation_batch * self.rounds

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps in one pass over the answers of an update."""
        return self.rows_per_update // (self.micro_batch * self.accumulation)

    def explain(self) -> str:
        prompts = f", {self.answers_per_prompt} to each prompt" if self.answers_per_prompt > 1 else ""
        return (
            f"batch per device: {self.rounds} x {self.generation_batch} answers generated{prompts} "
            f"= {self.rows_per_update} per update = {self.steps_per_pass} optimizer steps "
            f"x {self.accumulation} forward passes x {self.micro_batch} answers"
        )


def check_rlhf(args) -> RLHFBatchSizes:
    """Refuse combinations of step 3 that cannot work, with the arithmetic, before anything is loaded."""
    check_models(args, "actor_model_name_or_path", "critic_model_name_or_path")
    generation, micro = args.per_device_generation_batch_size, args.per_device_training_batch_size
    accumulation, rounds = args.gradient_accumulation_steps, args.generation_batches
    if (generation * rounds) % micro:
        raise UserError(
            f"--per_device_generation_batch_size {generation} x --generation_batches {rounds} = {generation * rounds} "
            f"answers do not divide into --per_device_training_batch_size {micro}"
        )
    passes = generation * rounds // micro
    if accumulation > passes:
        # The policy does not move before an optimizer step, so more rounds first is the same as accumulating over
        # updates.
        if accumulation % passes:
            raise UserError(
                f"--gradient_accumulation_steps {accumulation} is no multiple of the {passes} forward passes that "
                f"{generation} x {rounds} answers in micro-batches of {micro} make"
            )
        rounds *= accumulation // passes
    elif passes % accumulation:
        raise UserError(
            f"{generation} x {rounds} answers in micro-batches of {micro} make {passes} forward passes, "
            f"which do not divide by --gradient_accumulation_steps {accumulation}"
        )
    if args.only_optimize_lora and args.actor_lora_dim == 0 and args.critic_lora_dim == 0:
        raise UserError("--only_optimize_lora trains nothing without --actor_lora_dim or --critic_lora_dim")
    check_save_lora_adapters(args)
    for flag in ("actor_zero_stage", "critic_zero_stage"):
        setattr(args, flag, working_stage(getattr(args, flag), args.dtype, f"--{flag}"))
    if args.offload and args.actor_zero_stage == args.critic_zero_stage == 0:
        raise UserError(
            "--offload moves what ZeRO manages to host memory; it needs --actor_zero_stage or "
            "--critic_zero_stage 1, 2 or 3"
        )
    if args.unpin_actor_parameters and not args.enable_hybrid_engine:
        raise UserError("--unpin_actor_parameters says how --enable_hybrid_engine gathers; it does nothing without it")
    if args.hybrid_engine_backend != "auto" and not args.enable_hybrid_engine:
        raise UserError(
            f"--hybrid_engine_backend {args.hybrid_engine_backend} says how --enable_hybrid_engine generates; without "
            "it generate() does"
        )
    if args.compile_generation and (
        not args.enable_hybrid_engine
        or args.hybrid_engine_backend in ("transformers", "deepspeed")
        or (args.unpin_actor_parameters and args.actor_zero_stage == 3)
    ):
        raise UserError(
            "--compile_generation compiles the loop of --enable_hybrid_engine (backend auto or own), "
            "over whole weights (no --unpin_actor_parameters)"
        )
    if args.hybrid_engine_backend == "deepspeed" and get_accelerator().device_name() != "cuda":
        raise UserError(
            "--hybrid_engine_backend deepspeed: DeepSpeed's generation kernels need CUDA, and this machine computes "
            f"on {get_accelerator().device_name()}; use auto"
        )
    if args.quantize is not None:
        raise UserError(
            "--quantize is not available in step 3: for generation LoRA is folded into the weights, which packed codes "
            "cannot take. Give it to step 1 and 2, whose models are whole; --actor_lora_dim with --only_optimize_lora "
            "and --actor_zero_stage 3 save memory here"
        )
    if args.inference_tp_size > 1:
        raise UserError(
            "--inference_tp_size above 1 is not available: each rank generates with the whole gathered model"
        )
    if args.align_overflow and args.dtype == "fp32":
        raise UserError("--align_overflow: fp32 gradients do not overflow, and no step is skipped for it")
    if args.align_overflow and args.dtype == "bf16" and 3 in (args.actor_zero_stage, args.critic_zero_stage):
        raise UserError("--align_overflow: DeepSpeed's ZeRO-3 looks for overflows in fp16 alone, before the step")
    if args.enable_mixed_precision_lora:
        if get_accelerator().device_name() != "cuda":
            raise UserError("--enable_mixed_precision_lora: ZeRO++'s quantised gathers need CUDA")
        if args.actor_zero_stage != 3 or args.actor_lora_dim == 0:
            raise UserError("--enable_mixed_precision_lora needs --actor_zero_stage 3 and --actor_lora_dim above 0")
        if args.enable_ema:
            raise UserError(
                "--enable_mixed_precision_lora keeps frozen weights quantised: --enable_ema cannot average them"
            )
    for stage in (args.actor_zero_stage, args.critic_zero_stage):
        check_config_file(args, stage)
    if args.do_sample and args.top_p == 0:
        raise UserError("--top_p 0 leaves no token to sample from; 1 samples from all")
    if args.enable_test_mode and args.test_stop_step < 1:
        raise UserError("--enable_test_mode needs --test_stop_step 1 or more")
    _check_rewards(args)
    return RLHFBatchSizes(generation, rounds, micro, accumulation, args.num_generations_per_prompt)


def _check_rewards(args) -> None:
    """What scores an answer, what an advantage is, and which models that takes; settles the flags that depend on it."""
    estimator, answers = args.advantage_estimator, args.num_generations_per_prompt
    if args.per_device_generation_batch_size % answers:
        raise UserError(
            f"--per_device_generation_batch_size {args.per_device_generation_batch_size} answers do not divide into "
            f"--num_generations_per_prompt {answers}"
        )
    if args.whiten_advantages is None:
        args.whiten_advantages = estimator == "gae"
    if estimator != "gae":
        if answers < 2:
            raise UserError(
                f"--advantage_estimator {estimator} compares the answers to one prompt: --num_generations_per_prompt "
                "must be 2 or more"
            )
        if args.critic_lora_dim or args.align_overflow:
            raise UserError(
                f"--advantage_estimator {estimator} has no critic: leave out --critic_lora_dim, --align_overflow"
            )
    if args.reward_model_weight == 0:
        if not args.reward_function:
            raise UserError("--reward_model_weight 0 leaves nothing that scores: give a --reward_function")
        if args.normalize_reward:
            raise UserError(
                "--normalize_reward scales the reward model's scores, which --reward_model_weight 0 leaves out"
            )
    needs_model = args.reward_model_weight != 0 or estimator == "gae"
    if needs_model and args.critic_model_name_or_path is None:
        raise UserError(
            "--critic_model_name_or_path is needed: the reward model and, with gae, the critic start from it. "
            "--reward_model_weight 0 with --advantage_estimator rloo or grpo does without"
        )
    if not needs_model:
        args.critic_model_name_or_path = None
    if args.reward_model_weight == 0 and args.offload_reward_model:
        raise UserError("--offload_reward_model: --reward_model_weight 0 leaves the reward model out")
    if args.offload and estimator != "gae" and args.actor_zero_stage == 0:
        raise UserError(f"--offload: {estimator} trains the actor alone, and that needs --actor_zero_stage 1, 2 or 3")
    if not (args.only_optimize_lora and args.actor_lora_dim):
        args.separate_ref = True
    elif args.offload_reference_model and not args.separate_ref:
        raise UserError(
            "--offload_reference_model: under --only_optimize_lora the actor without its adapters is the reference; "
            "add --separate_ref for one of its own"
        )
