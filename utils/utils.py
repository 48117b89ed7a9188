"""Small tools of all three steps: printing, seeds, averages, the tokenizer, optimizer groups, saving, EMA."""

import datetime
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed
from transformers.utils import cached_file

from utils.distributed import UserError, agree, all_reduce_sum, get_rank, get_world_size, load_operator
from utils.model.adapters import save_lora_adapter
from utils.model.loading import load_config
from utils.model.saving import save_pretrained_model, save_weights
from utils.module.lora import lora_layers

PROGRESS_SECONDS = 10  # between progress lines where there is no terminal


def is_rank_0() -> bool:
    return get_rank() == 0


def print_rank_0(msg, rank=None) -> None:
    """Print once, not once per rank, and without tearing a progress bar apart."""
    if (get_rank() if rank is None else rank) > 0:
        return
    if sys.stderr.isatty():
        tqdm.write(str(msg))
    else:
        print(msg, flush=True)


class progress:
    """A bar with the time left, on rank 0 only: live on a terminal, a line every ten seconds in a log."""

    def __init__(self, iterable, description: str, total: int | None = None):
        self._iterable, self._description, self._note = iterable, description, ""
        self._total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self._bar = None

    def note(self, text: str) -> None:
        """What stands behind the bar from now on: speed, memory."""
        self._note = f", {text}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __iter__(self):
        if not is_rank_0() or sys.stderr.isatty():
            self._bar = tqdm(
                self._iterable,
                desc=self._description,
                total=self._total,
                disable=not is_rank_0(),
                dynamic_ncols=True,
            )
            yield from self._bar
            return
        start = last = time.monotonic()
        for done, item in enumerate(self._iterable):
            now = time.monotonic()
            if now - last >= PROGRESS_SECONDS and done and self._total:
                last, filled = now, 30 * done // self._total
                left = datetime.timedelta(seconds=round((now - start) / done * (self._total - done)))
                bar = f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{self._total}"
                print(f"{self._description} {bar}, {left} left{self._note}", flush=True)
            yield item


def to_device(batch, device):
    """Move every tensor of a (nested) dict, list or tuple; anything else passes through."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


class PlainState:
    """Something whose attributes are numbers, and its whole state in a checkpoint."""

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError: other names than ``state_dict`` gives, or what is no number."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"{', '.join(sorted(state))} instead of {', '.join(sorted(self.state_dict()))}")
        for name, value in state.items():
            if not (value is None or isinstance(value, int | float)):
                raise ValueError(f"{name} is no number")
        vars(self).update(state)


class MovingAverage(PlainState):
    """The mean of all numbers so far."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.count = 0
        self.total = 0.0
        self.mean = 0.0

    def update(self, num):
        self.total += num
        self.count += 1
        self.mean = self.total / self.count
        return self.mean


class ExponentialMovingAverage(PlainState):
    """The exponential moving average of a number: the first value as it is, then alpha of the old and the rest new."""

    def __init__(self, alpha=0.9):
        self.alpha = alpha
        self.ema = None

    def update(self, num):
        self.ema = num if self.ema is None else self.alpha * self.ema + (1 - self.alpha) * num
        return self.ema

    def get(self):
        return self.ema if self.ema is not None else 0.0


def set_random_seed(seed) -> None:
    """Seed Python, NumPy and torch. Data order has generators of its own and does not depend on this."""
    if seed is not None:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed {seed}: must be between 0 and {2**32 - 1}")
        set_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        get_accelerator().manual_seed_all(seed)


def get_all_reduce_mean(tensor):
    """The mean over ranks. For a mean over rows or tokens, sum the sums and the counts instead."""
    return all_reduce_sum(tensor) / get_world_size()


def load_hf_tokenizer(model_name_or_path, fast_tokenizer=True, add_special_tokens=None, trust_remote_code=False):
    """The tokenizer of a model, with an EOS token and a pad token that differs from it.

    Args:
        add_special_tokens: an end-of-turn token, as with ``--add_eot_token``: it is added if the vocabulary lacks it
            and becomes the EOS token, so that data, generation, chat and the saved tokenizer agree on where answers
            end.

    Decided from the tokenizer alone, never from the model's name.
    """
    name = str(model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=fast_tokenizer, trust_remote_code=trust_remote_code)
        tokenizer("a")
        highest = max(tokenizer.get_vocab().values())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # strangers' files: anything may come of them, a panic of Rust too
        raise UserError(f"no tokenizer could be loaded from {name!r}: {type(error).__name__}: {error}") from error
    if highest >= len(tokenizer):
        check_highest_id(name, highest, trust_remote_code)
    if add_special_tokens is not None:
        if isinstance(add_special_tokens, list):
            [add_special_tokens] = add_special_tokens
        tokenizer.add_special_tokens({"eos_token": add_special_tokens})
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no EOS token; --add_eot_token adds one")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.padding_side = "right"
    return tokenizer


def check_same_tokenizer(args, tokenizer) -> None:
    """The critic must read ids as the actor writes them."""
    other = load_hf_tokenizer(
        args.critic_model_name_or_path,
        add_special_tokens=args.end_of_conversation_token,
        trust_remote_code=args.trust_remote_code,
    )
    if other.get_vocab() != tokenizer.get_vocab() or other.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizers differ: actor {args.actor_model_name_or_path} has {len(tokenizer)} tokens and EOS "
            f"{tokenizer.eos_token!r}, critic {args.critic_model_name_or_path} has {len(other)} and "
            f"{other.eos_token!r}. "
            "Train the reward model from a model with the actor's tokenizer"
        )


