"""From text rows to padded batches.

    text row -> (prompt, chosen, rejected) -> split by the seeded index -> ids and lengths in an Arrow file
             -> sampler -> collator pads to the longest row of the batch -> engine

A row is (ids, length) all the way: masks come from lengths, never from comparing ids with the pad id.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from utils.data.raw_datasets import DataError, PromptRawDataset, RowReport, open_raw_dataset
from utils.distributed import UserError, get_rank, get_world_size, once_per_node
from utils.utils import print_rank_0, progress

CACHE_VERSION = 1  # part of every cache key: raise it when the rules below change what is stored
ROWS_PER_CHUNK = 2000  # rows tokenised and written at a time: bounds the memory of preparation
IGNORE_INDEX = -100
SFT, REWARD, RLHF = 1, 2, 3
NEEDED_TEXTS = {SFT: ("prompt", "chosen"), REWARD: ("prompt", "chosen", "rejected"), RLHF: ("prompt",)}


def get_raw_dataset(dataset_name, output_path, seed, local_rank) -> PromptRawDataset:
    """A known dataset by name, or any path of the user's own."""
    return open_raw_dataset(dataset_name, output_path, seed, local_rank)


# ---------------------------------------------------------------- the split


def get_shuffle_idx(seed, size) -> np.ndarray:
    """arange(size), shuffled by RandomState(seed); uint32 below 2**32 - 2 rows, as published, since dtype matters."""
    indices = np.arange(size, dtype=np.uint32 if size < np.iinfo(np.uint32).max - 1 else np.int64)
    np.random.RandomState(seed=seed).shuffle(indices)
    return indices


def split_boundaries(data_split: str, data_size: int) -> list[int]:
    """Where each share begins and ends: len(shares) + 1 numbers.

    The published rule: each boundary is the last plus the rounded share; the rounding slack is then taken from every
    boundary but the first. Where that would step back below zero or below the boundary before (a zero first
    share), the boundary is clamped, so that shares never overlap.
    """
    try:
        shares = [float(share) for share in data_split.split(",")]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(
            f"--data_split {data_split!r}: expected shares of 0 or more with commas between them, as in 2,4,4"
        )
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share / sum(shares) * float(data_size)))
    slack = boundaries[-1] - data_size
    boundaries = [0] + [boundary - slack for boundary in boundaries[1:]]
    return np.maximum.accumulate(np.clip(boundaries, 0, data_size)).tolist()


def get_raw_dataset_split_index(
    local_rank, output_path, dataset_name, seed, split_name, data_split, split_index, data_size, rebuild=False
) -> np.ndarray:
    """The row numbers of one share, the same on every machine.

    They are computed, not trusted from an earlier run, whose data may have been larger; one .npy file per share
    records them for the reader.
    """
    boundaries = split_boundaries(data_split, data_size)
    if not 0 <= split_index < len(boundaries) - 1:
        raise UserError(f"--data_split {data_split!r} has no share for step {split_index + 1}")
    shuffled = get_shuffle_idx(seed, data_size)
    if local_rank <= 0:
        for i in range(len(boundaries) - 1):
            file = Path(output_path) / f"{dataset_name}_seed{seed}_{split_name}_{data_split}_{i}.npy"
            _write_split_file(file, shuffled[boundaries[i] : boundaries[i + 1]])
    return shuffled[boundaries[split_index] : boundaries[split_index + 1]]


def _write_split_file(file: Path, indices: np.ndarray) -> None:
    if file.exists():
        try:
            known = np.load(file, allow_pickle=False)
            if known.dtype == indices.dtype and np.array_equal(known, indices):
                return
        except (ValueError, OSError, EOFError):
            pass  # a torn file of some earlier crash: written anew below
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    with open(scratch, "wb") as out:
        np.save(out, indices, allow_pickle=False)
    os.replace(scratch, file)


# ---------------------------------------------------------------- text to ids


@dataclass(frozen=True)
class TokenRules:
    """All that decides how a text becomes ids, besides the tokenizer; part of the cache key."""

    train_phase: int
    max_seq_len: int
    truncation_side: str = "left"


