"""From id rows to padded batches: the order of rows, packing, padding, collators."""

import json
import signal
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import combinations

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.process.errors import UserError
from utils.process.ranks import all_reduce_sum
from utils.process.world import get_rank, get_world_size

IGNORE_INDEX = -100  # a label that is not learned
FILLER = None  # an index that stands for no row: it keeps the ranks in step where rows run out, and weighs nothing


class StepBatchSampler(Sampler):
    """Micro-batches of row indices for one rank, such that every world size sees the same rows in the same step.

    An epoch is a seeded permutation, cut into the rows of one optimizer step (micro-batch x ranks x accumulation);
    rows of a step are dealt to micro-batches and ranks. With ``group_by_length`` the permutation is sorted by length
    within windows of many steps and the steps are shuffled again, so that rows of a batch need little padding. The
    last step may be short: missing rows are ``FILLER``, so that all ranks run the same number of forward passes and no
    row is lost or repeated.
    """

    WINDOW_STEPS = 50

    def __init__(
        self, lengths, micro_batch_size, accumulation=1, seed=0, shuffle=True, group_by_length=False, drop_last=False
    ):
        self.lengths, self.micro, self.accumulation = np.asarray(lengths), micro_batch_size, accumulation
        self.seed, self.shuffle, self.group_by_length, self.drop_last = seed, shuffle, group_by_length, drop_last
        self.rank, self.world = get_rank(), get_world_size()
        self.epoch, self.first_step = 0, 0

    @property
    def rows_per_pass(self) -> int:
        return self.micro * self.world

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_pass * self.accumulation

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """``first_step``: optimizer steps of the epoch that are left out, being done already."""
        self.epoch, self.first_step = epoch, first_step

    def rows_of_step(self, step: int) -> list[int]:
        """Indices of the rows of one optimizer step of the epoch, of all ranks."""
        return self._order()[step * self.rows_per_step : (step + 1) * self.rows_per_step].tolist()

    def __len__(self) -> int:
        """Micro-batches of one rank in one epoch."""
        rows = len(self.lengths)
        return rows // self.rows_per_pass if self.drop_last else -(-rows // self.rows_per_pass)

    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-len(self) // self.accumulation)

    def _order(self) -> np.ndarray:
        rows = len(self.lengths)
        if not self.shuffle:
            return np.arange(rows)
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(rows)
        if not self.group_by_length:
            return order
        window = self.rows_per_step * self.WINDOW_STEPS
        order = np.concatenate(
            [
                part[np.argsort(-self.lengths[part], kind="stable")]
                for part in np.split(order, range(window, rows, window))
            ]
        )
        whole = rows // self.rows_per_step * self.rows_per_step
        steps = order[:whole].reshape(-1, self.rows_per_step)
        return np.concatenate([generator.permutation(steps).reshape(-1), order[whole:]])

    def __iter__(self):
        order = self._order().tolist()
        order += [FILLER] * (-len(order) % self.rows_per_pass)
        for i in range(self.first_step * self.accumulation, len(self)):
            yield order[i * self.rows_per_pass : (i + 1) * self.rows_per_pass][self.rank :: self.world]


def make_loader(dataset, sampler: StepBatchSampler, collator) -> DataLoader:
    """Batches in the sampler's order; for an accelerator made ahead by one more process, in pinned memory.

    The order is drawn in this process, and dataset and collator draw nothing, so that the batches are the same.
    """
    ahead = {}
    if get_accelerator().device_name() != "cpu":  # where there is time to make batches while the device computes
        # Forked once per loader: a process that is spawned would import everything anew, at every evaluation.
        ahead = dict(num_workers=1, persistent_workers=True, multiprocessing_context="fork", pin_memory=True)
        ahead["worker_init_fn"] = _leave_signals_to_the_run
    # A generator of its own: torch's loader draws a number at the start of each pass, in a resumed run once more often.
    generator = torch.Generator()
    return DataLoader(_WithFillers(dataset), batch_sampler=sampler, collate_fn=collator, generator=generator, **ahead)


