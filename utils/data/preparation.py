"""From named datasets to datasets of ids: opened, shared out over the steps, tokenised into the cache, blended.

encoding.py makes ids of text, cache.py keeps them, batching.py makes batches of them.
"""

import os
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch.utils.data import ConcatDataset, Subset

from utils.data import prompt_format
from utils.data.cache import PromptDataset, cache_writer, content_key, print_counts
from utils.data.encoding import NEEDED_TEXTS, SFT, RowEncoder, TokenRules
from utils.data.own_files import get_raw_dataset
from utils.data.raw_datasets import PromptRawDataset
from utils.data.readers import DataError, ListRows, Rows
from utils.data.split_index import get_raw_dataset_split_index
from utils.process.console import progress
from utils.process.errors import UserError
from utils.process.ranks import check_same_on_all_nodes, once_per_node
from utils.process.world import get_local_rank

ROWS_PER_CHUNK = 1000  # rows read, tokenised and written at a time: bounds the memory of preparation
CHUNKS_AHEAD = 2  # chunks in the tokenizer's hands: one is always there when another comes back


@dataclass(frozen=True)
class DataRequest:
    """What one step asks of its data.

    Attributes:
        rules: how texts become ids, for which step.
        data_path: datasets, each a known name or a path.
        data_split: shares of the steps in each of them, as in "2,4,4"; None: the step gets all rows.
        output_path: folder of the files that record the split, and of the cache.
        seed: of the split.
        whole_data_path: further datasets, of which the step gets all rows.
        columns: own column names of a path's files, by prompt, chosen, rejected, messages.
        max_train_samples: rows to keep; None for all. So max_eval_samples.
        rebuild: tokenise again even if the cache has this very data.
        workers: threads of the tokenizer; None for all cores.
    """

    rules: TokenRules
    data_path: Sequence[str]
    data_split: str | None
    output_path: str | os.PathLike
    seed: int
    whole_data_path: Sequence[str] = ()
    columns: Mapping[str, str | None] | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    rebuild: bool = False
    workers: int | None = None


# ---------------------------------------------------------------- what a step calls


def datasets_of_step(args, tokenizer, train_phase: int, max_seq_len: int):
    """(train, eval) datasets as a step's flags ask for them.

    The tokenizer gets a chat template that writes the training data's form of a prompt, if it has none of its own.

    Raises:
        UserError: as prepare_datasets.
    """
    rules = TokenRules(train_phase, max_seq_len, args.truncation_side, args.chat_template, args.allow_special_tokens)
    request = DataRequest(
        rules,
        args.data_path,
        args.data_split,
        args.data_output_path,
        args.seed,
        whole_data_path=args.sft_only_data_path if train_phase == SFT else (),
        columns={name: getattr(args, f"{name}_column") for name in ("prompt", "chosen", "rejected", "messages")},
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
        rebuild=args.rebuild_cache,
        workers=args.preprocessing_num_workers,
    )
    train, evaluation = prepare_datasets(request, tokenizer)
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


# ---------------------------------------------------------------- from a request to datasets


class BlendedDataset(ConcatDataset):
    """Several PromptDatasets one after another; ``lengths`` as in PromptDataset."""

    def __init__(self, datasets):
        super().__init__(datasets)
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])