@dataclass
class PreparationCounts:
    """What happened to the rows of one dataset split, printed with every run so that no loss is silent."""

    read: str = ""  # rows used and skipped, with reasons and places
    kept: int = 0
    truncated: int = 0
    without_eos: int = 0
    identical: int = 0

    def __str__(self):
        parts = [self.read]
        if self.truncated:
            parts.append(f"{self.truncated} too long and truncated")
        if self.without_eos:
            parts.append(f"{self.without_eos} of them lost an answer's end")
        if self.identical:
            parts.append(f"{self.identical} pairs dropped, their answers being identical")
        return ", ".join(parts)


def _answer_start(encoding, text_length: int, prompt_length: int) -> int:
    """The index of the first token of the answer in the encoding of prompt + answer.

    Tokenizers may leave blanks out of a token's span, so the first character that belongs to a token decides.
    """
    for position in range(prompt_length, text_length):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return len(encoding.ids)


def encode_with_prompt(tokenizer, prompts: list[str], texts: list[str]) -> list[tuple[list[int], int]]:
    """Encode full texts (prompt + answer) and say how many tokens of each are prompt. No EOS is added here."""
    batch = tokenizer(texts, add_special_tokens=True)
    if tokenizer.is_fast:
        starts = [
            _answer_start(encoding, len(text), len(prompt))
            for encoding, text, prompt in zip(batch.encodings, texts, prompts, strict=True)
        ]
    else:
        alone = tokenizer(prompts, add_special_tokens=True)["input_ids"]
        starts = [
            next((i for i, (a, b) in enumerate(zip(full, prompt, strict=False)) if a != b), min(len(full), len(prompt)))
            for full, prompt in zip(batch["input_ids"], alone, strict=True)
        ]
    return [(_without_final_eos(tokenizer, ids), start) for ids, start in zip(batch["input_ids"], starts, strict=True)]


def _without_final_eos(tokenizer, ids: list[int]) -> list[int]:
    """Some tokenizers end every text with EOS by themselves; the one EOS of a finished answer is added by ``fit``."""
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def _leading_specials(tokenizer) -> int:
    """How many tokens (BOS and the like) the tokenizer puts before every text."""
    with_specials, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_specials) - len(without) + 1):
        if with_specials[start : start + len(without)] == without:
            return start
    return 0


def prompt_tokens_to_drop(length: int, prompt_length: int, max_length: int, leading: int) -> int:
    """How many tokens a prompt loses at its beginning so that prompt, answer and EOS (``length``) fit ``max_length``.

    The ``leading`` special tokens always stay. Where not even the bare answer would fit, dropping the whole prompt
    would not
    save its end: the prompt then keeps up to half the room.
    """
    answer_fits = length - prompt_length <= max_length - leading
    needed = length - max_length if answer_fits else prompt_length - max_length // 2
    return max(0, min(needed, prompt_length - leading))


def fit(ids, prompt_length, eos_token_id, max_length, leading=0, drop=0):
    """End an answer with exactly one EOS, drop ``drop`` tokens of its prompt, and cut what is still too long at the
    end.

    Returns:
        (ids, prompt_length, was it cut); without the EOS where the answer lost its end.
    """
    ids = ids[:leading] + ids[leading + drop :] + [eos_token_id]
    was_cut = drop > 0 or len(ids) > max_length
    return ids[:max_length], min(prompt_length - drop, max_length), was_cut


