"""From text files to datasets of ids, split, cached and blended.

    text row -> (prompt, chosen, rejected) -> split by the seeded index -> ids and lengths in an Arrow file
             -> sampler -> collator pads to the longest row of the batch -> engine

A row is (ids, length) all the way: masks come from lengths, never from comparing ids with the pad id. encoding.py makes
ids of text, batching.py makes batches of ids.
"""

import hashlib
import json
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import ConcatDataset, Dataset, Subset

from utils.data import prompt_format
from utils.data.batching import DataCollatorReward, DataCollatorRLHF
from utils.data.encoding import (
    NEEDED_TEXTS,
    SFT,
    PreparationCounts,
    RowEncoder,
    TextEncoder,
    TokenRules,
    block_batch,
    columns_of_step,
)
from utils.data.raw_datasets import DataError, PromptRawDataset, RowReport, SkipRow, open_raw_dataset, text
from utils.data.readers import ConcatRows, Rows, TextFile, content_fingerprint, file_kind, open_splits, splits_of_hub
from utils.distributed import UserError, check_same_on_all_nodes, get_local_rank, once_per_node
from utils.files import name_if_new, scratch_beside, write_text
from utils.utils import print_rank_0, progress

__all__ = [  # what other people's code imports from here, wherever it is written
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

CACHE_VERSION = 4  # part of every cache key: raise it when the rules change what is stored
ROWS_PER_CHUNK = 1000  # rows read, tokenised and written at a time: bounds the memory of preparation
CHUNKS_AHEAD = 2  # chunks in the tokenizer's hands: one is always there when another comes back


def get_raw_dataset(dataset_name, output_path, seed, local_rank, columns=None) -> PromptRawDataset:
    """A known dataset by name, or any path of the user's own."""
    return open_raw_dataset(dataset_name, output_path, seed, local_rank, columns)


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
    with scratch_beside(file) as scratch:
        with open(scratch, "wb") as out:
            np.save(out, indices, allow_pickle=False)
        scratch.replace(file)


# ---------------------------------------------------------------- the cache


class PromptDataset(Dataset):
    """Id rows in a memory-mapped Arrow file: a row is read when it is asked for, no sooner.

    Rows are dicts of Python lists and numbers with the columns that encoding.py names for the step.

    Attributes:
        lengths: [rows] tokens of each row, of the longer answer of a pair: what padding will cost.
    """

    def __init__(self, table: pa.Table, train_phase: int):
        self.table, self.train_phase = table, train_phase
        names = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in table.column_names]
        columns = [pc.list_value_length(table[name]).to_numpy() for name in names]
        self.lengths = np.max(columns, axis=0) if len(table) else np.zeros(0, np.int32)

    @classmethod
    def from_file(cls, file: Path, train_phase: int) -> "PromptDataset":
        with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
            return cls(reader.read_all(), train_phase)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return {name: self.table[name][int(index)].as_py() for name in self.table.column_names}


def _cache_key(raw_dataset, split, tokenizer, rules: TokenRules, data_split, seed, limit) -> str:
    """A name for exactly this content: the same key means the same file, a changed byte anywhere means another."""
    parts = [raw_dataset.fingerprint(), raw_dataset.dataset_name, split, vars(rules), data_split, seed, limit]
    return _key_of(tokenizer, *parts, tokenizer.chat_template if rules.chat_template else None)


def _key_of(tokenizer, *parts) -> str:
    tokenizer_state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    tokenizer_state = hashlib.sha256(tokenizer_state.encode()).hexdigest()
    everything = [CACHE_VERSION, tokenizer_state, tokenizer.eos_token_id, tokenizer.bos_token_id, *parts]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:24]


