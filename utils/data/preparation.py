"""From named datasets to datasets of ids: opened, shared out over the steps, tokenised into the cache, blended.

encoding.py makes ids of text, cache.py keeps them, batching.py makes batches of them.
"""

import os
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch.utils.data import ConcatDataset

from utils.data import prompt_format
from utils.data.batching import IGNORE_INDEX, learned_labels
from utils.data.cache import PromptDataset, cache_writer, content_key, print_counts, read_counts
from utils.data.encoding import NEEDED_TEXTS, SFT, PreparationCounts, RowEncoder, TokenRules, check_rows
from utils.data.errors import DataError, NoUsableRows
from utils.data.own_files import get_raw_dataset
from utils.data.raw_datasets import PromptRawDataset, find_known_dataset
from utils.data.row_texts import RowReport
from utils.data.rows import ListRows, Rows, SubsetRows
from utils.data.sources import DataSource, sources_of_step
from utils.data.split_index import DATA_SPLIT, get_raw_dataset_split_index, get_shuffle_idx, split_boundaries
from utils.process.console import print_rank_0, progress
from utils.process.errors import UserError
from utils.process.files import write_text
from utils.process.ranks import agree, check_same_on_all_nodes, once_per_node
from utils.process.world import get_local_rank

ROWS_PER_CHUNK = 1000  # rows read, tokenised and written at a time: bounds the memory of preparation
CHUNKS_AHEAD = 2  # chunks in the tokenizer's hands: one is always there when another comes back


@dataclass(frozen=True)
class DataRequest:
    """What one step asks of its data.

    Attributes:
        rules: how texts become ids, for which step.
        sources: the datasets to blend.
        output_path: folder of the files that record the split, and of the cache.
        seed: of the split and of the blend.
        max_train_samples: rows to keep of the whole blend; None for all. So max_eval_samples.
        rebuild: tokenise again even if the cache has this very data.
        workers: threads of the tokenizer; None for all cores.
    """

    rules: TokenRules
    sources: Sequence[DataSource]
    output_path: str | os.PathLike
    seed: int
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    rebuild: bool = False
    workers: int | None = None


# ---------------------------------------------------------------- what a step calls


def datasets_of_step(args, tokenizer, train_phase: int, max_seq_len: int, keep_columns: tuple[str, ...] | str = ()):
    """(train, eval) datasets as a step's flags ask for them.

    The tokenizer remembers the format in which prompts are written, and gets a template that writes it for servers.

    Args:
        keep_columns: of step 3, see TokenRules.

    Raises:
        UserError: as prepare_datasets.
    """
    style, mask_prompt = format_of_run(args, tokenizer), getattr(args, "mask_prompt", False)
    request = DataRequest(
        TokenRules(
            train_phase, max_seq_len, args.truncation_side, style, args.allow_special_tokens, keep_columns, mask_prompt
        ),
        sources_of_step(args),
        args.data_output_path,
        args.seed,
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
        rebuild=args.rebuild_cache,
        workers=args.preprocessing_num_workers,
    )
    train, evaluation = prepare_datasets(request, tokenizer)
    alone = all(getattr(find_known_dataset(source.path), "single_questions", False) for source in request.sources)
    prompt_format.remember(tokenizer, style or style_of_rows(train, tokenizer), alone)
    train.prompt_format = prompt_format.noted(tokenizer)  # for checkpoints
    show_rows(train, tokenizer, args.show_rows, mask_prompt)
    return train, evaluation


def check_data_of_step(args, train_phase: int) -> list[str]:
    """Look at a step's data before anything costs time: open all that its flags name, and find a usable row in each.

    Every rank must call this. All open the data, whose columns they need; the first of each node alone reads rows.
    Nothing is printed or written but what a download leaves in the hub's cache.

    Returns:
        the columns that all of the data have, as a reward function may ask for them.

    Raises:
        UserError: no such data, columns that are missing, or a dataset of which no row can be used; on all ranks alike.
    """
    columns = []

    def check() -> None:
        try:
            opened = [_open_raw(source, args.data_output_path, args.seed) for source in sources_of_step(args)]
            columns.extend(map(_columns_of, opened))
            if get_local_rank() == 0:
                _check_rows_of(opened, train_phase)
        except DataError as error:
            raise UserError(str(error)) from error

    agree(check)
    return _shared_columns(columns)


