"""DeepSpeed configurations: one for engines that train, one for engines that only look."""

import json
from pathlib import Path

import torch

from utils.distributed import UserError, deepspeed, get_world_size, ranks_per_node

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
):
    """The configuration of an engine with an optimizer. Batch sizes are added by ``with_batch_sizes``.

    Args:
        offload: keep optimizer states (and, at stage 3, parameters) in host memory.
        dtype: "fp16", "bf16" or "fp32".
        stage: ZeRO stage 0 to 3.
        enable_mixed_precision_lora: ZeRO++ for frozen base weights: quantised gathers, second copy per node.
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


def merge_config_file(ds_config: dict, path: str | None) -> dict:
    """Lay the user's JSON file over the configuration, key by key, so that any DeepSpeed setting is in reach."""
    if path is None:
        return ds_config
    try:
        overrides = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed_config_overrides {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed_config_overrides {path}: line {error.lineno} is not JSON: {error.msg}") from error
    if not isinstance(overrides, dict):
        raise UserError(
            f"--deepspeed_config_overrides {path}: expected a JSON object, found {type(overrides).__name__}"
        )

    def merge(base: dict, top: dict) -> dict:
        merged = dict(base)
        for key, value in top.items():
            merged[key] = (
                merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
            )
        return merged

    return merge(ds_config, overrides)


def initialize(model, ds_config: dict, optimizer=None, lr_scheduler=None):
    """The DeepSpeed engine around a model; without an optimizer one that only runs forward."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    return engine
