"""Making the models: a causal language model for the actor and the reference, a RewardModel for critic and reward."""

import contextlib
import copy
import inspect
import math

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModel
from transformers.integrations import HfDeepSpeedConfig

from utils.ds_utils import TORCH_DTYPES
from utils.model.inputs import embedding_rows
from utils.model.loading import check_checkpoint, check_generation_config, find_checkpoint, load_config
from utils.model.reward_model import RewardModel, empty_classifier
from utils.model.tokenizer import keep_end_tokens, vocabulary_size
from utils.module.lora import (
    check_packing_share,
    convert_linear_layer_to_lora,
    count_parameters,
    describe_left_out,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.module.quantize import Packing, describe_packing
from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.host_memory import memory_given_back
from utils.process.ranks import agree


def configure_dropout(model_config, dropout) -> None:
    """Set every dropout probability a config has, whatever the family calls it; None leaves the model's own."""
    if dropout is None:
        return
    for name, value in vars(model_config).items():
        is_dropout = "dropout" in name or name.endswith("_pdrop") or name == "layerdrop"
        if is_dropout and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(model_config, name, dropout if name != "layerdrop" else 0.0)


def _is_stage_3(ds_config) -> bool:
    return ds_config is not None and ds_config["zero_optimization"]["stage"] == 3


@contextlib.contextmanager
def _zero3_loading(ds_config):
    """While open, from_pretrained partitions each weight over the ranks as it loads it (ZeRO-3 only)."""
    keep_alive = HfDeepSpeedConfig(ds_config) if _is_stage_3(ds_config) else None
    try:
        yield
    finally:
        del keep_alive


def grow_embedding(model, tokenizer) -> None:
    """Make room for tokens the tokenizer has and the model lacks, to a multiple of 8; never shrink."""
    size = vocabulary_size(tokenizer)
    if size > embedding_rows(model):
        # New rows start at the mean of the old: in a family whose logits all lie far below zero, a small random row
        # would be the likeliest token of all. On the meta device there are none.
        model.resize_token_embeddings(8 * math.ceil(size / 8), mean_resizing=model.device.type != "meta")


def check_positions(config, model_name_or_path, lengths: dict[str, int]) -> None:
    """Refuse rows longer than what the model was made for: learned positions end there, rotary ones mean nothing."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and sum(lengths.values()) > positions:
        asked = " and ".join(f"{flag} {length}" for flag, length in lengths.items())
        raise UserError(
            f"{asked} {'are' if len(lengths) > 1 else 'is'} more than the {positions} positions of "
            f"{str(model_name_or_path)!r}; lower {'one of them' if len(lengths) > 1 else 'it'}"
        )


def check_model(model_class, model_name_or_path, trust_remote_code=False, trained_head=False, lengths=None):
    """Read configuration and names of weights alone: whether the model is there, whole and of the right kind.

    Every rank must call this.

    Args:
        trained_head: a reward model is wanted, with its value head.
        lengths: flag -> tokens it asks for; their sum must not exceed the positions the model has.

    Returns:
        (configuration, options that ``from_pretrained`` needs for these files)

    Raises:
        UserError: no such model, or weights that do not fit it, with the keys; on all ranks alike.
    """
    checked = None

    def check() -> None:
        nonlocal checked
        config = load_config(model_name_or_path, trust_remote_code)
        check_positions(config, model_name_or_path, lengths or {})
        checkpoint = find_checkpoint(model_name_or_path)
        check_generation_config(model_name_or_path)
        if checkpoint.is_published_reward:
            config.num_labels = 1
        checked = config, check_checkpoint(checkpoint, model_class, config, trust_remote_code)
        if trained_head and checkpoint.value_head() is None:
            raise UserError(
                f"{str(model_name_or_path)!r} holds no reward model: there is no score.weight (or v_head.weight) among "
                "its weights. Train one with step 2 and give its output folder."
            )
        if model_class is AutoModel:
            empty_classifier(copy.deepcopy(config))

    agree(check)
    return checked


def create_hf_model(
    model_class,
    model_name_or_path,
    tokenizer,
    ds_config=None,
    rlhf_training=False,
    dropout=None,
    dtype=torch.float32,
    attn_implementation=None,
    trust_remote_code=False,
    on_meta=False,
):
    """Load a Hugging Face model, ready for training with this tokenizer, whose end tokens it knows.

    Args:
        model_class: AutoModelForCausalLM, AutoModel, ...
        ds_config: with ZeRO stage 3 the weights are partitioned while loading.
        rlhf_training: turn dropout off unless ``dropout`` asks for some: PPO compares log-probs of equal weights.
        dropout: every dropout probability; None keeps the model's own.
        on_meta: shapes alone, on the meta device; no weight is read.

    Raises:
        UserError: no such model, weights that do not fit it, with the keys, or a chat template that cannot be used.
    """
    config, options = check_model(model_class, model_name_or_path, trust_remote_code)
    configure_dropout(config, 0.0 if rlhf_training and dropout is None else dropout)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    accelerator = get_accelerator()
    if on_meta:
        options["device_map"] = {"": "meta"}
    elif ds_config is not None and not _is_stage_3(ds_config) and accelerator.device_name() != "cpu":
        options["device_map"] = {"": accelerator.current_device_name()}  # past host memory
    with memory_given_back(), _zero3_loading(ds_config):
        try:
            model = model_class.from_pretrained(
                model_name_or_path,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                **options,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"no model could be loaded from {model_name_or_path!r}: {error}") from error
        grow_embedding(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        keep_end_tokens(model, tokenizer)
    return model


def create_critic_model(
    model_name_or_path,
    tokenizer,
    ds_config=None,
    num_padding_at_beginning=0,
    rlhf_training=False,
    dropout=None,
    zero_stage=0,
    compute_fp32_loss=False,
    dtype=torch.float32,
    attn_implementation=None,
    trust_remote_code=False,
    rm_loss="per_token",
    rm_margin=0.0,
    rm_center_coef=0.0,
    on_meta=False,
):
    """A decoder with a value head: a fresh head for step 2, the trained one for step 3 (``rlhf_training``).

    Raises:
        UserError: in step 3, when the folder holds no trained head.
    """
    if rlhf_training:
        check_model(AutoModel, model_name_or_path, trust_remote_code, trained_head=True)
    base = create_hf_model(
        AutoModel,
        model_name_or_path,
        tokenizer,
        ds_config,
        rlhf_training,
        dropout,
        dtype,
        attn_implementation,
        trust_remote_code,
        on_meta,
    )
    return RewardModel(
        base,
        tokenizer,
        num_padding_at_beginning,
        compute_fp32_loss,
        rm_loss=rm_loss,
        rm_margin=rm_margin,
        rm_center_coef=rm_center_coef,
        value_head=find_checkpoint(model_name_or_path).value_head(),
    )


def causal_lm_model_to_fp32_loss(model):
    """Give a model a forward whose logits are fp32, so that a loss computed from them is. Returns the model."""
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    forward.__signature__ = inspect.signature(original)
    model.forward = forward
    return model


def packing_of(args) -> Packing | None:
    """How --quantize and its flags pack the frozen weights; None without --quantize."""
    if args.quantize is None:
        return None
    return Packing(args.quantize, args.quantize_double, TORCH_DTYPES[args.quantize_compute_dtype])


def add_lora_layers(model, args, prefix: str = "", packing: Packing | None = None):
    """Add the LoRA layers that a step's flags ask for; with a --lora_dim of 0 the model stays as it is.

    Args:
        prefix: "", "actor_" or "critic_", as the flags are named.
        packing: of the frozen weights below LoRA; None leaves them as they are.
    """
    if packing is not None:
        check_packing_share(model)
    names = ("lora_module_name", "lora_dim", "lora_scaling", "lora_dropout")
    model = convert_linear_layer_to_lora(model, *(getattr(args, prefix + name) for name in names), packing)
    if packing is not None:
        print_rank_0(describe_packing(model))
    return model


def adapt_model(
    model,
    args,
    prefix: str = "",
    gradient_checkpointing: bool = False,
    keep_trainable=(),
    packing: Packing | None = None,
):
    """Apply a step's LoRA and checkpointing flags to a fresh model and print how many parameters train.

    Args:
        prefix: "", "actor_" or "critic_", as the flags are named.
        keep_trainable: parts of names that train beside LoRA under --only_optimize_lora.
        packing: of the frozen weights below LoRA (``packing_of``); None leaves them as they are.
    """
    lora_dim = getattr(args, f"{prefix}lora_dim")
    if lora_dim > 0:
        left_out = describe_left_out(model, getattr(args, f"{prefix}lora_module_name"))
        if left_out is not None:
            print_rank_0(left_out)
        add_lora_layers(model, args, prefix, packing)
        if args.only_optimize_lora:
            only_optimize_lora_parameters(model, keep_trainable)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora_dim > 0:
            make_model_gradient_checkpointing_compatible(model)
    trainable, total = count_parameters(model)
    name, share = prefix.rstrip("_") or "model", 100 * trainable / total
    print_rank_0(f"{name}: {trainable:,} of {total:,} parameters train ({share:.2f} %)")
    return model