def _check_rows_of(opened: Sequence[PromptRawDataset], train_phase: int) -> None:
    """Raises: DataError: a dataset without a row to train on, or no dataset with one to evaluate with."""
    for raw in opened:
        check_rows(raw, train_phase)
    without = []
    for raw in opened:
        try:
            if raw.eval_split is not None:
                check_rows(raw, train_phase, raw.eval_split)
        except NoUsableRows as error:
            without.append(error)
    if without and len(without) == len(opened):  # else others evaluate, and a blend names those that do not
        raise without[0]


def _open_raw(source: DataSource, output_path: str | os.PathLike, seed: int) -> PromptRawDataset:
    choices = dict(split=source.split, config=source.config, shape=source.shape)
    return get_raw_dataset(source.path, output_path, seed, get_local_rank(), source.columns, **choices)


def _columns_of(raw: PromptRawDataset) -> list[str]:
    """What a reward function may ask for of a row."""
    return [*raw.raw_datasets[raw.train_split].column_names, "prompt_messages"]


def _shared_columns(columns: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in columns[0] if all(name in others for others in columns)] if columns else []


def format_of_run(args, tokenizer) -> str | None:
    """The prompt format of a run: that of the flags, else that of the model's own training, else none (TokenRules)."""
    style, remembered = args.prompt_format, prompt_format.remembered(tokenizer)
    if style is not None:
        print_rank_0(f"prompt format: {style} (--prompt_format or --chat_template)")
    elif remembered is not None:
        print_rank_0(f"prompt format: {remembered}, on which the model was trained (--prompt_format for another)")
    return style or remembered


def show_rows(dataset, tokenizer, count: int, mask_prompt: bool = False) -> None:
    """Print rows as the model sees them, what is learned of them between double brackets."""
    for index in range(min(count, len(dataset))):
        row = dataset[index]
        if "input_ids" not in row:
            parts = {"chosen": row["chosen_ids"], "rejected": row["rejected_ids"]}
            if row["ranked_ids"]:
                parts = {f"rank {rank}": ids for rank, ids in zip(row["ranks"], row["ranked_ids"], strict=True)}
        else:
            parts = {"prompt" if "answer_spans" not in row else "ids": row["input_ids"]}
        for name, ids in parts.items():
            learned = [-100] * len(ids)
            if "answer_spans" in row:
                learned = learned_labels(row, mask_prompt)
            text = _with_brackets(tokenizer, ids, learned)
            print_rank_0(f"row {index + 1}, {name} ({len(ids)} tokens): {text}")


def _with_brackets(tokenizer, ids: list[int], labels: list[int]) -> str:
    """The decoded ids; runs of labels between [[ and ]], a label that is not the id itself behind a bar."""
    pieces, begin = [], 0
    for position in range(1, len(ids) + 1):
        learned = labels[begin] != IGNORE_INDEX
        same = position < len(ids) and (labels[position] != IGNORE_INDEX) == learned
        if same and (not learned or labels[position] == ids[position]) and (not learned or labels[begin] == ids[begin]):
            continue
        text = tokenizer.decode(ids[begin:position], clean_up_tokenization_spaces=False)
        if learned and labels[begin] != ids[begin]:
            text = f"[[|{tokenizer.decode([labels[begin]])}]]{text}"
        elif learned:
            text = f"[[{text}]]"
        pieces.append(text)
        begin = position
    return repr("".join(pieces))


def style_of_rows(dataset, tokenizer, looked_at: int = 50) -> str:
    """How most of some rows, taken from all over a dataset, are written, as prompt_format names it."""
    styles = Counter()
    for position in np.linspace(0, len(dataset) - 1, min(looked_at, len(dataset)), dtype=int).tolist():
        row = dataset[position]
        ids = row.get("input_ids") or row["chosen_ids"]
        written = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        styles[prompt_format.written_style(written)] += 1
    return styles.most_common(1)[0][0]


# ---------------------------------------------------------------- from a request to datasets


class BlendedDataset(ConcatDataset):
    """PromptDatasets as one, several of them in a seeded order, so that the first rows are a sample of all.

    Attributes:
        lengths: as in PromptDataset, in the order of the rows.
        columns: of the data, that all of the datasets have.
        answers_per_row: of step 2, of the row that has most.
        counts: what became of the rows of each dataset, as printed.
    """

    def __init__(
        self, datasets: Sequence[PromptDataset], seed: int, columns: Sequence[str] = (), counts: Sequence[str] = ()
    ):
        super().__init__(datasets)
        self.counts = list(counts)
        self.columns, self.answers_per_row = list(columns), max(dataset.answers_per_row for dataset in datasets)
        rows = super().__len__()
        self._order = np.arange(rows) if len(datasets) == 1 else get_shuffle_idx(seed, rows)
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])[self._order]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return super().__getitem__(int(self._order[index]))


