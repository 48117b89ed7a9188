"""Flags of a run: output, checkpoints, trackers; what depends on the machine."""

import difflib
import importlib.util
import re
from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator
from transformers.utils import is_flash_attn_2_available

from utils.arguments.data import check_data, settle_format
from utils.arguments.kinds import not_negative, positive, size
from utils.arguments.step_names import NAMES, Step
from utils.precision import default_dtype, warning_of
from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.files import METRICS_FILE, check_output_dir, model_folders, results_in
from utils.process.launch import COMM_TIMEOUT
from utils.process.operators import check_compiler
from utils.process.ranks import check_same_on_all_nodes
from utils.process.world import is_rank_0

# Flags whose values may differ between nodes: where things lie there.
OF_A_NODE = re.compile("rank|path|_dir|resume|deepspeed_config|data_config|reward_function|dataset_name|num_workers")


TRACKERS = ("tensorboard", "wandb", "trackio")


def add_run_arguments(parser, step: Step) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--output_dir",
        default=None,
        help="folder for the model and metrics.jsonl, of this run alone; None to save nothing",
    )
    add(
        "--overwrite_output_dir",
        action="store_true",
        help="replace what an earlier run left in --output_dir: its models, checkpoints and metrics (no other file) "
        "are removed when this run writes its first row; off: such a folder is refused, unless --resume is given",
    )
    add(
        "--max_shard_size",
        type=size,
        default="5GB",
        help="largest file of saved weights, as in 500MB; a larger model becomes several files with an index",
    )
    add("--seed", type=not_negative, default=1234, help="seed of data order, fresh weights, dropout and sampling")
    add(
        "--dry_run",
        action="store_true",
        help="check model, data and flags, estimate the memory against this machine's, and stop; off: train",
    )
    add(
        "--skip_nonfinite",
        type=not_negative,
        default=0,
        help="how many optimizer steps with a non-finite loss or gradient may be skipped, without an update; 0 to stop "
        "at the first. Overflows that the loss scale of fp16 handles do not count",
    )
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    add(
        "--comm_timeout",
        type=positive,
        default=COMM_TIMEOUT,
        help="seconds a rank waits for the others in a collective before the run ends with an error",
    )
    add("--log_interval", type=positive, default=1, help="optimizer steps (step 3: updates) between lines of figures")
    add(
        "--report_to",
        nargs="*",
        choices=TRACKERS,
        default=[],
        help="trackers that also get the numbers of metrics.jsonl (wandb and trackio are packages to install); none: "
        "no tracker",
    )
    add("--run_name", default=None, help="name of the run in wandb or trackio; None for the last part of --output_dir")
    add("--enable_tensorboard", action="store_true", help="the same as --report_to tensorboard")
    add("--tensorboard_path", default=f"{NAMES[step]}_tensorboard", help="folder of the TensorBoard files")
    deepspeed.add_config_arguments(parser)
    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpoint_steps", type=not_negative, default=0, help="steps between checkpoints of the run; 0 for none")
    add(
        "--checkpoint_dir",
        default=None,
        help="folder of the checkpoints, on storage that all nodes share; without --checkpoint_steps: for the one that "
        "SIGTERM or Ctrl-C leaves. None for checkpoints under --output_dir",
    )
    add("--keep_checkpoints", type=positive, default=2, help="how many of the newest checkpoints are kept")
    add(
        "--async_checkpoint",
        action="store_true",
        help="write checkpoints while training goes on: training waits only for a copy in host memory (as large as "
        "what a rank saves), which a thread writes; the checkpoint counts once all of it is on the disk. off: "
        "training waits for the disk",
    )
    add(
        "--resume",
        metavar="{auto,PATH}",
        default=None,
        help="continue from a checkpoint: auto for the newest (a fresh start where there is none), or the folder of "
        "one; None for a fresh start. The number of ranks and the ZeRO stage may differ from the checkpoint's",
    )
    add(
        "--resume_weights_only",
        action="store_true",
        help="take only the weights from the checkpoint that --resume PATH names, for a new run with any flags, whose "
        "optimizer, schedule, data order and metrics begin anew; off: continue with all of it",
    )
    add(
        "--allow_changed",
        type=flag_names,
        default=[],
        metavar="NAME,NAME",
        help="flags that may differ from the checkpoint's, as in learning_rate,num_train_epochs: the new values hold "
        "from the next step on, and the schedule of the learning rate is computed for the new length. Flags that "
        "shape the model, the rows or their order cannot differ; none: any difference is refused",
    )


def flag_names(text: str) -> list[str]:
    """Names of flags, with or without their dashes, between commas."""
    return [part.strip().lstrip("-") for part in text.split(",") if part.strip()]


