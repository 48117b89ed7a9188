"""DeepSpeed configurations: one for engines that train, one for engines that only look."""

import difflib
import json
import math
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer

from utils.process.errors import UserError
from utils.process.world import get_world_size, ranks_per_node

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _precision_config(dtype: str) -> dict:
    if dtype == "fp16":
        return {"fp16": {"enabled": True, "loss_scale_window": 100}}
    if dtype == "bf16":
        return {"bf16": {"enabled": True}}
    if dtype == "fp32":
        return {}
    raise ValueError(f"dtype must be one of {', '.join(TORCH_DTYPES)}, not {dtype!r}")


def get_train_ds_config(
    offload,
    dtype="bf16",
    stage=2,
    enable_hybrid_engine=False,
    inference_tp_size=1,
    release_inference_cache=False,
    pin_parameters=True,
    tp_gather_partition_size=8,
    max_out_tokens=512,
    enable_tensorboard=False,
    enable_mixed_precision_lora=False,
    tb_path="",
    tb_name="",
    *,
    grad_accum_dtype=None,
):
    """The configuration of an engine with an optimizer. Batch sizes are added by ``with_batch_sizes``.

    Args:
        offload: keep optimizer states (and, at stage 3, parameters) in host memory.
        dtype: "fp16", "bf16" or "fp32".
        stage: ZeRO stage 0 to 3.
        enable_mixed_precision_lora: ZeRO++ for frozen base weights: quantised gathers, second copy per node.
        grad_accum_dtype: what gradients of micro-batches are added up in; None for ``dtype``.
    """
    device = "cpu" if offload else "none"
    zero_optimization = {
        "stage": stage,
        "overlap_comm": True,
        "offload_param": {"device": device},
        "offload_optimizer": {"device": device},
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 3e7,
        "stage3_prefetch_bucket_size": 3e7,
        "memory_efficient_linear": False,
    }
    if enable_mixed_precision_lora:
        zero_optimization["zero_quantized_nontrainable_weights"] = True
        zero_optimization["zero_hpz_partition_size"] = ranks_per_node()
    return {
        "steps_per_print": 10,
        "zero_optimization": zero_optimization,
        **_precision_config(dtype),
        **({} if grad_accum_dtype in (None, dtype) else {"data_types": {"grad_accum_dtype": grad_accum_dtype}}),
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "hybrid_engine": {
            "enabled": enable_hybrid_engine,
            "max_out_tokens": max_out_tokens,
            "inference_tp_size": inference_tp_size,
            "release_inference_cache": release_inference_cache,
            "pin_parameters": pin_parameters,
            "tp_gather_partition_size": tp_gather_partition_size,
        },
        "tensorboard": {
            "enabled": enable_tensorboard,
            "output_path": f"{tb_path}/ds_tensorboard_logs/",
            "job_name": f"{tb_name}_tensorboard",
        },
    }


def get_eval_ds_config(offload, dtype="bf16", stage=0):
    """The configuration of a frozen engine: without an optimizer only ZeRO 0 (whole) and 3 (sharded) mean anything."""
    return {
        "steps_per_print": 10,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 1e4,
            "offload_param": {"device": "cpu" if offload else "none"},
            "memory_efficient_linear": False,
        },
        **_precision_config(dtype),
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
    }


def with_batch_sizes(ds_config: dict, micro_batch_size: int, gradient_accumulation_steps: int = 1) -> dict:
    """DeepSpeed asks for all three sizes and checks that they agree with the number of ranks."""
    ds_config["train_micro_batch_size_per_gpu"] = micro_batch_size
    ds_config["train_batch_size"] = micro_batch_size * gradient_accumulation_steps * get_world_size()
    return ds_config


# Keys of a configuration file that a flag decides, so that two places could disagree.
DECIDED_BY_FLAGS = {
    "train_batch_size": "the flags of batch sizes",
    "train_micro_batch_size_per_gpu": "the flags of batch sizes",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "data_types": "--dtype and --grad_accum_dtype",
    "checkpoint": "--checkpoint_steps, --checkpoint_dir and --resume",
    "elasticity": "the flags of batch sizes",
    "optimizer": "--learning_rate, --weight_decay and --offload (step 3: --actor_learning_rate ...)",
    "scheduler": "--lr_scheduler_type and --num_warmup_steps",
}
UNSEEN = "gradients that are not finite would not be seen"  # take_step asks DeepSpeed
# The one value of a setting that works here, and what any other leads to.
WORKS_ONLY_AS = {
    ("bf16", "check_grad_overflow"): (True, UNSEEN),
    ("zero_optimization", "compute_grad_norm"): (True, UNSEEN),
    ("zero_optimization", "elastic_checkpoint"): (False, "DeepSpeed could not read its own checkpoints again"),
    ("zero_optimization", "offload_optimizer", "ratio"): (
        1,
        "DeepSpeed's optimizer of the part that stays on the device follows no schedule and is in no checkpoint",
    ),
}


def _read_config_file(path: str) -> dict:
    flag = f"--deepspeed_config_overrides {path}"
    try:
        overrides = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{flag}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{flag}: line {error.lineno} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: is not JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise UserError(f"{flag}: expected a JSON object, found {type(overrides).__name__}")
    for key, decided_by in DECIDED_BY_FLAGS.items():
        if key in overrides:
            raise UserError(f"{flag}: {key} is decided by {decided_by}; leave it out of the file")
    for path_of_key, (works, otherwise) in WORKS_ONLY_AS.items():
        given = overrides
        for key in path_of_key:
            given = given.get(key, works) if isinstance(given, dict) else works
        if given != works:
            raise UserError(
                f"{flag}: {'.'.join(path_of_key)} {json.dumps(given)}: {otherwise}; leave it out of the file"
            )
    return overrides


