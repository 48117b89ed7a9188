"""The published place of these names, for other people's code: published calls and rows, over the rest of this room.

Rows are tensors here, of steps 1 and 2 all as long as they may be, so that transformers' ``default_data_collator``
stacks them. The steps of this project read the datasets behind them instead, whose batches need less padding.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

import pyarrow.compute as pc
import torch
from torch.utils.data import ConcatDataset, Dataset

from utils.data import preparation, unsupervised
from utils.data.batching import DataCollatorReward, DataCollatorRLHF, DataCollatorSFT, MiniDataset, pad_rows
from utils.data.encoding import RLHF, SFT
from utils.data.own_files import get_raw_dataset
from utils.data.split_index import get_raw_dataset_split_index, get_shuffle_idx
from utils.process.console import print_rank_0

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

Tokens = Mapping[str, torch.Tensor]  # of one text: input_ids, attention_mask, and labels where not all is learned


class PromptDataset(Dataset):
    """The rows of a step, from the tokens of its texts. What a step does not read may be empty.

    A row of step 1 is {input_ids, attention_mask, labels}, of step 2 (chosen ids, chosen mask, rejected ids, rejected
    mask), of step 3 (ids, mask, pad id) of a prompt.

    Args:
        prompt_dataset: for step 3, with the tokens in reverse, as DataCollatorRLHF expects them.
        chosen_dataset, reject_dataset: for step 2, of one length each, [1, length]; step 1 reads the first, [length].
    """

    def __init__(
        self,
        prompt_dataset: Sequence[Tokens],
        chosen_dataset: Sequence[Tokens],
        reject_dataset: Sequence[Tokens],
        pad_token_id: int,
        train_phase: int,
    ):
        self.prompt_dataset, self.chosen_dataset, self.reject_dataset = prompt_dataset, chosen_dataset, reject_dataset
        self.pad_token_id, self.train_phase = pad_token_id, train_phase

    def __len__(self):
        return len(self.prompt_dataset if self.train_phase == RLHF else self.chosen_dataset)

    def __getitem__(self, idx):
        if self.train_phase == RLHF:
            return *_ids_and_mask(self.prompt_dataset[idx]), self.pad_token_id
        chosen = self.chosen_dataset[idx]
        ids, mask = _ids_and_mask(chosen)
        if self.train_phase != SFT:
            return ids, mask, *_ids_and_mask(self.reject_dataset[idx])
        labels = chosen["labels"] if "labels" in chosen else ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _ids_and_mask(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(tokens["input_ids"]), torch.as_tensor(tokens["attention_mask"])


class _Column(Sequence):
    """The tokens of one text of each row of a dataset, made when they are asked for."""

    def __init__(self, rows: Dataset, tokens_of: Callable[[dict], Tokens]):
        self._rows, self._tokens_of = rows, tokens_of

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, idx):
        return self._tokens_of(self._rows[idx])


def _published(rows: Dataset, train_phase: int, tokenizer, max_seq_len: int) -> PromptDataset:
    """The published view of a dataset of ids."""
    pad_id = tokenizer.pad_token_id
    supervised = DataCollatorSFT(pad_id, max_seq_len, pad_to_max_length=True)

    def padded(name: str) -> Callable[[dict], Tokens]:
        def tokens_of(row: dict) -> Tokens:
            ids, mask = pad_rows([row[name]], pad_id, to_length=max_seq_len)
            return {"input_ids": ids, "attention_mask": mask}

        return tokens_of

    def reversed_prompt(row: dict) -> Tokens:
        ids = torch.tensor(row["input_ids"]).flip(0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    if train_phase == RLHF:
        return PromptDataset(_Column(rows, reversed_prompt), [], [], pad_id, train_phase)
    if train_phase == SFT:
        answers = _Column(rows, lambda row: {name: batch[0] for name, batch in supervised([row]).items()})
        return PromptDataset([], answers, [], pad_id, train_phase)
    _say_ranked(rows)
    return PromptDataset(
        [], _Column(rows, padded("chosen_ids")), _Column(rows, padded("rejected_ids")), pad_id, train_phase
    )


def _say_ranked(rows) -> None:
    tables = [part.table for part in (rows.datasets if isinstance(rows, ConcatDataset) else [rows])]
    ranked = sum(pc.sum(pc.greater(pc.list_value_length(table["ranked_ids"]), 0)).as_py() or 0 for table in tables)
    if ranked:
        print_rank_0(
            f"{ranked} of {len(rows)} rows rank several answers: each gives one pair here, its best and its worst "
            "answer; step 2's main.py compares all of them"
        )


def _say_unused(end_of_conversation_token: str | None, tokenizer) -> None:
    if end_of_conversation_token not in (None, tokenizer.eos_token):
        print_rank_0(
            f"end_of_conversation_token {end_of_conversation_token!r} is not used: every answer ends with the "
            f"tokenizer's EOS, {tokenizer.eos_token!r}; load_hf_tokenizer(add_special_tokens=...) sets it"
        )


def create_prompt_dataset(
    local_rank,
    data_path,
    data_split,
    output_path,
    train_phase,
    seed,
    tokenizer,
    max_seq_len,
    end_of_conversation_token=None,
    sft_only_data_path=(),
    reload=False,
    **options,
):
    """(train, eval) PromptDatasets of one step, blended from all named datasets.

    Args:
        options: those of ``utils.data.preparation.create_prompt_dataset``.

    Raises:
        UserError: unknown dataset, bad rows, or a split without a single row.
    """
    _say_unused(end_of_conversation_token, tokenizer)
    place = local_rank, data_path, data_split, output_path, train_phase, seed, tokenizer, max_seq_len
    parts = preparation.create_prompt_dataset(*place, None, sft_only_data_path, reload, **options)
    return tuple(_published(part, train_phase, tokenizer, max_seq_len) for part in parts)


def create_dataset(
    local_rank,
    dataset_name,
    data_split,
    output_path,
    train_phase,
    seed,
    tokenizer,
    end_of_conversation_token,
    max_seq_len,
    rebuild=False,
):
    """(train, eval) PromptDatasets of one dataset for one step; ``data_split`` None uses it whole."""
    _say_unused(end_of_conversation_token, tokenizer)
    place = local_rank, dataset_name, data_split, output_path, train_phase, seed, tokenizer
    parts = preparation.create_dataset(*place, None, max_seq_len, rebuild)
    return tuple(_published(part, train_phase, tokenizer, max_seq_len) for part in parts)


def create_dataset_split(
    current_dataset, raw_dataset, train_phase, tokenizer, end_of_conversation_token, max_seq_len
) -> PromptDataset:
    """A PromptDataset of rows that the caller has chosen from a raw dataset.

    Raises:
        DataError: not one of the rows can be used.
    """
    _say_unused(end_of_conversation_token, tokenizer)
    rows = preparation.create_dataset_split(current_dataset, raw_dataset, train_phase, tokenizer, None, max_seq_len)
    return _published(rows, train_phase, tokenizer, max_seq_len)


def get_unsupervised_data(args, tokenizer) -> PromptDataset:
    """Plain text for the ptx loss: rows {input_ids, attention_mask, labels} of prompt + answer length.

    Raises:
        UserError: no such text, or less of it than one row.
    """
    blocks = unsupervised.get_unsupervised_data(
        Namespace(**{"allow_special_tokens": False, "rebuild_cache": False} | vars(args)), tokenizer
    )

    def tokens_of(row: dict) -> Tokens:
        ids = torch.tensor(row["input_ids"])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return PromptDataset([], _Column(blocks, tokens_of), [], tokenizer.pad_token_id, SFT)
