"""Making the models: a causal language model for the actor and the reference, a RewardModel for critic and reward."""

import contextlib
import inspect
import math

import torch
from transformers import AutoConfig, AutoModel
from transformers.integrations import HfDeepSpeedConfig

from utils.distributed import UserError
from utils.model.inputs import embedding_rows
from utils.model.reward_model import HEAD_NAMES, RewardModel, read_value_head
from utils.module.lora import (
    convert_linear_layer_to_lora,
    count_parameters,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.utils import print_rank_0


def configure_dropout(model_config, dropout) -> None:
    """Set every dropout probability a config has, whatever the family calls it; None leaves the model's own."""
    if dropout is None:
        return
    for name, value in vars(model_config).items():
        is_dropout = "dropout" in name or name.endswith("_pdrop") or name == "layerdrop"
        if is_dropout and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(model_config, name, dropout if name != "layerdrop" else 0.0)


@contextlib.contextmanager
def _zero3_loading(ds_config):
    """While open, from_pretrained partitions each weight over the ranks as it loads it (ZeRO-3 only)."""
    is_stage_3 = ds_config is not None and ds_config["zero_optimization"]["stage"] == 3
    keep_alive = HfDeepSpeedConfig(ds_config) if is_stage_3 else None
    try:
        yield
    finally:
        del keep_alive


def load_config(model_name_or_path, trust_remote_code):
    try:
        return AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"no model could be loaded from {model_name_or_path!r}: {error}") from error


def _check_loading(info: dict, model_name_or_path, model_class) -> None:
    """Raise for weights that are missing or misshapen; tell of those the model has no place for."""
    missing, mismatched = list(info["missing_keys"]), [str(key) for key in info["mismatched_keys"]]
    unexpected = set(info["unexpected_keys"])
    if model_class is AutoModel:  # a decoder alone: the heads of a language or reward model are left aside on purpose
        unexpected = {
            key for key in unexpected if key not in HEAD_NAMES and "head" not in key and "embed_out" not in key
        }
    elif unexpected & set(HEAD_NAMES):
        raise UserError(
            f"{model_name_or_path!r} is a reward model; a language model is needed here, as step 1 saves it"
        )
    if unexpected:
        print_rank_0(
            f"note: {model_name_or_path}: {len(unexpected)} weights have no place in the model and are left: "
            f"{', '.join(sorted(unexpected)[:8])}"
        )
    if missing or mismatched:
        listed = ", ".join((missing + mismatched)[:8])
        raise UserError(
            f"the weights in {model_name_or_path!r} do not fit the model; missing or of another shape: {listed}"
        )


def grow_embedding(model, tokenizer) -> None:
    """Make room for tokens the tokenizer has and the model lacks, to a multiple of 8; never shrink."""
    if len(tokenizer) > embedding_rows(model):
        # New rows start at the mean of the old: in a family whose logits all lie far below zero, a small random row
        # would be the likeliest token of all.
        model.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8))


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
):
    """Load a Hugging Face model, ready for training with this tokenizer.

    Args:
        model_class: AutoModelForCausalLM, AutoModel, ...
        ds_config: with ZeRO stage 3 the weights are partitioned while loading.
        rlhf_training: turn dropout off unless ``dropout`` asks for some: PPO compares log-probs of equal weights.
        dropout: every dropout probability; None keeps the model's own.

    Raises:
        UserError: no such model, or weights that do not fit it, with the keys.
    """
    config = load_config(model_name_or_path, trust_remote_code)
    configure_dropout(config, 0.0 if rlhf_training and dropout is None else dropout)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _zero3_loading(ds_config):
        try:
            model, info = model_class.from_pretrained(
                model_name_or_path,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **options,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"no model could be loaded from {model_name_or_path!r}: {error}") from error
        _check_loading(info, model_name_or_path, model_class)
        grow_embedding(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
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
):
    """A decoder with a value head: a fresh head for step 2, the trained one for step 3 (``rlhf_training``).

    Raises:
        UserError: in step 3, when the folder holds no trained head.
    """
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
    )
    head = read_value_head(model_name_or_path)
    if rlhf_training and head is None:
        raise UserError(
            f"{model_name_or_path!r} holds no reward model: there is no score.weight among its weights. "
            "Train one with step 2 and give its output folder."
        )
    return RewardModel(
        base,
        tokenizer,
        num_padding_at_beginning,
        compute_fp32_loss,
        rm_loss=rm_loss,
        rm_margin=rm_margin,
        rm_center_coef=rm_center_coef,
        value_head=head,
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


def add_lora_layers(model, args, prefix: str = ""):
    """The LoRA layers that a step's flags ask for; ``prefix`` as the flags are named. Rank 0 adds none."""
    names = ("lora_module_name", "lora_dim", "lora_scaling", "lora_dropout")
    return convert_linear_layer_to_lora(model, *(getattr(args, prefix + name) for name in names))


def adapt_model(model, args, prefix: str = "", gradient_checkpointing: bool = False, keep_trainable=()):
    """Apply a step's LoRA and checkpointing flags to a fresh model and print what will train.

    Args:
        prefix: "", "actor_" or "critic_", as the flags are named.
        keep_trainable: parts of names that train beside LoRA under --only_optimize_lora.
    """
    lora_dim = getattr(args, f"{prefix}lora_dim")
    if lora_dim > 0:
        add_lora_layers(model, args, prefix)
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
