"""The published place of these names, for other people's code; here they are only handed on."""

from utils.data.batching import DataCollatorReward, DataCollatorRLHF, MiniDataset
from utils.data.cache import PromptDataset
from utils.data.own_files import get_raw_dataset
from utils.data.preparation import create_dataset, create_dataset_split, create_prompt_dataset
from utils.data.split_index import get_raw_dataset_split_index, get_shuffle_idx
from utils.data.unsupervised import get_unsupervised_data

__all__ = [
    "DataCollatorRLHF",
    "DataCollatorReward",
    "MiniDataset",
    "PromptDataset",
    "create_dataset",
    "create_dataset_split",
    "create_prompt_dataset",
    "get_raw_dataset",
    "get_raw_dataset_split_index",
    "get_shuffle_idx",
    "get_unsupervised_data",
]