def prepare_datasets(request: DataRequest, tokenizer):
    """(train, eval) datasets, blended from all that a request names.

    Raises:
        UserError: unknown dataset, bad rows, or a split without a single row.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if request.workers == 1 else "true"
    if request.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(request.workers)
    named = [(name, request.data_split) for name in request.data_path]
    named += [(name, None) for name in request.whole_data_path]
    if not named:
        raise UserError("--data_path names no dataset")
    splits = [prepare_dataset(name, data_split, request, tokenizer) for name, data_split in named]
    train, evaluation = (BlendedDataset(list(parts)) for parts in zip(*splits, strict=True))
    for name, dataset in (("train", train), ("eval", evaluation)):
        if len(dataset) == 0:
            raise UserError(
                f"no {name} row is left for step {request.rules.train_phase}: --data_path "
                f"{' '.join(request.data_path)} with --data_split {request.data_split} gives this step nothing; see "
                "the counts above"
            )
    return _limit(train, request.max_train_samples), _limit(evaluation, request.max_eval_samples)


def _limit(dataset, count: int | None):
    if count is None or len(dataset) <= count:
        return dataset
    limited = Subset(dataset, range(count))
    limited.lengths = dataset.lengths[:count]
    return limited


def prepare_dataset(name: str, data_split: str | None, request: DataRequest, tokenizer) -> tuple[PromptDataset, ...]:
    """(train, eval) PromptDatasets of one dataset; ``data_split`` None uses it whole."""
    try:
        raw_dataset = get_raw_dataset(name, request.output_path, request.seed, get_local_rank(), request.columns)
        return tuple(_prepare_split(raw_dataset, split, data_split, request, tokenizer) for split in ("train", "eval"))
    except DataError as error:
        raise UserError(str(error)) from error


def _prepare_split(
    raw_dataset: PromptRawDataset, split: str, data_split: str | None, request: DataRequest, tokenizer
) -> PromptDataset:
    """One split ("train" or "eval") of one dataset, from the cache or made now by the first rank of each node."""
    rules, output_path, seed = request.rules, request.output_path, request.seed
    limit = request.max_train_samples if split == "train" else request.max_eval_samples
    content = [raw_dataset.fingerprint(), tokenizer.chat_template if rules.chat_template else None]
    check_same_on_all_nodes({"the checksum of data and tokenizer": content_key(tokenizer, *content)})
    dataset_name = raw_dataset.dataset_name_clean
    key = content_key(tokenizer, *content, raw_dataset.dataset_name, split, vars(rules), data_split, seed, limit)
    file = Path(output_path) / "tokenised" / f"{dataset_name}_{split}_step{rules.train_phase}_{key}.arrow"

    def build() -> None:
        rows = raw_dataset.get_train_data() if split == "train" else raw_dataset.get_eval_data()
        indices = np.arange(len(rows))
        if data_split is not None:
            place = get_local_rank(), output_path, dataset_name, seed, split
            indices = get_raw_dataset_split_index(*place, data_split, rules.train_phase - 1, len(rows))
        encoder = RowEncoder(raw_dataset, tokenizer, rules)
        with cache_writer(file, encoder.schema, encoder.counts) as writer:
            encode_rows(encoder, rows, indices[:limit], writer)

    once_per_node(file, build, request.rebuild)
    print_counts(split, file)
    return PromptDataset.from_file(file, rules.train_phase)


def encode_rows(encoder: RowEncoder, rows: Rows, indices: np.ndarray, writer: pa.RecordBatchFileWriter) -> None:
    """Write the ids of rows[indices], chunk by chunk, and count in the encoder what became of the rows.

    Raises:
        DataError: not one of the rows can be used.
    """
    chunks = [indices[begin : begin + ROWS_PER_CHUNK] for begin in range(0, len(indices), ROWS_PER_CHUNK)]
    with ThreadPoolExecutor(CHUNKS_AHEAD) as pool:
        pending = deque()
        # The tokenizer works without Python's lock: meanwhile the last chunk is finished here and the next one read.
        for chunk in progress(chunks, f"tokenising {encoder.report.label}"):
            pending.append(pool.submit(encoder.tokenise, encoder.read(rows, chunk)))
            if len(pending) > CHUNKS_AHEAD:
                writer.write_batch(encoder.finish(*pending.popleft().result()))
        for tokenised in pending:
            writer.write_batch(encoder.finish(*tokenised.result()))
    encoder.report.raise_if_none(rows, NEEDED_TEXTS[encoder.rules.train_phase])
    encoder.counts.read = str(encoder.report)


# ---------------------------------------------------------------- the published calls


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
    chat_template=False,
    allow_special_tokens=False,
    columns=None,
    max_train_samples=None,
    max_eval_samples=None,
    preprocessing_num_workers=None,
):
    """(train, eval) datasets of one step, blended from all named datasets; see DataRequest.

    Args:
        local_rank, end_of_conversation_token: accepted for old callers. A process knows its rank, and every answer
            ends with the tokenizer's EOS.
        max_seq_len: tokens of a row; of a prompt in step 3.
        allow_special_tokens: special tokens spelled in the data's texts become these tokens; else they are text.

    Raises:
        UserError: as prepare_datasets.
    """
    request = DataRequest(
        TokenRules(train_phase, max_seq_len, chat_template=chat_template, allow_special_tokens=allow_special_tokens),
        data_path,
        data_split,
        output_path,
        seed,
        whole_data_path=sft_only_data_path if train_phase == SFT else (),
        columns=columns,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
        rebuild=reload,
        workers=preprocessing_num_workers,
    )
    return prepare_datasets(request, tokenizer)


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
    rules = TokenRules(train_phase, max_seq_len)
    request = DataRequest(rules, [dataset_name], data_split, output_path, seed, rebuild=rebuild)
    return prepare_dataset(dataset_name, data_split, request, tokenizer)


def create_dataset_split(
    current_dataset, raw_dataset, train_phase, tokenizer, end_of_conversation_token, max_seq_len
) -> PromptDataset:
    """A PromptDataset, in memory, of rows that the caller has chosen from a raw dataset.

    Raises:
        DataError: not one of the rows can be used.
    """
    rows = current_dataset
    if not isinstance(rows, Rows):
        rows = ListRows(list(current_dataset), raw_dataset.dataset_name)
    encoder = RowEncoder(raw_dataset, tokenizer, TokenRules(train_phase, max_seq_len))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, encoder.schema) as writer:
        encode_rows(encoder, rows, np.arange(len(rows)), writer)
    return PromptDataset(pa.ipc.open_file(sink.getvalue()).read_all(), train_phase)