def prepare_datasets(request: DataRequest, tokenizer) -> tuple[BlendedDataset, BlendedDataset]:
    """(train, eval) datasets, blended from all that a request names.

    Raises:
        UserError: unknown dataset, bad rows, or a split without a single row.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if request.workers == 1 else "true"
    if request.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(request.workers)
    if not request.sources:
        raise UserError("--data_path names no dataset")
    choices = [replace(source, path="") for source in request.sources]  # paths may differ between nodes
    check_same_on_all_nodes({"what is asked of the datasets": choices})
    opened = [_OpenSource(source, request, tokenizer) for source in request.sources]
    train = _blend(opened, "train", request.max_train_samples, request.seed)
    return train, _blend(opened, "eval", request.max_eval_samples, request.seed)


def _blend(opened: Sequence["_OpenSource"], split: str, limit: int | None, seed: int) -> BlendedDataset:
    """One split of all datasets, at most ``limit`` rows of them together, and what became of their rows printed."""
    weights = [one.source.weight for one in opened]
    weights = None if None in weights else weights
    parts: list[PromptDataset | None] = [None] * len(opened)
    if len(opened) == 1:
        wanted = [limit]
        parts = [opened[0].part(split, limit)]
    elif limit is None and weights is None:
        wanted = [None] * len(opened)
        parts = [one.part(split) for one in opened]
    else:
        sizes = [one.rows_of_share(split) for one in opened]
        while True:
            if weights is not None and split == "train":
                _refuse_without_rows(split, [one for one, size in zip(opened, sizes, strict=True) if not size])
            wanted = rows_of_blend(sizes, weights, limit, seed)
            for i, one in enumerate(opened):
                if parts[i] is None or len(parts[i]) < wanted[i]:
                    parts[i] = one.part(split, wanted[i], shuffled=True)
            if all(len(part) >= count for part, count in zip(parts, wanted, strict=True)):
                break
            # Unusable rows made a dataset smaller than it seemed: the others fill its place, or shrink by its weight.
            sizes = [min(len(p), s) if len(p) < w else s for p, s, w in zip(parts, sizes, wanted, strict=True)]
    parts = [part.first(count) for part, count in zip(parts, wanted, strict=True)]
    counts = _print_blend(split, opened, parts, limit)
    if not sum(map(len, parts)):
        _refuse_without_rows(split, opened)
    return BlendedDataset(parts, seed, _shared_columns([_columns_of(one.raw) for one in opened]), counts)


def _refuse_without_rows(split: str, opened: Sequence["_OpenSource"]) -> None:
    """Raises: UserError: there are datasets that give a split not one row, each with what became of its rows."""
    if opened:
        reasons = "; of ".join(one.why_none(split) for one in opened)
        raise UserError(f"no {split} row is left for step {opened[0].request.rules.train_phase} of {reasons}")


def _print_blend(split: str, opened: Sequence["_OpenSource"], parts: Sequence[PromptDataset], limit) -> list[str]:
    """Print what became of the rows; returns that of each dataset."""
    counts = [print_counts(split, one.files[split], len(part)) for one, part in zip(opened, parts, strict=True)]
    if len(opened) > 1:
        used = ", ".join(f"{len(part)} of {one.source.path}" for one, part in zip(opened, parts, strict=True))
        reason = f", limited to {limit}" if limit == sum(map(len, parts)) else ""
        reason += ", in the proportions of their weights" if opened[0].source.weight is not None else ""
        print_rank_0(f"data ({split}): a blend of {sum(map(len, parts))} rows{reason}: {used}")
        for one, part in zip(opened, parts, strict=True):
            if not len(part):
                print_rank_0(f"data ({split}): WARNING: {one.source.path} is named, and not one row of it is used")
    return counts


def rows_of_blend(sizes: Sequence[int], weights: Sequence[float] | None, limit: int | None, seed: int) -> list[int]:
    """How many rows each dataset gives to a blend of at most ``limit`` rows.

    Without weights: what a seeded draw from all rows takes of each. With weights: as many rows as there can be in these
    proportions without taking any row twice; a dataset without rows has no part in them.
    """
    if weights is None:
        drawn = get_shuffle_idx(seed, sum(sizes))[:limit]
        return np.bincount(np.searchsorted(np.cumsum(sizes), drawn, side="right"), minlength=len(sizes)).tolist()
    weights = [Fraction(weight) if size else Fraction(0) for weight, size in zip(weights, sizes, strict=True)]
    shares = [weight / (sum(weights) or 1) for weight in weights]
    rows = min((int(size / share) for size, share in zip(sizes, shares, strict=True) if size), default=0)
    rows = rows if limit is None else min(rows, limit)
    counts = [int(rows * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - rows * shares[i])
    for i in by_remainder[: rows - sum(counts)]:
        counts[i] += 1
    return counts


class _OpenSource:
    """One opened dataset of a request, whose splits come from the cache or are made by the first rank of each node.

    Attributes:
        files: "train" and "eval" -> the file in the cache that was read last.

    Raises:
        UserError: unknown dataset, or bad rows.
    """

    def __init__(self, source: DataSource, request: DataRequest, tokenizer):
        self.source, self.request, self.tokenizer = source, request, tokenizer
        self.files: dict[str, Path] = {}
        rules = request.rules
        try:
            self.raw = _open_raw(source, request.output_path, request.seed)
            self.raw.keep_also(rules.keep_columns)
            by_template = rules.prompt_format == prompt_format.CHAT_TEMPLATE
            print_rank_0(f"data: {self.raw.describe()}; read as {self.raw.recognised()}")
            if rules.train_phase == SFT and source.data_split == DATA_SPLIT and not self.raw.has_rejected:
                print_rank_0(
                    f"note: {self.raw.dataset_name} has no rejected answers, so step 2 cannot read its share of it "
                    f"(--data_split {DATA_SPLIT}); --data_split 1,0,0 gives step 1 all of the rows"
                )
            self._content = [self.raw.fingerprint(), tokenizer.chat_template if by_template else None]
        except DataError as error:
            raise UserError(str(error)) from error
        check_same_on_all_nodes({"the checksum of data and tokenizer": content_key(tokenizer, *self._content)})
        self._content += [self.raw.dataset_name, vars(rules), source.data_split, request.seed]

    def _file(self, split: str, *more) -> Path:
        key = content_key(self.tokenizer, *self._content, split, *more)
        name = f"{self.raw.dataset_name_clean}_{split}_step{self.request.rules.train_phase}_{key}.arrow"
        return Path(self.request.output_path) / "tokenised" / name

    def _rows(self, split: str) -> Rows:
        return self.raw.get_train_data() if split == "train" else self.raw.get_eval_data()

    def rows_of_share(self, split: str) -> int:
        """Rows of this step's share, usable or not; the first rank counts them, so that no other opens the files."""
        file = self._file(split).with_suffix(".rows")

        def build() -> None:
            rows = len(self._rows(split))
            if self.source.data_split is not None:
                boundaries = split_boundaries(self.source.data_split, rows)
                step = self.request.rules.train_phase
                rows = boundaries[step] - boundaries[step - 1]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, str(rows))

        once_per_node(file, build, self.request.rebuild)
        rows = int(file.read_text())
        return rows if self.source.max_rows is None else min(rows, self.source.max_rows)

    def why_none(self, split: str) -> str:
        """What became of the rows of a dataset that has not one for a split, and what would change that."""
        if split not in self.files:
            self.part(split)
        counts = read_counts(self.files[split]) or PreparationCounts(self.raw.dataset_name)
        hint = ""
        if counts.identical or counts.without_answer:
            hint = " (--max_seq_len says how much of a row is kept)"
        elif not self.rows_of_share(split):
            hint = " (it has too few rows to set some aside)"
            if self.source.data_split is not None:
                hint = f" (--data_split {self.source.data_split} leaves this step too small a share of these rows)"
        return f"{counts}{hint}"

    def part(self, split: str, count: int | None = None, shuffled: bool = False) -> PromptDataset:
        """The first ``count`` usable rows of this step's share; None for all.

        Args:
            shuffled: a dataset without shares is shuffled before it is cut, as one with shares is anyway.
        """
        source, request, rules = self.source, self.request, self.request.rules
        if source.max_rows is not None:
            count, shuffled = min(source.max_rows, count or source.max_rows), True
        shuffled = shuffled and source.data_split is None and count is not None
        self.files[split] = file = self._file(split, count, shuffled)

        def build() -> None:
            rows = self._rows(split)
            indices = get_shuffle_idx(request.seed, len(rows)) if shuffled else np.arange(len(rows))
            if source.data_split is not None:
                place = get_local_rank(), request.output_path, self.raw.dataset_name_clean, request.seed, split
                indices = get_raw_dataset_split_index(*place, source.data_split, rules.train_phase - 1, len(rows))
            encoder = RowEncoder(self.raw, self.tokenizer, rules)
            self._say_origin(encoder.report, split, rows, len(indices))
            with cache_writer(file, encoder.schema, encoder.counts) as writer:
                encode_rows(encoder, rows, indices, writer, count, split == "eval")

        once_per_node(file, build, self.request.rebuild)
        return PromptDataset.from_file(file, rules.train_phase)

    def _say_origin(self, report: RowReport, split: str, rows: Rows, share: int) -> None:
        """What a report says of the rows that other steps, or the other split, get."""
        report.of = len(rows)
        if self.raw.eval_split is None and isinstance(rows, SubsetRows):
            report.of = len(rows.rows)
            use = "train on" if split == "train" else "evaluate with"
            report.origin.append(f"{len(rows)} to {use}, as there is no evaluation split")
        if self.source.data_split is not None:
            step = self.request.rules.train_phase
            report.origin.append(f"share {step} of --data_split {self.source.data_split}: {share}")