# What a run cannot go on without: the model, and the rows in their order.
MUST_STAY = re.compile(
    r"(actor_|critic_)?(model_name_or_path|lora_dim|lora_module_name)|seed|dtype|grad_accum_dtype|quantize\w*|soft_prompt"
    r"|num_virtual_tokens|soft_prompt_hidden_size|only_optimize_lora|paged_optimizer|offload|enable_ema"
    r"|advantage_estimator|data_\w*|dataset_\w*|sft_only_data_path|max_train_samples|group_by_length|packing"
    r"|per_device_train_batch_size|per_device_training_batch_size|per_device_generation_batch_size|generation_batches"
    r"|gradient_accumulation_steps|num_generations_per_prompt|ppo_epochs|unsupervised_dataset\w*|max_\w*seq_len"
)
# Flags that say where a run writes and what it shows, not what it computes. A new flag is taken to shape the training
# until it is named here.
MAY_CHANGE_AT_RESUME = {
    *("output_dir", "overwrite_output_dir", "max_shard_size", "save_lora_adapters"),
    *("checkpoint_steps", "checkpoint_dir", "keep_checkpoints", "async_checkpoint"),
    *("resume", "resume_weights_only", "allow_changed"),
    *("skip_nonfinite", "log_interval", "report_to", "run_name", "comm_timeout", "enable_tensorboard"),
    *("tensorboard_path", "local_rank", "deepspeed", "deepspeed_config"),
    *("data_output_path", "rebuild_cache", "preprocessing_num_workers", "print_loss", "max_eval_samples"),
    *("per_device_eval_batch_size", "eval_interval", "eval_iters", "compute_fp32_loss", "num_padding_at_beginning"),
    "offload_reference_model",
    *("print_answers", "print_answers_interval", "sample_interval", "samples_shown"),
    *("enable_test_mode", "test_stop_step", "dry_run"),
    *("console", "eval_prompts", "save_best", "early_stopping_patience", "save_interval", "save_total_limit"),
    "skip_initial_evaluation",
}


def check_checkpoints(args) -> None:
    """Refuse checkpoints without a folder to write them to or to find them in."""
    has_folder = args.checkpoint_dir is not None or args.output_dir is not None
    if not has_folder and (args.checkpoint_steps or args.resume == "auto"):
        flag = "--checkpoint_steps" if args.checkpoint_steps else "--resume auto"
        raise UserError(f"{flag} needs a folder: give --checkpoint_dir or --output_dir")
    if args.async_checkpoint and not args.checkpoint_steps:
        raise UserError("--async_checkpoint needs regular checkpoints: --checkpoint_steps N")
    if args.resume_weights_only and args.resume in (None, "auto"):
        raise UserError("--resume_weights_only needs the folder of a checkpoint: --resume PATH")
    if args.allow_changed and (args.resume is None or args.resume_weights_only):
        reason = "any flag may differ with --resume_weights_only" if args.resume else "there is no --resume"
        raise UserError(f"--allow_changed {','.join(args.allow_changed)}: {reason}; leave it out")
    for name in args.allow_changed:
        if name not in vars(args):
            similar = difflib.get_close_matches(name, vars(args), n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise UserError(f"--allow_changed {name}: this step has no flag --{name}{hint}")
        if MUST_STAY.fullmatch(name):
            raise UserError(
                f"--allow_changed {name}: the model, the rows or their order depend on it, so that nothing could go "
                "on; --resume PATH --resume_weights_only starts a run of its own from the weights"
            )


def _settle_dtype(args, device_type: str) -> None:
    if args.dtype is None:
        args.dtype, reason = default_dtype(device_type)
        print_rank_0(f"training in {args.dtype}: {reason} (--dtype)")
    elif is_rank_0() and (warning := warning_of(args.dtype, device_type)) is not None:
        print_rank_0(f"WARNING: {warning}")


STARTS = ("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")


def check_output(args) -> None:
    """Refuse an output folder in which something would be lost; nothing is written.

    Raises:
        UserError: a model that the run starts from would be replaced, or the results of an earlier run.
    """
    if args.output_dir is None:
        return
    output = Path(args.output_dir).resolve()
    for name in STARTS:
        start = getattr(args, name, None)
        if start is None or not (Path(start) / "config.json").is_file():
            continue
        folder = Path(start).resolve()
        if output.is_relative_to(folder) or folder in model_folders(output):
            raise UserError(
                f"--output_dir {args.output_dir} would write into {start}, the model of --{name} that the run starts "
                "from: name another folder"
            )
    goes_on = args.resume and not args.resume_weights_only
    if not (args.overwrite_output_dir or goes_on) and (found := results_in(args.output_dir)):
        raise UserError(
            f"--output_dir {args.output_dir} holds {' and '.join(found)}: name another folder, replace that with "
            "--overwrite_output_dir, or go on with an earlier run by --resume"
        )


def nothing_saved(args) -> str | None:
    """What a run without --output_dir says of itself."""
    if args.output_dir is not None:
        return None
    what = "nothing is saved" if args.checkpoint_dir is None else "nothing but checkpoints is saved"
    return f"{what}: no --output_dir, the folder for the model and {METRICS_FILE}"


def settle_common(args) -> None:
    """Fill in, and check, what depends on the machine."""
    check_data(args)
    settle_format(args)
    check_output_dir(args.data_output_path, "--data_output_path")
    if args.add_eot_token and not args.eot_token.strip():
        raise UserError("--eot_token: a token that ends answers has letters or signs, and this one is blank")
    accelerator = get_accelerator()
    _settle_dtype(args, accelerator.device_name())
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
    check_checkpoints(args)
    if args.offload:
        check_compiler("--offload", "DeepSpeed's cpu_adam", "cpu_adam")
    if getattr(args, "compile_generation", False):
        check_compiler("--compile_generation", "the step that makes one token")
    if args.enable_tensorboard and "tensorboard" not in args.report_to:
        args.report_to = ["tensorboard", *args.report_to]
    for name in args.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package {name}: pip install {name}")
    check_same_on_all_nodes({f"--{name}": value for name, value in vars(args).items() if not OF_A_NODE.search(name)})
