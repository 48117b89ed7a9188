"""From the flags of a step to its DeepSpeed engines: the one place where they are built.

    configuration -> model (loaded under it: ZeRO-3 partitions weights as they are read) -> LoRA, packed weights,
    checkpointing -> parameter groups -> optimizer -> schedule -> engine

Steps 1 and 2 and DPO train one engine and their flags name no role; step 3 trains "actor" and "critic", whose flags do.
"""

from deepspeed.runtime.engine import DeepSpeedEngine
from transformers import get_scheduler

from utils.arguments import end_token, warmup_note, warmup_steps
from utils.data.prompt_format import CHAT_TEMPLATE
from utils.ds_utils import (
    TORCH_DTYPES,
    get_eval_ds_config,
    get_train_ds_config,
    initialize,
    merge_config_file,
    offloads_optimizer,
    with_batch_sizes,
)
from utils.engine.optimizer import get_optimizer_grouped_parameters, make_optimizer
from utils.model.model_utils import adapt_model, packing_of
from utils.model.tokenizer import load_hf_tokenizer, use_template
from utils.process.console import print_rank_0


def flag_of(args, role: str, name: str):
    """The value of a flag that each trained model has; that of role "actor" is called ``actor_NAME``."""
    return getattr(args, f"{role}_{name}" if role else name)


def load_tokenizer(args, model_name_or_path):
    """A model's tokenizer, with the end token and the chat template that the run's flags ask for."""
    tokenizer = load_hf_tokenizer(
        model_name_or_path, add_special_tokens=end_token(args), trust_remote_code=args.trust_remote_code
    )
    if args.prompt_format == CHAT_TEMPLATE:
        use_template(tokenizer, args.chat_template if isinstance(args.chat_template, str) else None)
    return tokenizer


def train_config(args, role: str = "", **options) -> dict:
    """DeepSpeed's configuration of a trained engine, with the user's own file laid over it.

    Args:
        options: more of ``get_train_ds_config``.
    """
    stage = flag_of(args, role, "zero_stage")
    options["grad_accum_dtype"] = args.grad_accum_dtype
    config = get_train_ds_config(args.offload and stage > 0, args.dtype, stage, **options)
    config = merge_config_file(config, args.deepspeed_config_overrides)
    micro_batch = args.per_device_training_batch_size if role else args.per_device_train_batch_size
    return with_batch_sizes(config, micro_batch, args.gradient_accumulation_steps)


def frozen_config(args, trained_stage: int, offload: bool = False, dtype: str | None = None) -> dict:
    """DeepSpeed's configuration of an engine that is not trained, beside one that is.

    Without an optimizer only ZeRO-3 shards anything, and only ZeRO-3 can keep weights in host memory.
    """
    stage = 3 if trained_stage == 3 or offload else 0
    config = get_eval_ds_config(offload, dtype or args.dtype, stage)
    return with_batch_sizes(config, 1)  # DeepSpeed asks for one; without an optimizer it means nothing


def model_options(args, dropout: float | None = None, dtype: str | None = None) -> dict:
    """What every model of a run is loaded with; keyword arguments of ``create_hf_model``."""
    return dict(
        dropout=dropout,
        dtype=TORCH_DTYPES[dtype or args.dtype],
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def trained_engine(
    model, args, config: dict, total_steps: int, role: str = "", learning_rate: float | None = None, keep_trainable=()
) -> DeepSpeedEngine:
    """The engine that trains a model as the flags of its role say, with its optimizer and learning-rate schedule.

    Args:
        model: made under ``config``.
        total_steps: optimizer steps of the whole run, over which the schedule runs.
        learning_rate: None for that of the role's flag.
        keep_trainable: parts of names of weights that train beside LoRA under --only_optimize_lora.
    """
    adapt_model(
        model,
        args,
        f"{role}_" if role else "",
        flag_of(args, role, "gradient_checkpointing"),
        keep_trainable,
        packing_of(args),
    )
    groups = get_optimizer_grouped_parameters(
        model, flag_of(args, role, "weight_decay"), flag_of(args, role, "lora_learning_rate")
    )
    if learning_rate is None:
        learning_rate = flag_of(args, role, "learning_rate")
    paged = not role and args.paged_optimizer  # a flag of steps 1 and 2
    optimizer = make_optimizer(groups, learning_rate, offloads_optimizer(config), paged=paged)
    if role != "critic" and (note := warmup_note(args, total_steps)):  # once in step 3
        print_rank_0(note)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps(args, total_steps), total_steps)
    return initialize(model, config, optimizer, scheduler)


def frozen_engine(model, config: dict) -> DeepSpeedEngine:
    """The engine of a model that only runs forward."""
    model.requires_grad_(False)
    engine = initialize(model, config)
    engine.eval()
    return engine