@contextmanager
def _arrow_file(file: Path, schema: pa.Schema, counts: PreparationCounts):
    """A writer of an Arrow file that appears, with its counts beside it, only when the block has ended well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(file) as scratch:
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            yield writer
        # The counts first: whoever finds the rows finds them too.
        write_text(file.with_suffix(".json"), json.dumps(vars(counts)))
        name_if_new(scratch, file)


def _print_counts(split: str, file: Path) -> None:
    report = file.with_suffix(".json")
    if report.exists():
        print_rank_0(f"data ({split}): {PreparationCounts(**json.loads(report.read_text()))}")


def create_dataset_split(raw_dataset, rows, indices, tokenizer, rules: TokenRules, file: Path) -> PreparationCounts:
    """Tokenise rows[indices] chunk by chunk into an Arrow file that appears only when it is complete."""
    encoder = RowEncoder(raw_dataset, tokenizer, rules)
    chunks = [indices[begin : begin + ROWS_PER_CHUNK] for begin in range(0, len(indices), ROWS_PER_CHUNK)]
    schema = pa.schema(columns_of_step(rules.train_phase))
    with _arrow_file(file, schema, encoder.counts) as writer, ThreadPoolExecutor(CHUNKS_AHEAD) as pool:
        pending = deque()
        # The tokenizer works without Python's lock: meanwhile the last chunk is finished here and the next one read.
        for chunk in progress(chunks, f"tokenising {raw_dataset.dataset_name}"):
            pending.append(pool.submit(encoder.tokenise, encoder.read(rows, chunk)))
            if len(pending) > CHUNKS_AHEAD:
                writer.write_batch(encoder.finish(*pending.popleft().result()))
        for tokenised in pending:
            writer.write_batch(encoder.finish(*tokenised.result()))
        encoder.report.raise_if_none(rows, NEEDED_TEXTS[rules.train_phase])
        encoder.counts.read = str(encoder.report)
    return encoder.counts


def _prepare(
    raw_dataset, split, tokenizer, rules, output_path, data_split, share, seed, limit, rebuild
) -> PromptDataset:
    """One split ("train" or "eval") of one dataset, from the cache or made now by the first rank of each node."""
    content = _key_of(tokenizer, raw_dataset.fingerprint(), tokenizer.chat_template if rules.chat_template else None)
    check_same_on_all_nodes({"the checksum of data and tokenizer": content})
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
                get_local_rank(), output_path, raw_dataset.dataset_name_clean, seed, split, data_split, share, len(rows)
            )
        create_dataset_split(raw_dataset, rows, indices[:limit], tokenizer, rules, file)

    once_per_node(file, build, rebuild)
    _print_counts(split, file)
    return PromptDataset.from_file(file, rules.train_phase)


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
    chat_template=False,
    allow_special_tokens=False,
    columns=None,
    max_train_samples=None,
    max_eval_samples=None,
    rebuild=False,
):
    """(train, eval) PromptDatasets of one dataset for one step; ``data_split`` None uses it whole."""
    try:
        raw_dataset = get_raw_dataset(dataset_name, output_path, seed, local_rank, columns)
        rules = TokenRules(train_phase, max_seq_len, truncation_side, chat_template, allow_special_tokens)
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
    chat_template=False,
    allow_special_tokens=False,
    columns=None,
    max_train_samples=None,
    max_eval_samples=None,
    preprocessing_num_workers=None,
):
    """(train, eval) datasets of one step, blended from all named datasets.

    Args:
        end_of_conversation_token: accepted for old callers; every answer ends with the tokenizer's EOS.
        max_seq_len: tokens of a row; of a prompt in step 3.
        allow_special_tokens: special tokens spelled in the data's texts become these tokens; else they are text.
        reload: tokenise again even if the cache has this very data.
        columns: own column names of a path's files, by prompt, chosen, rejected, messages.
        preprocessing_num_workers: threads of the tokenizer; None for all cores.

    Raises:
        UserError: unknown dataset, bad rows, or a split without a single row.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if preprocessing_num_workers == 1 else "true"
    if preprocessing_num_workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(preprocessing_num_workers)
    options = dict(truncation_side=truncation_side, chat_template=chat_template, columns=columns, rebuild=reload)
    options |= dict(allow_special_tokens=allow_special_tokens)
    options |= dict(max_train_samples=max_train_samples, max_eval_samples=max_eval_samples)
    named = [(name, data_split) for name in data_path]
    if train_phase == SFT:
        named += [(name, None) for name in sft_only_data_path]
    if not named:
        raise UserError("--data_path names no dataset")
    splits = [
        create_dataset(local_rank, name, split, output_path, train_phase, seed, tokenizer, max_seq_len, **options)
        for name, split in named
    ]
    train, evaluation = (BlendedDataset(list(parts)) for parts in zip(*splits, strict=True))
    for name, dataset in (("train", train), ("eval", evaluation)):
        if len(dataset) == 0:
            raise UserError(
                f"no {name} row is left for step {train_phase}: --data_path {' '.join(data_path)} with --data_split "
                f"{data_split} gives this step nothing; see the counts above"
            )
    return _limit(train, max_train_samples), _limit(evaluation, max_eval_samples)


