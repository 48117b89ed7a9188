"""The published place of these names, for other people's code; here they are only handed on."""

from utils.data.batching import to_device
from utils.engine.averages import ExponentialMovingAverage, MovingAverage
from utils.engine.optimizer import get_optimizer_grouped_parameters
from utils.engine.steps import moving_average
from utils.model.loading import load_state_dict_into_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.console import print_rank_0
from utils.process.ranks import get_all_reduce_mean
from utils.process.seeds import set_random_seed
from utils.process.world import is_rank_0
from utils.run.results import save_hf_format, save_zero_three_model

__all__ = [
    "ExponentialMovingAverage",
    "MovingAverage",
    "get_all_reduce_mean",
    "get_optimizer_grouped_parameters",
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
