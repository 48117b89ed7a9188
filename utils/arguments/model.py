"""Flags of models and their training in steps 1 and 2: precision, ZeRO, LoRA, quantisation, soft prompts."""

import argparse
import importlib.util

from deepspeed.accelerator import get_accelerator
from transformers import SchedulerType

from utils.arguments.data import add_sequence_length_argument
from utils.arguments.kinds import (
    above_zero,
    non_negative_float,
    not_negative,
    positive,
    probability,
)
from utils.ds_utils import get_train_ds_config, merge_config_file, offload_device
from utils.model.soft_prompt import check_whole_model
from utils.process.console import print_rank_0
from utils.process.errors import UserError

QUANTIZATIONS = ("nf4", "int8")
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
WARMUP_RATIO = 0.1  # AdamW's first steps have the full size of the rate, whatever the gradient: they come at a low one
SOFT_PROMPT_LEARNING_RATES = {"prompt_tuning": 1e-2, "p_tuning": 1e-4}


def add_dtype_argument(parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["fp16", "bf16", "fp32"],
        default=None,
        help="training precision; None for bf16 where the hardware itself has it, else fp16 on GPUs and fp32 on CPUs "
        "(published scripts: fp16)",
    )
    parser.add_argument(
        "--grad_accum_dtype",
        choices=["bf16", "fp16", "fp32"],
        default=None,
        help="precision in which the gradients of micro-batches are summed; fp32 keeps small ones that bf16 rounds "
        "away over many micro-batches, for 2 bytes more per trained weight; None for that of --dtype",
    )
    parser.add_argument(
        "--attn_implementation",
        choices=["sdpa", "eager", "flash_attention_2"],
        default=None,
        help="attention kernels; flash_attention_2 needs the package flash-attn; None for the model's default",
    )
    parser.add_argument(
        "--deepspeed_config_overrides",
        metavar="FILE",
        default=None,
        help="JSON file merged into the DeepSpeed configuration of the trained engines, as --deepspeed_config is too",
    )
    parser.add_argument(
        "--compute_fp32_loss",
        action="store_true",
        help="accepted for old command lines: the loss is always computed in fp32 here",
    )


def add_supervised_arguments(parser, learning_rate: float, rate_help: str, dropout: float | None = None) -> None:
    """Model, optimisation, DeepSpeed and LoRA of the steps that train one model.

    Args:
        rate_help: of --learning_rate, what else there is to know of it.
    """
    group = parser.add_argument_group("model and optimisation")
    add = group.add_argument
    add("--model_name_or_path", required=True, help="folder or hub name of the model to start from")
    add("--per_device_train_batch_size", type=positive, default=16, help="rows per device and forward pass")
    add("--per_device_eval_batch_size", type=positive, default=16, help="rows per device in evaluation")
    add_sequence_length_argument(group)
    add("--learning_rate", type=non_negative_float, default=learning_rate, help=f"peak learning rate; {rate_help}")
    add("--weight_decay", type=non_negative_float, default=0.0, help="AdamW's decay of matrices; 0 to turn off")
    add("--num_train_epochs", type=positive, default=1, help="passes over the training rows")
    add("--gradient_accumulation_steps", type=positive, default=1, help="forward passes per optimizer step")
    add_schedule_arguments(group)
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
    add("--dropout", type=probability, default=dropout, help="every dropout probability of the model; None for its own")
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


def scheduler(name: str) -> SchedulerType | str:
    """A name of none stays text, for which the choices are listed."""
    return SchedulerType(name) if name in SCHEDULERS else name


def add_schedule_arguments(group) -> None:
    """The shape of the learning rate over a run."""
    group.add_argument(
        "--lr_scheduler_type",
        type=scheduler,
        default=SchedulerType.COSINE,
        choices=[SchedulerType(name) for name in SCHEDULERS],
        metavar="NAME",
        help="schedule of the learning rate: linear, cosine, cosine_with_restarts, polynomial, constant, "
        "constant_with_warmup",
    )
    one_of_both = group.add_mutually_exclusive_group()
    one_of_both.add_argument(
        "--num_warmup_steps",
        type=not_negative,
        default=None,
        help="optimizer steps of rising learning rate; None for --warmup_ratio",
    )
    one_of_both.add_argument(
        "--warmup_ratio",
        type=probability,
        default=WARMUP_RATIO,
        help="warmup as a share of the run's optimizer steps, where --num_warmup_steps is not given; 0 for no warmup",
    )


def add_lora_arguments(parser, prefix: str = "") -> None:
    """LoRA of one model; step 3 calls this for ``actor_`` and ``critic_``."""
    whose = f"of the {prefix.rstrip('_')} " if prefix else ""
    group = parser.add_argument_group(f"LoRA {whose}".strip())
    add = group.add_argument
    add(
        f"--{prefix}lora_dim",
        type=not_negative,
        default=0,
        help="rank of LoRA; 0 to train the full weights",
    )
    add(
        f"--{prefix}lora_module_name",
        default="auto",
        help="part of the names of layers to adapt, as in decoder.layers. (published); auto for all linear layers of "
        "the blocks; all-linear for every one but the output head",
    )
    add(
        f"--{prefix}lora_scaling",
        type=above_zero,
        default=1.0,
        help=f"PEFT's lora_alpha: the update is multiplied by this / --{prefix}lora_dim; 1 as published, and twice "
        "the rank as PEFT users often take it (with a learning rate to match)",
    )
    add(
        f"--{prefix}lora_dropout",
        type=probability,
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
            help="freeze everything but the LoRA factors (and a reward model's value head) in each model that has LoRA",
        )
        add(
            "--save_lora_adapters",
            action="store_true",
            help="also save the LoRA factors by themselves, in PEFT's format, in the folder adapter beside the model; "
            "needs --only_optimize_lora",
        )