class RowEncoder:
    """Turns text rows of one dataset into id rows under the rules of one step."""

    def __init__(self, raw_dataset, tokenizer, rules: TokenRules):
        self.raw, self.tokenizer, self.rules = raw_dataset, tokenizer, rules
        self.eos = tokenizer.eos_token_id
        self.leading = _leading_specials(tokenizer)
        self.counts = PreparationCounts()
        self.report = RowReport(raw_dataset.dataset_name)
        if rules.train_phase == REWARD and not raw_dataset.has_rejected:
            raise UserError(f"--data_path {raw_dataset.dataset_name}: has no rejected answers, so step 2 cannot use it")

    def encode(self, rows, positions) -> list[dict]:
        """Id rows of the text rows at these positions; one that lacks a text is skipped and counted with its place."""
        found = [
            self.raw.usable_row(rows, int(i), NEEDED_TEXTS[self.rules.train_phase], self.report) for i in positions
        ]
        samples = [sample for sample in found if sample is not None]
        if not samples:
            return []
        encoded = {SFT: self._sft, REWARD: self._reward, RLHF: self._rlhf}[self.rules.train_phase](samples)
        self.counts.kept += len(encoded)
        return encoded

    def _drop(self, ids, prompt_length) -> int:
        if self.rules.truncation_side == "right":
            return 0
        return prompt_tokens_to_drop(len(ids) + 1, prompt_length, self.rules.max_seq_len, self.leading)

    def _fit(self, ids, prompt_length, drop):
        return fit(ids, prompt_length, self.eos, self.rules.max_seq_len, self.leading, drop)

    def _note(self, was_cut: bool, ends: bool) -> None:
        self.counts.truncated += was_cut
        self.counts.without_eos += not ends

    def _sft(self, samples):
        prompts = [self.raw.get_prompt(sample) for sample in samples]
        texts = [self.raw.get_prompt_and_chosen(sample) for sample in samples]
        rows = []
        for ids, prompt_length in encode_with_prompt(self.tokenizer, prompts, texts):
            ids, prompt_length, was_cut = self._fit(ids, prompt_length, self._drop(ids, prompt_length))
            self._note(was_cut, ids[-1] == self.eos)
            rows.append({"input_ids": ids, "prompt_length": prompt_length})
        return rows

    def _reward(self, samples):
        prompts = [self.raw.get_prompt(sample) for sample in samples]
        chosen = [self.raw.get_prompt_and_chosen(sample) for sample in samples]
        rejected = [self.raw.get_prompt_and_rejected(sample) for sample in samples]
        rows = []
        encoded = encode_with_prompt(self.tokenizer, prompts + prompts, chosen + rejected)
        for (c_ids, c_start), (r_ids, r_start) in zip(encoded[: len(prompts)], encoded[len(prompts) :], strict=True):
            # Both answers follow the same prompt tokens: the one that needs more room decides how much of it goes.
            drop = max(self._drop(c_ids, c_start), self._drop(r_ids, r_start))
            c_ids, c_prompt, c_cut = self._fit(c_ids, c_start, drop)
            r_ids, _, r_cut = self._fit(r_ids, r_start, drop)
            if c_ids == r_ids:
                self.counts.identical += 1
                continue
            self._note(c_cut or r_cut, c_ids[-1] == r_ids[-1] == self.eos)
            rows.append({"chosen_ids": c_ids, "rejected_ids": r_ids, "prompt_length": c_prompt})
        return rows

    def _rlhf(self, samples):
        rows, limit = [], self.rules.max_seq_len
        for ids in self.tokenizer([self.raw.get_prompt(sample) for sample in samples])["input_ids"]:
            ids = _without_final_eos(self.tokenizer, ids)
            self.counts.truncated += len(ids) > limit
            if len(ids) > limit:
                # The end of a prompt holds the question, so either side's rule drops its beginning.
                ids = ids[: self.leading] + ids[len(ids) - limit + self.leading :]
            rows.append({"input_ids": ids})
        return rows


# ---------------------------------------------------------------- the cache

ID_COLUMNS = {SFT: ["input_ids"], REWARD: ["chosen_ids", "rejected_ids"], RLHF: ["input_ids"]}


def _schema(train_phase: int) -> pa.Schema:
    names = [(name, pa.list_(pa.int32())) for name in ID_COLUMNS[train_phase]]
    return pa.schema(names + ([] if train_phase == RLHF else [("prompt_length", pa.int32())]))


class PromptDataset(Dataset):
    """Id rows in a memory-mapped Arrow file: a row is read when it is asked for, no sooner.

    Rows are dicts of Python lists and ints: ``input_ids`` and ``prompt_length`` (step 1), ``chosen_ids``,
    ``rejected_ids`` and ``prompt_length`` (step 2), ``input_ids`` (step 3). Index ``FILLER`` gives a row that weighs
    nothing.
    """

    def __init__(self, table: pa.Table, train_phase: int):
        self.table, self.train_phase = table, train_phase
        self.lengths = self._row_lengths()

    @classmethod
    def from_file(cls, file: Path, train_phase: int) -> "PromptDataset":
        with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
            return cls(reader.read_all(), train_phase)

    def _row_lengths(self) -> np.ndarray:
        """[rows] tokens of each row (of the longer answer of a pair): what padding will cost."""
        columns = [pc.list_value_length(self.table[name]) for name in ID_COLUMNS[self.train_phase]]
        return np.max([column.to_numpy() for column in columns], axis=0) if len(self.table) else np.zeros(0, np.int32)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return {name: self.table[name][int(index)].as_py() for name in self.table.column_names}


