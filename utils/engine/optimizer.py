"""Which parameters train at which rate, and the optimizer of an engine."""

import torch

from utils.process.errors import UserError
from utils.process.operators import load_operator

NO_DECAY_NAMES = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")


LORA_NAMES = ("lora_right_weight", "lora_left_weight")


def get_optimizer_grouped_parameters(
    model, weight_decay, lora_lr=5e-4, no_decay_name_list=NO_DECAY_NAMES, lora_name_list=LORA_NAMES
):
    """Parameter groups: decayed matrices, LoRA factors with a learning rate of their own, and undecayed vectors.

    Frozen parameters are in no group; empty groups are left out.
    """
    decayed, lora, undecayed = [], [], []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        shape = getattr(param, "ds_shape", param.shape)
        if any(part in name for part in lora_name_list):
            lora.append(param)
        elif len(shape) < 2 or any(part in name.lower() for part in no_decay_name_list):
            undecayed.append(param)
        else:
            decayed.append(param)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": lora, "weight_decay": weight_decay, "lr": lora_lr},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    parameter_groups, learning_rate: float, offload: bool, betas=(0.9, 0.95), paged: bool = False
) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's for host memory when offloading, bitsandbytes' when ``paged``, else torch's fused one."""
    if paged and offload:
        raise UserError("--paged_optimizer: the DeepSpeed configuration keeps the optimizer states on the host already")
    if paged:
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(parameter_groups, lr=learning_rate, betas=betas, weight_decay=0.0)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_operator("CPUAdamBuilder", "--offload")
        return DeepSpeedCPUAdam(parameter_groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(parameter_groups, lr=learning_rate, betas=betas, fused=True)
