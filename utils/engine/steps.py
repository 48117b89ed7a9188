"""One step of a DeepSpeed engine, made or left out at any ZeRO stage; the moving average that follows it."""

import math

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from utils.model.inputs import unwrap

NORM_METHODS = ("scaled_global_norm", "_get_norm_groups")  # that give DeepSpeed's step its norm: ZeRO 1 and 2, ZeRO 3


def take_step(engine) -> float | None:
    """engine.step(); where that was an optimizer step, the norm of the whole gradient before clipping.

    A norm that is not finite means that no update was made, at any ZeRO stage. In fp16 that happens now and then, while
    the loss scale finds its place: the norm is None then, unless the scale cannot become smaller.
    """
    norm, scaler = None, getattr(engine.optimizer, "loss_scaler", None)
    can_scale_down = isinstance(scaler, DynamicLossScaler) and scaler.cur_scale > scaler.min_scale
    # DeepSpeed keeps the norm in its own optimizers; at stage 0 in fp32 there is none around torch's.
    if engine.is_gradient_accumulation_boundary() and not hasattr(engine.optimizer, "_global_grad_norm"):
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        if not norm.isfinite():
            drop_gradients(engine)
    engine.step()
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.optimizer.overflow = False
    for method in NORM_METHODS:  # overridden by drop_gradients, and not called where fp16 had an overflow anyway
        vars(engine.optimizer).pop(method, None)
    norm = engine.get_global_grad_norm() if norm is None else norm
    if norm is None or (can_scale_down and not math.isfinite(norm)):
        return None
    return float(norm)


def override_next_call(thing, method: str, answer) -> None:
    """Let the next call of a method of this one object return ``answer``; then the method is what it was."""
    before = vars(thing).get(method)

    def answering(*_args, **_kwargs):
        delattr(thing, method)
        if before is not None:
            setattr(thing, method, before)
        return answer

    setattr(thing, method, answering)


def drop_gradients(engine) -> None:
    """Between backward and step: let the coming step be one without an update, at any ZeRO stage; on every rank.

    DeepSpeed leaves out a step whose gradient is not finite: it counts it and keeps weights, optimizer and schedule as
    they are. So it is told that there is such a one. At stage 0 in fp32 the optimizer is torch's, without such a check.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        override_next_call(optimizer, "step", None)
        optimizer.overflow = True  # as DeepSpeed's own optimizers say it; taken back by take_step
        optimizer.zero_grad(set_to_none=False)  # the norm of the gradient is taken all the same
        return
    norm, groups = torch.tensor(math.inf, device=engine.device), hasattr(optimizer, NORM_METHODS[1])
    override_next_call(optimizer, NORM_METHODS[groups], [norm] if groups else norm)


@torch.no_grad()
def moving_average(model, model_ema, beta=0.992, device=None, zero_stage=0) -> None:
    """Move the EMA model a step towards the model: ema = beta * ema + (1 - beta) * model, in the EMA's own precision.

    Call it once per applied optimizer step. Under ZeRO-3 each rank moves its own shard of both models, which are cut
    alike, so nothing is gathered.
    """
    for param, ema in zip(unwrap(model).parameters(), unwrap(model_ema).parameters(), strict=True):
        source = param.ds_tensor if hasattr(param, "ds_id") else param
        target = ema.ds_tensor if hasattr(ema, "ds_id") else ema
        target.data.lerp_(source.data.to(target.device, target.dtype), 1 - beta)