def _cache_key(raw_dataset, split, tokenizer, rules: TokenRules, data_split, seed, limit) -> str:
    """A name for exactly this content: the same key means the same file, a changed byte anywhere means another."""
    tokenizer_state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    parts = [
        CACHE_VERSION,
        raw_dataset.fingerprint(),
        raw_dataset.dataset_name,
        split,
        vars(rules),
        data_split,
        seed,
        limit,
    ]
    parts += [hashlib.sha256(tokenizer_state.encode()).hexdigest(), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def create_dataset_split(raw_dataset, rows, indices, tokenizer, rules: TokenRules, file: Path) -> None:
    """Tokenise rows[indices] in batches into an Arrow file that appears only when it is complete."""
    encoder = RowEncoder(raw_dataset, tokenizer, rules)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        schema = _schema(rules.train_phase)
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for begin in progress(range(0, len(indices), ROWS_PER_CHUNK), f"tokenising {raw_dataset.dataset_name}"):
                encoded = encoder.encode(rows, indices[begin : begin + ROWS_PER_CHUNK])
                writer.write_batch(pa.RecordBatch.from_pylist(encoded, schema=schema))
        encoder.report.raise_if_none(rows, NEEDED_TEXTS[rules.train_phase])
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
    encoder.counts.read = str(encoder.report)
    file.with_suffix(".json").write_text(json.dumps(vars(encoder.counts)))


def _prepare(
    raw_dataset, split, tokenizer, rules, output_path, data_split, share, seed, limit, rebuild
) -> PromptDataset:
    """One split ("train" or "eval") of one dataset, from the cache or made now by the first rank of each node."""
    key = _cache_key(raw_dataset, split, tokenizer, rules, f"{data_split}/{share}", seed, limit)
    file = (
        Path(output_path)
        / "tokenised"
        / f"{raw_dataset.dataset_name_clean}_{split}_step{rules.train_phase}_{key}.arrow"
    )

    def build() -> None:
        rows = raw_dataset.get_train_data() if split == "train" else raw_dataset.get_eval_data()
        if share is None:
            indices = np.arange(len(rows))
        else:
            indices = get_raw_dataset_split_index(
                get_rank(), output_path, raw_dataset.dataset_name_clean, seed, split, data_split, share, len(rows)
            )
        create_dataset_split(raw_dataset, rows, indices[:limit], tokenizer, rules, file)

    once_per_node(file, build, rebuild)
    dataset = PromptDataset.from_file(file, rules.train_phase)
    report = file.with_suffix(".json")
    if report.exists():
        counts = PreparationCounts(**json.loads(report.read_text()))
        print_rank_0(f"data ({split}): {counts}")
    return dataset


def create_dataset(
    local_rank,
    dataset_name,
    data_split,
    output_path,
    train_phase,
    seed,
    tokenizer,
    max_seq_len,
    *,
    truncation_side="left",
    max_train_samples=None,
    max_eval_samples=None,
    rebuild=False,
):
    """(train, eval) PromptDatasets of one dataset for one step; ``data_split`` None uses it whole."""
    try:
        raw_dataset = get_raw_dataset(dataset_name, output_path, seed, local_rank)
        rules = TokenRules(train_phase, max_seq_len, truncation_side)
        share = None if data_split is None else train_phase - 1
        return tuple(
            _prepare(raw_dataset, split, tokenizer, rules, output_path, data_split, share, seed, limit, rebuild)
            for split, limit in (("train", max_train_samples), ("eval", max_eval_samples))
        )
    except DataError as error:
        raise UserError(str(error)) from error


class BlendedDataset(ConcatDataset):
    """Several PromptDatasets one after another; ``lengths`` as in PromptDataset."""

    def __init__(self, datasets):
        super().__init__(datasets)
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])