def check_highest_id(model_name_or_path: str, highest: int, trust_remote_code: bool) -> None:
    """A vocabulary with holes in it: embeddings grow to the number of tokens, which leaves such an id outside."""
    if cached_file(model_name_or_path, "config.json", _raise_exceptions_for_missing_entries=False) is None:
        return  # an adapter: its model is checked when it is used
    rows = load_config(model_name_or_path, trust_remote_code).get_text_config().vocab_size
    if highest >= rows:
        raise UserError(
            f"the tokenizer of {model_name_or_path!r} has a token of id {highest}, outside the {rows} rows of the "
            "model's embedding, and ids are missing below it: the two do not belong together"
        )


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

        load_operator("CPUAdamBuilder")
        return DeepSpeedCPUAdam(parameter_groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(parameter_groups, lr=learning_rate, betas=betas, fused=True)


NORM_QUESTIONS = ("scaled_global_norm", "_get_norm_groups")  # what DeepSpeed's optimizers ask; of ZeRO 1 and 2, of 3


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
    for question in NORM_QUESTIONS:  # of drop_gradients, not asked where fp16 had an overflow anyway
        vars(engine.optimizer).pop(question, None)
    norm = engine.get_global_grad_norm() if norm is None else norm
    if norm is None or (can_scale_down and not math.isfinite(norm)):
        return None
    return float(norm)


def answer_once(thing, method: str, answer) -> None:
    """Let the next call of a method of this one object give ``answer``; then it is what it was."""
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
        answer_once(optimizer, "step", None)
        optimizer.overflow = True  # as DeepSpeed's own optimizers say it; taken back by take_step
        optimizer.zero_grad(set_to_none=False)  # the norm of the gradient is taken all the same
        return
    norm, groups = torch.tensor(math.inf, device=engine.device), hasattr(optimizer, NORM_QUESTIONS[1])
    answer_once(optimizer, NORM_QUESTIONS[groups], [norm] if groups else norm)


def unwrap(model):
    """The module inside a DeepSpeed engine; a plain module as it is."""
    return model.module if hasattr(model, "module") else model


def save_hf_format(model, tokenizer, args, sub_folder="") -> None:
    """Save model, configuration and full tokenizer under ``args.output_dir/sub_folder``; every rank must call this.

    LoRA is folded in, ZeRO-3 shards are gathered, files appear atomically. A reward model is saved as a
    sequence-classification model with one label.
    """
    folder = Path(args.output_dir) / sub_folder
    save_pretrained_model(unwrap(model), tokenizer, folder, getattr(args, "max_shard_size", None))


def save_lora_adapters(model, tokenizer, args, base_model_name_or_path, sub_folder="") -> None:
    """Save the LoRA factors alone under ``args.output_dir/sub_folder/adapter``; every rank must call this.

    A folder of its own: with an adapter among a model's files, transformers would load the base and put it on top. A
    model without LoRA layers (the critic, say, beside an adapted actor) has none to save.
    """
    module, folder = unwrap(model), Path(args.output_dir) / sub_folder / "adapter"
    if lora_layers(module):
        save_lora_adapter(module, tokenizer, base_model_name_or_path, folder, args.trust_remote_code)


def save_quantised_model(model, tokenizer, args, base_model_name_or_path) -> None:
    """Save a QLoRA model whole: its adapters, and their update folded into the base's own files; on every rank.

    The packed weights are not saved: they are the base's, rounded.
    """
    from inference.merge_lora import read_adapter, save_merged_model

    save_lora_adapters(model, tokenizer, args, base_model_name_or_path)

    def merge() -> None:
        if is_rank_0():
            folder = Path(args.output_dir)
            save_merged_model(base_model_name_or_path, read_adapter(folder / "adapter"), folder, args.max_shard_size)

    agree(merge)


def save_zero_three_model(model_ema, global_rank, save_dir, zero_stage=0) -> None:
    """Write the weights alone (no configuration, no tokenizer) as safetensors; every rank must call this."""
    save_weights(unwrap(model_ema), Path(save_dir))


def load_state_dict_into_model(model_to_load, state_dict, start_prefix="", zero_stage=0) -> None:
    """Copy a state dict into a model, also one that ZeRO-3 has partitioned.

    Raises:
        UserError: naming the keys that are missing, unexpected, or of another shape. Nothing is loaded then.
    """
    state_dict = {name.removeprefix(start_prefix): value for name, value in state_dict.items()}
    targets = dict(model_to_load.named_parameters(remove_duplicate=False)) | dict(model_to_load.named_buffers())
    wanted = set(model_to_load.state_dict().keys())
    tied = set(getattr(model_to_load, "all_tied_weights_keys", None) or {})
    shape_of = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in targets.items()}
    problems = {
        "missing": sorted(wanted - set(state_dict) - tied),
        "unexpected": sorted(set(state_dict) - wanted),
        "of another shape": sorted(n for n in wanted & set(state_dict) if shape_of[n] != tuple(state_dict[n].shape)),
    }
    found = [
        f"{what}: {', '.join(names[:8])}" + (" …" if len(names) > 8 else "")
        for what, names in problems.items()
        if names
    ]
    if found:
        raise UserError("the checkpoint does not fit the model; " + "; ".join(found))

    from deepspeed import zero

    with torch.no_grad():
        for name in wanted & set(state_dict):
            target = targets[name]
            if hasattr(target, "ds_id"):
                with zero.GatheredParameters([target], modifier_rank=0):
                    if get_rank() == 0:
                        target.copy_(state_dict[name])
            else:
                target.copy_(state_dict[name])


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