def encode_rows(
    encoder: RowEncoder,
    rows: Rows,
    indices: np.ndarray,
    writer: pa.RecordBatchFileWriter,
    limit: int | None = None,
    may_be_none: bool = False,
) -> None:
    """Write the ids of rows[indices], chunk by chunk, and count in the encoder what became of the rows.

    Args:
        limit: rows to write; those that cannot be used do not count. None for all.
        may_be_none: not one of the rows need be usable, as other datasets of a blend may have some.

    Raises:
        NoUsableRows: not one of the rows can be used.
    """
    limit = len(indices) if limit is None else limit
    read = 0
    with ThreadPoolExecutor(CHUNKS_AHEAD) as pool:
        # As many rows as are missing: all at first, then the places of those that could not be used.
        while read < len(indices) and (missing := limit - encoder.counts.kept) > 0:
            _encode_chunks(encoder, rows, indices[read : read + missing], writer, pool)
            read += missing
    report = encoder.report
    if not may_be_none:
        report.raise_if_none(rows, NEEDED_TEXTS[encoder.rules.train_phase])
    report.dropped = encoder.counts.identical + encoder.counts.without_answer
    if read < len(indices):
        report.origin.append(f"limited to {limit}")
    encoder.counts.read = str(report)
    encoder.counts.unused |= encoder.raw.unused_fields()