def _limit(dataset, count):
    if count is None or len(dataset) <= count:
        return dataset
    limited = Subset(dataset, range(count))
    limited.lengths = dataset.lengths[:count]
    return limited


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
    *,
    truncation_side="left",
    max_train_samples=None,
    max_eval_samples=None,
):
    """(train, eval) datasets of one step, blended from all named datasets.

    Args:
        end_of_conversation_token: accepted for old callers; every answer ends with the tokenizer's EOS.
        max_seq_len: tokens of a row; of a prompt in step 3.
        reload: tokenise again even if the cache has this very data.

    Raises:
        UserError: unknown dataset, bad rows, or a split without a single row.
    """
    options = dict(truncation_side=truncation_side, rebuild=reload)
    options |= dict(max_train_samples=max_train_samples, max_eval_samples=max_eval_samples)
    splits = [
        create_dataset(local_rank, name, data_split, output_path, train_phase, seed, tokenizer, max_seq_len, **options)
        for name in data_path
    ]
    if train_phase == SFT:
        splits += [
            create_dataset(local_rank, name, None, output_path, train_phase, seed, tokenizer, max_seq_len, **options)
            for name in sft_only_data_path
        ]
    if not splits:
        raise UserError("--data_path names no dataset")
    train, evaluation = (BlendedDataset(list(parts)) for parts in zip(*splits, strict=True))
    for name, dataset in (("train", train), ("eval", evaluation)):
        if len(dataset) == 0:
            raise UserError(
                f"no {name} row is left for step {train_phase}: --data_path {' '.join(data_path)} with --data_split "
                f"{data_split} gives this step nothing; see the counts above"
            )
    return _limit(train, max_train_samples), _limit(evaluation, max_eval_samples)


# ---------------------------------------------------------------- sampling and padding

FILLER = None  # an index that stands for no row: it keeps the ranks in step where rows run out, and weighs nothing


class StepBatchSampler(Sampler):
    """Micro-batches of row indices for one rank, such that every world size sees the same rows in the same step.

    An epoch is a seeded permutation, cut into the rows of one optimizer step (micro-batch x ranks x accumulation);
    rows of a step are dealt to micro-batches and ranks. With ``group_by_length`` the permutation is sorted by length
    within windows of many steps and the steps are shuffled again, so that rows of a batch need little padding. The
    last step may be
    short: missing rows are ``FILLER``, so that all ranks run the same number of forward passes and no row is lost or
        repeated.
    """

    WINDOW_STEPS = 50

    def __init__(
        self, lengths, micro_batch_size, accumulation=1, seed=0, shuffle=True, group_by_length=False, drop_last=False
    ):
        self.lengths, self.micro, self.accumulation = np.asarray(lengths), micro_batch_size, accumulation
        self.seed, self.shuffle, self.group_by_length, self.drop_last = seed, shuffle, group_by_length, drop_last
        self.rank, self.world = get_rank(), get_world_size()
        self.epoch = 0

    @property
    def rows_per_pass(self) -> int:
        return self.micro * self.world

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_pass * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

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
        for i in range(len(self)):
            yield order[i * self.rows_per_pass : (i + 1) * self.rows_per_pass][self.rank :: self.world]


def make_loader(dataset, sampler: StepBatchSampler, collator) -> DataLoader:
    return DataLoader(_WithFillers(dataset), batch_sampler=sampler, collate_fn=collator)


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


