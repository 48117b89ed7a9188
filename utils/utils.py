"""The published place of these names, for other people's code.

Most are only handed on. Defined here are the two that save in the published manner: on rank 0 alone, while the steps of
this project save on all ranks together (utils/run/results.py).
"""

from pathlib import Path

from utils.data.batching import to_device
from utils.engine.averages import ExponentialMovingAverage, MovingAverage
from utils.engine.optimizer import get_optimizer_grouped_parameters
from utils.engine.steps import moving_average
from utils.model.inputs import unwrap
from utils.model.loading import load_state_dict_into_model
from utils.model.saving import is_sharded, save_pretrained_model, save_weights
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.lora import _z3_params_to_fetch
from utils.process.console import print_rank_0
from utils.process.ranks import get_all_reduce_mean
from utils.process.seeds import set_random_seed
from utils.process.world import is_rank_0

get_tokenizer = load_hf_tokenizer

__all__ = [
    "ExponentialMovingAverage",
    "MovingAverage",
    "_z3_params_to_fetch",
    "get_all_reduce_mean",
    "get_optimizer_grouped_parameters",
    "get_tokenizer",
    "is_rank_0",
    "load_hf_tokenizer",
    "load_state_dict_into_model",
    "moving_average",
    "print_rank_0",
    "save_hf_format",
    "save_zero_three_model",
    "set_random_seed",
    "to_device",
]


def save_hf_format(model, tokenizer, args, sub_folder="") -> None:
    """Save model, configuration and full tokenizer under ``args.output_dir/sub_folder``, on rank 0 and by it alone.

    As in ``if rank == 0: save_hf_format(...)``: no other rank need call this, and those that do go on at once. LoRA is
    folded in, files appear atomically, a reward model is saved as a sequence-classification model with one label.
    Weights that ZeRO-3 has sharded cannot be gathered so: ``save_zero_three_model`` on every rank adds them.
    """
    folder, module = Path(args.output_dir) / sub_folder, unwrap(model)
    save_pretrained_model(module, tokenizer, folder, getattr(args, "max_shard_size", None), alone=True)
    if is_sharded(module):
        print_rank_0(f"{folder}: saved without weights, which ZeRO-3 has sharded; save_zero_three_model adds them")


def save_zero_three_model(model_ema, global_rank, save_dir, zero_stage=0) -> None:
    """Write the weights alone, as safetensors; every rank must call this where ZeRO-3 has sharded them.

    Args:
        global_rank, zero_stage: accepted for old callers: the process knows its rank, and weights are shards or not.
    """
    module = unwrap(model_ema)
    save_weights(module, Path(save_dir), alone=not is_sharded(module))