def datasets_of_step(args, tokenizer, train_phase: int, max_seq_len: int):
    """(train, eval) datasets as a step's flags ask for them.

    The tokenizer gets a chat template that writes the training data's form of a prompt, if it has none of its own.
    """
    columns = {name: getattr(args, f"{name}_column") for name in ("prompt", "chosen", "rejected", "messages")}
    train, evaluation = create_prompt_dataset(
        args.local_rank,
        args.data_path,
        args.data_split,
        args.data_output_path,
        train_phase,
        args.seed,
        tokenizer,
        max_seq_len,
        sft_only_data_path=getattr(args, "sft_only_data_path", ()),
        reload=args.rebuild_cache,
        truncation_side=args.truncation_side,
        chat_template=args.chat_template,
        allow_special_tokens=args.allow_special_tokens,
        columns=columns,
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
        preprocessing_num_workers=args.preprocessing_num_workers,
    )
    prompt_format.carry_template(tokenizer, style_of_rows(train, tokenizer))
    return train, evaluation


def style_of_rows(dataset, tokenizer, looked_at: int = 50) -> str:
    """How most of some rows, taken from all over a dataset, are written, as prompt_format names it."""
    styles = Counter()
    for position in np.linspace(0, len(dataset) - 1, min(looked_at, len(dataset)), dtype=int).tolist():
        row = dataset[position]
        ids = row.get("input_ids") or row["chosen_ids"]
        written = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        styles[prompt_format.TURNS if row.get("answers_only") else prompt_format.written_style(written)] += 1
    return styles.most_common(1)[0][0]


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


def _unsupervised_rows(name: str, config_name: str | None) -> tuple[Rows, str]:
    """(rows with a field ``text``, fingerprint of their content): lines of .txt files, any other file or folder of
    rows, or a hub dataset."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    plain = [file for file in files if file.suffix == ".txt"]
    if plain and not any(file_kind(file) for file in files):  # beside data files they are a licence, say
        return ConcatRows([TextFile(file) for file in plain]), content_fingerprint(plain)
    splits = open_splits(path, config_name) if path.exists() else splits_of_hub(name, config_name, [path])
    splits.keep_columns(["text"])
    return splits["train"], splits.fingerprint


def _write_blocks(name: str, rows: Rows, encoder: TextEncoder, block: int, file: Path) -> None:
    """Texts joined by EOS and cut into blocks; a last one that is not full is left."""
    report, counts = RowReport(name), PreparationCounts()
    stream = np.zeros(0, np.int32)
    with _arrow_file(file, pa.schema({"input_ids": pa.list_(pa.int32())}), counts) as writer:
        for begin in progress(range(0, len(rows), ROWS_PER_CHUNK), f"tokenising {name}"):
            texts = []
            for position in range(begin, min(begin + ROWS_PER_CHUNK, len(rows))):
                reason = None
                try:
                    texts.append(text(rows[position], "text"))
                except SkipRow as skip:
                    reason = str(skip)
                report.note(position, reason, rows)
            eos = encoder.tokenizer.eos_token_id
            parts = [np.array([*encoded.ids, eos], np.int32) for encoded in encoder.encode(texts)]
            stream = np.concatenate([stream, *parts])
            count = len(stream) // block
            writer.write_batch(block_batch(stream[: count * block], block))
            stream, counts.kept = stream[count * block :], counts.kept + count
        report.raise_if_none(rows, ["text"])
        counts.read = f"{report}; {counts.kept} blocks of {block} tokens"
        if counts.kept == 0:
            raise DataError(f"{report}; not enough text for one block of {block} tokens")


def get_unsupervised_data(args, tokenizer) -> PromptDataset:
    """Plain text for the ptx loss: rows of prompt + answer length, documents joined by EOS, from the cache or made now.

    Raises:
        UserError: no such text, or less of it than one row.
    """
    name, block = args.unsupervised_dataset_name, args.max_prompt_seq_len + args.max_answer_seq_len
    try:
        rows, fingerprint = _unsupervised_rows(name, args.unsupervised_dataset_config_name)
        key = _key_of(tokenizer, "unsupervised", fingerprint, block, args.allow_special_tokens)
        label = re.sub(r"[^\w.-]+", "_", Path(name).name)
        file = Path(args.data_output_path) / "tokenised" / f"{label}_unsupervised_{key}.arrow"

        def build() -> None:
            encoder = TextEncoder(tokenizer, special_tokens=False, allow_special_tokens=args.allow_special_tokens)
            _write_blocks(name, rows, encoder, block, file)

        once_per_node(file, build, args.rebuild_cache)
    except DataError as error:
        raise UserError(f"--unsupervised_dataset_name {error}") from error
    _print_counts("unsupervised", file)
    return PromptDataset.from_file(file, SFT)