def _encode_chunks(encoder: RowEncoder, rows: Rows, indices: np.ndarray, writer, pool: ThreadPoolExecutor) -> None:
    chunks = [indices[begin : begin + ROWS_PER_CHUNK] for begin in range(0, len(indices), ROWS_PER_CHUNK)]
    pending = deque()

    def finish_oldest() -> None:
        batch = encoder.finish(*pending.popleft().result())
        if batch.num_rows:
            writer.write_batch(batch)

    # The tokenizer works without Python's lock: meanwhile the last chunk is finished here and the next one read.
    for chunk in progress(chunks, f"tokenising {encoder.report.label}") if len(chunks) > 1 else chunks:
        pending.append(pool.submit(encoder.tokenise, encoder.read(rows, chunk)))
        if len(pending) > CHUNKS_AHEAD:
            finish_oldest()
    while pending:
        finish_oldest()


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
    prompt_format=None,
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
        chat_template: as prompt_format "chat_template".
        prompt_format: in which every row is written; None: as the data has them, conversations as human_assistant.
        allow_special_tokens: special tokens spelled in the data's texts become these tokens; else they are text.

    Raises:
        UserError: as prepare_datasets.
    """
    style = "chat_template" if chat_template else prompt_format
    columns = {name: column for name, column in (columns or {}).items() if column}
    sources = [DataSource(path, columns=columns, data_split=data_split) for path in data_path]
    sources += [DataSource(path, columns=columns) for path in (sft_only_data_path if train_phase == SFT else ())]
    request = DataRequest(
        TokenRules(train_phase, max_seq_len, prompt_format=style, allow_special_tokens=allow_special_tokens),
        sources,
        output_path,
        seed,
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
    source = DataSource(dataset_name, data_split=data_split)
    request = DataRequest(TokenRules(train_phase, max_seq_len), [source], output_path, seed, rebuild=rebuild)
    opened = _OpenSource(source, request, tokenizer)
    parts = opened.part("train"), opened.part("eval")
    for split in opened.files:
        print_counts(split, opened.files[split])
    return parts


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
