"""From text files to datasets of ids, split, cached and blended.

    text row -> (prompt, chosen, rejected) -> split by the seeded index -> ids and lengths in an Arrow file
             -> sampler -> collator pads to the longest row of the batch -> engine

A row is (ids, length) all the way: masks come from lengths, never from comparing ids with the pad id. encoding.py makes
ids of text, batching.py makes batches of ids.
"""

import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch.utils.data import ConcatDataset, Subset

from utils.data import prompt_format
from utils.data.cache import PromptDataset, _arrow_file, _cache_key, _key_of, _print_counts
from utils.data.encoding import NEEDED_TEXTS, SFT, PreparationCounts, RowEncoder, TokenRules, columns_of_step
from utils.data.own_files import open_raw_dataset
from utils.data.raw_datasets import PromptRawDataset
from utils.data.readers import DataError
from utils.data.split_index import get_raw_dataset_split_index
from utils.process.console import progress
from utils.process.errors import UserError
from utils.process.ranks import check_same_on_all_nodes, once_per_node
from utils.process.world import get_local_rank

ROWS_PER_CHUNK = 1000  # rows read, tokenised and written at a time: bounds the memory of preparation


CHUNKS_AHEAD = 2  # chunks in the tokenizer's hands: one is always there when another comes back


def get_raw_dataset(dataset_name, output_path, seed, local_rank, columns=None) -> PromptRawDataset:
    """A known dataset by name, or any path of the user's own."""
    return open_raw_dataset(dataset_name, output_path, seed, local_rank, columns)


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
        get_local_rank(),
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