def offload_device(ds_config: dict, what: str) -> str:
    """Where ``what`` (offload_param, offload_optimizer) goes: none, cpu or nvme."""
    return (ds_config["zero_optimization"].get(what) or {}).get("device") or "none"


def offloads_optimizer(ds_config: dict) -> bool:
    """Whether optimizer states leave the device, by --offload or by a configuration file."""
    return offload_device(ds_config, "offload_optimizer") != "none"


def merge_config_file(ds_config: dict, path: str | None) -> dict:
    """Lay the user's JSON file over the configuration, key by key, so that any DeepSpeed setting is in reach.

    Raises:
        UserError: a file that cannot be read, a key that a flag decides, an offload that cannot work.
    """
    if path is None:
        return ds_config
    flag = f"--deepspeed_config_overrides {path}"

    def merge(base: dict, top: dict, place: str = "") -> dict:
        merged = dict(base)
        for key, value in top.items():
            wants_object = isinstance(base.get(key), dict) or key in ("fp16", "bf16")
            if wants_object and not isinstance(value, dict):
                raise UserError(f"{flag}: {place}{key} must be an object, not {json.dumps(value)}")
            _check_value(f"{flag}: {place}{key}", key, value, base)
            merged[key] = merge(base[key], value, f"{place}{key}.") if isinstance(base.get(key), dict) else value
        return merged

    merged = merge(ds_config, _read_config_file(path))
    stage = ds_config["zero_optimization"]["stage"]
    if merged["zero_optimization"]["stage"] != stage:
        raise UserError(
            f"{flag}: zero_optimization.stage {merged['zero_optimization']['stage']} is not the stage {stage} of "
            "--zero_stage (step 3: --actor_zero_stage, --critic_zero_stage); give the flag"
        )
    for kind in ("fp16", "bf16"):
        enabled = [bool(config.get(kind, {}).get("enabled")) for config in (ds_config, merged)]
        if enabled[0] != enabled[1]:
            raise UserError(f"{flag}: {kind}.enabled {str(enabled[1]).lower()} is not what --dtype says; give the flag")
    for what, stages in (("offload_param", (3,)), ("offload_optimizer", (1, 2, 3))):
        device, allowed = offload_device(merged, what), stages
        if device == offload_device(ds_config, what):
            continue
        if device not in ("none", "cpu", "nvme"):
            raise UserError(f"{flag}: zero_optimization.{what}.device {device!r} is none of cpu, nvme, none")
        if device == "nvme":
            allowed = (3,)
            _check_nvme(flag, what, merged["zero_optimization"][what])
        if device != "none" and stage not in allowed:
            raise UserError(
                f"{flag}: {what} to {device} needs ZeRO stage {' or '.join(map(str, allowed))}, not {stage}"
            )
    try:
        DeepSpeedConfig(with_batch_sizes(dict(merged), 1))
    except Exception as error:  # of DeepSpeed's own checks, of which each raises what it likes
        raise UserError(f"{flag}: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    return merged


def _check_value(place: str, key: str, value, base: dict) -> None:
    """Refuse what DeepSpeed does not check before it trains: misspelled names, values of a wrong kind or infinite."""
    similar = difflib.get_close_matches(key, base, n=1, cutoff=0.9)
    if similar and key not in base:
        raise UserError(f"{place} is no setting of DeepSpeed; did you mean {similar[0]}?")
    known = base.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if isinstance(known, bool) and not isinstance(value, bool):
        raise UserError(f"{place}: expected true or false, found {json.dumps(value)}")
    if isinstance(known, int | float) and not isinstance(known, bool) and not is_number:
        raise UserError(f"{place}: expected a number of 0 or more, found {json.dumps(value)}")


def _check_nvme(flag: str, what: str, settings: dict) -> None:
    folder = settings.get("nvme_path")
    if not folder or not Path(folder).is_dir():
        raise UserError(f"{flag}: {what} to nvme needs nvme_path, a folder on the disk; {folder!r} is none")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(f"{flag}: {what} to nvme needs DeepSpeed's async_io, and that libaio (apt install libaio-dev)")


def allow_optimizer(ds_config: dict, optimizer) -> dict:
    """ZeRO asks for consent to optimizers it has no test for (bitsandbytes' paged AdamW)."""
    untested = optimizer is not None and not is_zero_supported_optimizer(optimizer)
    return ds_config | {"zero_allow_untested_optimizer": True} if untested else ds_config


def _in_fp32(ds_config: dict) -> bool:
    return not any(ds_config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))


def initialize(model, ds_config: dict, optimizer=None, lr_scheduler=None):
    """The DeepSpeed engine around a model; without an optimizer one that only runs forward."""
    ds_config = allow_optimizer(ds_config, optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    if get_world_size() == 1 and engine.zero_optimization_stage() == 0 and _in_fp32(ds_config):
        # A rank alone has nothing to reduce, and stage 0 would copy all its gradients into one tensor to do so.
        engine.enable_backward_allreduce = False
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if isinstance(scaler, DynamicLossScaler):
        scaler.raise_error_at_min_scale = False  # take_step says so, with the step and its rows
    return engine