def add_quantize_arguments(parser) -> None:
    """QLoRA of step 1 and 2."""
    add = parser.add_argument_group("QLoRA (nf4 and the paged optimizer need the package bitsandbytes)").add_argument
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        default=None,
        help="quantise the frozen weights of all linear layers but the head to 4 or 8 bits; needs --lora_dim; None: "
        "off",
    )
    add(
        "--quantize_double",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="nf4: quantise the scales of its blocks too (double quantisation), 0.37 bits less per weight",
    )
    add(
        "--quantize_compute_dtype",
        choices=["fp16", "bf16", "fp32"],
        default=None,
        help="precision of products with quantised weights; None for --dtype",
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
    args.lora_module_name, args.only_optimize_lora = "all-linear", True
    args.quantize_compute_dtype = args.quantize_compute_dtype or args.dtype


def add_soft_prompt_arguments(parser) -> None:
    """A trained prompt in front of a frozen model (step 1)."""
    add = parser.add_argument_group("soft prompt (needs the package peft)").add_argument
    add(
        "--soft_prompt",
        choices=list(SOFT_PROMPT_LEARNING_RATES),
        default=None,
        help="freeze the model and train virtual tokens in front of every row: directly (prompt_tuning) or through a "
        "small network (p_tuning); None: off",
    )
    add("--num_virtual_tokens", type=positive, default=20, help="number of virtual tokens of the soft prompt")
    add(
        "--soft_prompt_init_text",
        default=None,
        help="prompt_tuning: text whose embeddings the virtual tokens start from; None for random tokens",
    )
    add(
        "--soft_prompt_hidden_size",
        type=positive,
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


def check_models(args, *names: str) -> None:
    """Refuse folders that hold adapters without their model."""
    for name in names:
        if getattr(args, name) is not None:  # step 3 may do without a critic
            check_whole_model(getattr(args, name), f"--{name}")


def check_save_lora_adapters(args) -> None:
    """Refuse --save_lora_adapters where adapters alone would not bring the training back."""
    if not args.save_lora_adapters:
        return
    if not args.only_optimize_lora:
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
    check_grad_accum_dtype(args)
    args.zero_stage = working_stage(args.zero_stage, args, "--zero_stage")
    check_config_file(args, args.zero_stage)


def check_config_file(args, zero_stage: int) -> None:
    """Refuse a DeepSpeed configuration file that cannot work at this stage."""
    base = get_train_ds_config(
        args.offload and zero_stage > 0, args.dtype, zero_stage, grad_accum_dtype=args.grad_accum_dtype
    )
    config = merge_config_file(base, args.deepspeed_config_overrides)
    saves = args.checkpoint_steps or args.checkpoint_dir or args.resume
    if saves and offload_device(config, "offload_optimizer") == "nvme":
        raise UserError(
            f"--deepspeed_config_overrides {args.deepspeed_config_overrides}: offload_optimizer to nvme and "
            "checkpoints: DeepSpeed's do not bring weights and optimizer states back from there, and a resumed run "
            "would begin with the first weights. Offload to cpu (--offload), or leave out --checkpoint_steps, "
            "--checkpoint_dir and --resume"
        )


def check_grad_accum_dtype(args) -> None:
    """Refuse sums of gradients in a precision that DeepSpeed does not add this one's up in."""
    if args.grad_accum_dtype in (None, args.dtype) or (args.dtype, args.grad_accum_dtype) == ("bf16", "fp32"):
        return
    if args.dtype == "fp16":
        reason = "the loss scale of fp16 keeps small gradients, and DeepSpeed looks for overflows in fp16 alone"
    else:
        reason = f"sums would lose what gradients in {args.dtype} have"
    raise UserError(
        f"--grad_accum_dtype {args.grad_accum_dtype} with --dtype {args.dtype}: {reason}; leave it out, or train in "
        "bf16 with --grad_accum_dtype fp32"
    )


def working_stage(zero_stage: int, args, flag: str) -> int:
    """The stage that is run in place of one that DeepSpeed steps wrongly or otherwise at; said aloud.

    DeepSpeed's stage 0 wrappers step wrongly with loss weights of our own in 16 bits: the fp16 one divides gradients by
    a loss scale that was never applied, the bf16 one ages Adam's bias correction before the first step. Stage 1 shards
    the optimizer over ranks and is the same arithmetic otherwise. With gradients of bf16 added up in fp32 it is run by
    that bf16 wrapper, too, and stage 2, which shards these sums as well, is not.
    """
    sums_in_fp32 = args.dtype == "bf16" and args.grad_accum_dtype == "fp32"
    works = 0 if args.dtype == "fp32" else 2 if sums_in_fp32 else 1
    if zero_stage >= works:
        return zero_stage
    what = "the optimizer and the sums of gradients" if sums_in_fp32 else "the optimizer"
    how = f"{args.dtype} with --grad_accum_dtype fp32" if sums_in_fp32 else args.dtype
    print_rank_0(
        f"note: {flag} {zero_stage} runs as stage {works} in {how}: the same training, with {what} sharded over ranks"
    )
    return works


def add_num_padding_argument(group) -> None:
    group.add_argument(
        "--num_padding_at_beginning",
        type=int,
        default=1,
        help="accepted for old command lines and ignored: masks tell where a row begins and ends",
    )


def warn_num_padding(args) -> None:
    """Say that the flag of steps 2 and 3 is read no more, to whoever gives it."""
    if args.num_padding_at_beginning != 1:
        print_rank_0("note: --num_padding_at_beginning is ignored: masks tell where a row begins and ends")