def pad_rows(rows: list[list[int]], pad_token_id: int, side: str = "right", to_length: int | None = None):
    """Pad id lists to the longest (rounded up to a multiple of 8), or to ``to_length``.

    Returns:
        input_ids [rows, length] int64, attention_mask [rows, length] int64 from the lengths
    """
    longest = max(len(row) for row in rows)
    length = to_length or -(-max(longest, 1) // 8) * 8
    ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


@dataclass
class DataCollatorSFT:
    """Rows of step 1 -> {input_ids, attention_mask, labels}, [batch, length]; labels -100 at pads (and prompts)."""

    pad_token_id: int
    max_length: int
    mask_prompt: bool = False
    pad_to_max_length: bool = False

    def __call__(self, rows):
        filler = {"input_ids": [self.pad_token_id], "prompt_length": 1}
        full = [filler if row is None else row for row in rows]
        ids, mask = pad_rows(
            [r["input_ids"] for r in full],
            self.pad_token_id,
            to_length=self.max_length if self.pad_to_max_length else None,
        )
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        for i, row in enumerate(rows):
            if row is None:
                labels[i] = IGNORE_INDEX
            elif self.mask_prompt:
                labels[i, : row["prompt_length"]] = IGNORE_INDEX
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class DataCollatorReward:
    """Rows of step 2 -> {input_ids, attention_mask [2 * pairs, length], pair_weights [pairs]}, chosen first."""

    pad_token_id: int
    max_length: int
    pad_to_max_length: bool = False

    def __call__(self, rows):
        filler = {"chosen_ids": [self.pad_token_id], "rejected_ids": [self.pad_token_id]}
        full = [filler if row is None else row for row in rows]
        ids, mask = pad_rows(
            [row["chosen_ids"] for row in full] + [row["rejected_ids"] for row in full],
            self.pad_token_id,
            to_length=self.max_length if self.pad_to_max_length else None,
        )
        weights = torch.tensor([0.0 if row is None else 1.0 for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "pair_weights": weights}


@dataclass
class DataCollatorRLHF:
    """Prompts of step 3, left-padded so that answers begin in one column {prompt, prompt_att_mask}, [batch, length]."""

    pad_token_id: int
    max_token_len: int
    pad_to_max_length: bool = False

    def __call__(self, rows):
        ids, mask = pad_rows(
            [row["input_ids"] for row in rows],
            self.pad_token_id,
            side="left",
            to_length=self.max_token_len if self.pad_to_max_length else None,
        )
        return {"prompt": ids, "prompt_att_mask": mask}


# ---------------------------------------------------------------- experience, unsupervised text


class MiniDataset:
    """Collects generation batches until ``max_size`` of them are there, then hands them out as mini-batches.

    Items may be lists, dicts of [rows, ...] tensors, or records with an ``index(rows)`` method and a static ``concat``.
    """

    def __init__(self, max_size, small_batch_size):
        self.max_size, self.small_batch_size = max_size, small_batch_size
        self.dataset = []

    def add(self, data):
        """Take one generation batch; the mini-batches once there are enough, else None."""
        if len(self.dataset) >= self.max_size:
            raise ValueError("the dataset is full: call free() after training on it")
        self.dataset.append(data)
        return self.separate() if len(self.dataset) == self.max_size else None

    def separate(self):
        """All mini-batches of what was collected, in order; the collection is emptied."""
        size, batches = self.small_batch_size, []
        for large in self.dataset:
            if isinstance(large, dict):
                rows = len(next(iter(large.values())))
                batches += [{k: v[i : i + size] for k, v in large.items()} for i in range(0, rows, size)]
            else:
                batches += [large[i : i + size] for i in range(0, len(large), size)]
        self.free()
        return batches

    def free(self):
        self.dataset = []


def _unsupervised_texts(name: str, config_name: str | None):
    """Texts of a .txt or .jsonl file (field ``text``), or of a hub dataset with a column ``text``."""
    path = Path(name)
    if path.is_file():
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if path.suffix != ".jsonl":
                    yield line
                    continue
                try:
                    yield json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: expected a JSON object with a field text") from error
        return
    import datasets

    try:
        rows = datasets.load_dataset(name, config_name, split="train")
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(
            f"--unsupervised_dataset_name {name}: no such file, and not loadable from the hub: {error}"
        ) from error
    if "text" not in rows.column_names:
        raise UserError(f"--unsupervised_dataset_name {name}: has no column text, only {', '.join(rows.column_names)}")
    yield from (row["text"] for row in rows)


def get_unsupervised_data(args, tokenizer) -> list[list[int]]:
    """Plain text for the ptx loss, joined with EOS between documents and cut into blocks of prompt + answer length."""
    block = args.max_prompt_seq_len + args.max_answer_seq_len
    stream, blocks, seen = [], [], Counter()
    for text in _unsupervised_texts(args.unsupervised_dataset_name, args.unsupervised_dataset_config_name):
        if not text.strip():
            continue
        seen["texts"] += 1
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        while len(stream) >= block:
            blocks.append(stream[:block])
            stream = stream[block:]
    if not blocks:
        raise UserError(
            f"--unsupervised_dataset_name {args.unsupervised_dataset_name}: less text than one block of {block} tokens"
        )
    print_rank_0(
        f"data: {args.unsupervised_dataset_name} (unsupervised): "
        f"{seen['texts']} texts, {len(blocks)} blocks of {block} tokens"
    )
    return blocks