def _leave_signals_to_the_run(_worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, and the run answers it once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_train_loader(dataset, collator, args) -> tuple[StepBatchSampler, DataLoader]:
    """The order of the rows of step 1 or 2, by its flags, and their batches."""
    sampler = StepBatchSampler(
        dataset.lengths,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        seed=args.seed,
        group_by_length=args.group_by_length,
    )
    return sampler, make_loader(dataset, sampler, collator)


def make_eval_loader(dataset, collator, batch_size: int) -> DataLoader:
    """Batches of this rank's rows in the dataset's own order."""
    return make_loader(dataset, StepBatchSampler(dataset.lengths, batch_size, shuffle=False), collator)


class _WithFillers(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        return None if index is FILLER else self.dataset[index]


def accumulation_windows(loader, accumulation: int):
    """Lists of the micro-batches of one optimizer step; the last list of an epoch may be shorter."""
    window = []
    for batch in loader:
        window.append(batch)
        if len(window) == accumulation:
            yield window
            window = []
    if window:
        yield window


def pad_rows(
    rows: list[list[int]], pad_id: int, side: str = "right", to_length: int | None = None, multiple_of: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad id lists to ``to_length``, or to the longest of them, rounded up to a multiple of ``multiple_of``.

    Returns:
        ids [rows, length] int64, attention mask [rows, length] int64: made from the lengths, whatever the ids are.
    """
    longest = max(1, *map(len, rows))
    length = to_length or -(-longest // multiple_of) * multiple_of
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


def learned_labels(row: dict, mask_prompt: bool) -> list[int]:
    """The labels of one row: its ids, -100 outside its answers where only answers are learned.

    An answer that another turn follows without an end token in between is followed by one in the labels: the model is
    to end there, whatever the conversation goes on with.
    """
    ids, spans, end_id = row["input_ids"], row["answer_spans"], row.get("end_id", -1)
    if not (mask_prompt or row["answers_only"]):
        return ids
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
        if end_id >= 0 and end < len(ids) and ids[end - 1] != end_id:
            labels[end] = end_id
    return labels


@dataclass
class DataCollatorSFT:
    """Rows of step 1 -> {input_ids, attention_mask, labels}, [batch, length]; labels -100 at pads (and prompts)."""

    pad_token_id: int
    max_length: int
    mask_prompt: bool = False
    pad_to_max_length: bool = False

    def __call__(self, rows):
        to_length = self.max_length if self.pad_to_max_length else None
        full = [[self.pad_token_id] if row is None else row["input_ids"] for row in rows]
        labels = [[IGNORE_INDEX] if row is None else learned_labels(row, self.mask_prompt) for row in rows]
        ids, mask = pad_rows(full, self.pad_token_id, to_length=to_length)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": pad_rows(labels, IGNORE_INDEX, to_length=to_length)[0],
        }


def count_batch(batch: dict) -> tuple[int, int, int]:
    """(labels that are predicted, real tokens, rows) of a batch of step 1, packed or not; fillers count for nothing."""
    labels = batch["labels"][:, 1:] != IGNORE_INDEX
    if "segment_ids" not in batch:
        rows = labels.any(1)
        return int(labels.sum()), int(batch["attention_mask"][rows].sum()), int(rows.sum())
    segments = batch["segment_ids"][labels.any(1)]
    return int(labels.sum()), int((segments > 0).sum()), int(segments.max(dim=1).values.sum()) if len(segments) else 0


def answers_of_pairs(batch: dict) -> torch.Tensor:
    """[pairs, 2]: the rows of the chosen and of the rejected answer in a batch of step 2."""
    if "pairs" in batch:
        return batch["pairs"]
    weights = batch["pair_weights"]
    return torch.arange(2 * len(weights), device=weights.device).view(2, -1).T


def pairs_of_answers(batch: dict) -> torch.Tensor:
    """[answers]: in how many pairs each answer of a batch of step 2 stands; 0 for fillers."""
    real = answers_of_pairs(batch)[batch["pair_weights"] > 0]
    answers = len(batch["input_ids"]) if "pairs" in batch else 2 * len(batch["pair_weights"])
    return torch.bincount(real.flatten(), minlength=answers)


def answer_shares(batch: dict) -> torch.Tensor:
    """[pairs, 2] fp64: what the two answers of each pair count, so that over all its pairs an answer counts once."""
    shares = 1.0 / pairs_of_answers(batch).clamp(min=1).double()
    return shares[answers_of_pairs(batch)] * (batch["pair_weights"] > 0).unsqueeze(1)


def count_pairs(batch: dict) -> tuple[float, int, int]:
    """(pairs, real tokens, answers) of a batch of step 2: a ranked list is one pair, fillers are nothing."""
    compared = pairs_of_answers(batch) > 0
    return float(batch["pair_weights"].sum()), int(batch["attention_mask"][compared].sum()), int(compared.sum())


def count_window(window: list[dict], count: Callable[[dict], tuple], device) -> list[float]:
    """What ``count`` gives for a batch, summed over the micro-batches of an optimizer step and over all ranks."""
    counts = torch.tensor([count(batch) for batch in window], dtype=torch.float32, device=device)
    return all_reduce_sum(counts.sum(0)).tolist()


class PackedDataset(Dataset):
    """Blocks of up to ``block_size`` tokens, each a list of whole rows: hardly a pad is left.

    Rows go, in a seeded order, into the fullest block that still has room for them (best fit).
    """

    def __init__(self, dataset, block_size: int, seed: int):
        self.dataset = dataset
        room: list[list[int]] = [[] for _ in range(block_size + 1)]  # tokens of room -> blocks that have it
        self.blocks: list[list[int]] = []
        for i in np.random.default_rng(seed).permutation(len(dataset)).tolist():
            length = int(dataset.lengths[i])
            fitting = next((r for r in range(length, block_size + 1) if room[r]), None)
            if fitting is None:
                block, fitting = len(self.blocks), block_size
                self.blocks.append([])
            else:
                block = room[fitting].pop()
            self.blocks[block].append(i)
            room[fitting - length].append(block)
        self.lengths = np.array([sum(int(dataset.lengths[i]) for i in block) for block in self.blocks])
        self.fill = self.lengths.sum() / (block_size * max(len(self.blocks), 1))

    @property
    def counts(self):
        """What became of the rows, as in the dataset that is packed."""
        return self.dataset.counts

    @property
    def prompt_format(self):
        """With which the rows were written, as in the dataset that is packed."""
        return getattr(self.dataset, "prompt_format", None)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return [self.dataset[i] for i in self.blocks[index]]


@dataclass
class DataCollatorPacked:
    """Blocks of rows -> {input_ids, segment_ids, position_ids, labels}, [batch, length].

    ``segment_ids`` number the rows of a block from 1, 0 at pads; positions begin anew with each row; a row's first
    token is nobody's label, so that no row is predicted from the one before it.
    """

    pad_token_id: int
    mask_prompt: bool = False

    def __call__(self, blocks):
        columns = {"input_ids": [], "segment_ids": [], "position_ids": [], "labels": []}
        for block in blocks:
            rows = block or [{"input_ids": [self.pad_token_id], "answer_spans": [], "answers_only": True}]
            lengths = [len(row["input_ids"]) for row in rows]
            columns["input_ids"].append([i for row in rows for i in row["input_ids"]])
            columns["segment_ids"].append([n for n, length in enumerate(lengths, 1) for _ in range(length)])
            columns["position_ids"].append([position for length in lengths for position in range(length)])
            labels = [learned_labels(row, self.mask_prompt) for row in rows]
            columns["labels"].append([i for row in labels for i in (IGNORE_INDEX, *row[1:])])
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        return {name: pad_rows(rows, fill.get(name, 0))[0] for name, rows in columns.items()}


def ranked_pairs(row: dict) -> list[tuple[int, int]]:
    """(better, worse) places among the answers of a row of step 2; (0, 1) of a plain pair."""
    ids, ranks = row.get("ranked_ids"), row.get("ranks")
    if not ids:
        return [(0, 1)]
    return [(i, j) for i, j in combinations(range(len(ids)), 2) if ranks[i] != ranks[j] and ids[i] != ids[j]]


def are_published(rows) -> bool:
    """Whether rows are tuples, as the published datasets give them, and not the dicts of this project's."""
    return isinstance(rows[0], tuple | list)


def check_pad_id(collator) -> None:
    """Rows as published hold their pad id, or are padded; dicts of ids do not tell it."""
    if collator.pad_token_id is None:
        raise UserError(f"{type(collator).__name__}: rows of ids need pad_token_id=tokenizer.pad_token_id to be padded")


@dataclass
class DataCollatorReward:
    """Rows of step 2 -> {input_ids, attention_mask [answers, length], pair_weights [pairs]}.

    Rows as published, (chosen ids, chosen mask, rejected ids, rejected mask) tensors of one length, need no argument
    here; their batch has no weights, so that the loss is the mean over its pairs.

    A row is a pair, or has answers that are ranked: ``ranked_ids``, best first, and their ``ranks``. Where all are
    pairs, chosen answers come first and then rejected ones, in the same order. A batch with ranked rows also has
    ``pairs`` [pairs, 2], the places of the chosen and the rejected answer: every pair of a ranked row but those of one
    rank or of identical ids, in which nothing is to be learned. They weigh 1 together, so that a prompt with many
    answers counts no more than one with two.
    """

    pad_token_id: int | None = None
    max_length: int | None = None
    pad_to_max_length: bool = False

    def __call__(self, rows):
        if are_published(rows):
            ids, mask = ([torch.atleast_2d(row[place]) for place in (i, i + 2) for row in rows] for i in (0, 1))
            return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}
        check_pad_id(self)
        filler = {"chosen_ids": [self.pad_token_id], "rejected_ids": [self.pad_token_id]}
        if any(row and row.get("ranked_ids") for row in rows):
            return self._with_ranked(rows, filler)
        full = [filler if row is None else row for row in rows]
        weights = torch.tensor([0.0 if row is None else 1.0 for row in rows])
        return {
            **self._padded([row["chosen_ids"] for row in full] + [row["rejected_ids"] for row in full]),
            "pair_weights": weights,
        }

    def _padded(self, answers) -> dict[str, torch.Tensor]:
        to_length = self.max_length if self.pad_to_max_length else None
        ids, mask = pad_rows(answers, self.pad_token_id, to_length=to_length)
        return {"input_ids": ids, "attention_mask": mask}

    def _with_ranked(self, rows, filler) -> dict[str, torch.Tensor]:
        answers, pairs, weights = [], [], []
        for row in rows:
            of_row = ranked_pairs(row) if row else []
            count = len(of_row)
            if not of_row:
                row, of_row = filler, [(0, 1)]
            pairs += [(len(answers) + better, len(answers) + worse) for better, worse in of_row]
            weights += [1 / count if count else 0.0] * len(of_row)
            answers += row.get("ranked_ids") or [row["chosen_ids"], row["rejected_ids"]]
        return {**self._padded(answers), "pair_weights": torch.tensor(weights), "pairs": torch.tensor(pairs)}


@dataclass
class DataCollatorRLHF:
    """Prompts of step 3, left-padded so that answers begin in one column {prompt, prompt_att_mask}, [batch, length].

    Rows that keep columns of the data, as JSON, bring them along: "columns", a list of one dict per row. Rows as
    published, (ids, mask, pad id) tensors with the tokens in reverse, are padded to ``max_token_len``.

    Args:
        inference_tp_size: accepted for old callers: how ranks share a model changes no batch.
    """

    max_token_len: int
    inference_tp_size: int = 1
    _: KW_ONLY
    pad_token_id: int | None = None
    pad_to_max_length: bool = False

    def __call__(self, rows):
        if are_published(rows):
            prompts = [ids[mask.bool()].flip(-1).tolist() for ids, mask, _ in rows]
            return self._padded(prompts, rows[-1][-1], max(self.max_token_len, *map(len, prompts)))
        check_pad_id(self)
        to_length = self.max_token_len if self.pad_to_max_length else None
        batch = self._padded([row["input_ids"] for row in rows], self.pad_token_id, to_length)
        if any("columns" in row for row in rows):
            batch["columns"] = [json.loads(row["columns"]) for row in rows]
        return batch

    @staticmethod
    def _padded(prompts: list[list[int]], pad_id: int, to_length: int | None) -> dict[str, torch.Tensor]:
        ids, mask = pad_rows(prompts, pad_id, side="left", to_length=to_length)
        return {"prompt": ids, "prompt_att_mask": mask}


class NumberedRows(Dataset):
    """Rows of step 2 whose answers have numbers, by which something of each can be looked up; see DataCollatorDPO.

    Args:
        first: the number of the first row's first answer. width: numbers of a row, as many as it may have answers.
    """

    def __init__(self, dataset, first: int, width: int):
        self.dataset, self.lengths, self.first, self.width = dataset, dataset.lengths, first, width

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index] | {"first_number": self.first + int(index) * self.width}


@dataclass
class DataCollatorDPO(DataCollatorReward):
    """Rows of step 2, numbered or not -> the batch of ``DataCollatorReward`` with ``pairs``, and what DPO needs beside.

    ``labels`` [answers, length]: the ids of the answer alone, from where it begins to its end token by its length; -100
    in the prompt and in pads. ``numbers`` [answers]: of NumberedRows; -1 for fillers, and where rows have none.
    """

    def __call__(self, rows):
        check_pad_id(self)
        filler = {"chosen_ids": [self.pad_token_id], "rejected_ids": [self.pad_token_id]}
        batch = self._with_ranked(rows, filler)
        starts, numbers = [], []
        for row in rows:
            of_row = row["answer_starts"] if row and ranked_pairs(row) else [1, 1]  # of a filler: after its only token
            first = row.get("first_number") if row and ranked_pairs(row) else None
            starts += of_row
            numbers += [-1 if first is None else first + place for place in range(len(of_row))]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        is_answer = (torch.arange(ids.shape[1]) >= torch.tensor(starts).unsqueeze(1)) & (mask == 1)
        labels = ids.masked_fill(~is_answer, IGNORE_INDEX)
        return batch | {"labels": labels, "numbers": torch.tensor(numbers)}


def to_device(batch, device):
    """Move every tensor of a (nested) dict, list or tuple; anything else passes through."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


class MiniDataset:
    """Collects generation batches until ``max_size`` of them are there, then hands them out as mini-batches.

    A batch is a dict, list or tuple of [rows, ...] tensors, or anything else that has a length and can be sliced.
    """

    def __init__(self, max_size, small_batch_size):
        self.max_size, self.small_batch_size = max_size, small_batch_size
        self.dataset = []

    def add(self, data):
        """Take one generation batch; the mini-batches once there are enough, else None."""
        if len(self.dataset) >= self.max_size:
            raise ValueError("the dataset is full: call free() after training on it")
        self.dataset.append(data)
        return self.seperate() if len(self.dataset) == self.max_size else None

    def seperate(self):  # spelled as published
        """All mini-batches of what was collected, in order; the collection is emptied."""
        size, batches = self.small_batch_size, []
        for large in self.dataset:
            if isinstance(large, dict):
                rows = len(next(iter(large.values())))
                batches += [{k: v[i : i + size] for k, v in large.items()} for i in range(0, rows, size)]
            elif isinstance(large, list | tuple):
                batches += [[column[i : i + size] for column in large] for i in range(0, len(large[0]), size)]
            else:
                batches += [large[i : i + size] for i in range(0, len(large), size)]
        self.free()
        return batches

    def free(self):
        self.dataset = []
