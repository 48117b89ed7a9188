"""Tokenised rows in memory-mapped Arrow files, named by their content."""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from utils.data.encoding import PreparationCounts
from utils.process.console import print_rank_0
from utils.process.files import name_if_new, scratch_beside, write_text

CACHE_VERSION = 7  # part of every cache key: raise it when the rules change what is stored


class PromptDataset(Dataset):
    """Id rows in a memory-mapped Arrow file: a row is read when it is asked for, no sooner.

    Rows are dicts of Python lists and numbers with the columns that encoding.py names for the step.

    Attributes:
        lengths: [rows] tokens of each row, of the longest answer of several: what padding will cost.
        answers_per_row: of step 2, of the row that has most.
    """

    def __init__(self, table: pa.Table, train_phase: int):
        self.table, self.train_phase = table, train_phase
        names = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in table.column_names]
        columns = [pc.list_value_length(table[name]).to_numpy() for name in names]
        self.lengths = np.max(columns, axis=0) if len(table) else np.zeros(0, np.int32)
        self.answers_per_row = 2 if "chosen_ids" in names else 1
        if "ranked_ids" in table.column_names and len(table):
            self.lengths = np.maximum(self.lengths, _longest_inside(table["ranked_ids"]))
            self.answers_per_row = max(2, pc.max(pc.list_value_length(table["ranked_ids"])).as_py())

    @classmethod
    def from_file(cls, file: Path, train_phase: int) -> "PromptDataset":
        with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
            return cls(reader.read_all(), train_phase)

    def first(self, count: int | None) -> "PromptDataset":
        """The first ``count`` rows; None for all."""
        return self if count is None else PromptDataset(self.table.slice(0, count), self.train_phase)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return {name: self.table[name][int(index)].as_py() for name in self.table.column_names}


def _longest_inside(column: pa.ChunkedArray) -> np.ndarray:
    """[rows] of a column of lists of lists: how long the longest inner list is; 0 where there is none."""
    longest = np.zeros(len(column), np.int32)
    for chunk, start in zip(column.chunks, np.cumsum([0, *map(len, column.chunks)]), strict=False):
        if len(chunk.flatten()):
            lengths, rows = pc.list_value_length(chunk.flatten()).to_numpy(), pc.list_parent_indices(chunk).to_numpy()
            np.maximum.at(longest, rows + start, lengths)
    return longest


def content_key(tokenizer, *parts) -> str:
    """A name for exactly this content: the same key means the same file, a changed byte anywhere means another."""
    tokenizer_state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    tokenizer_state = hashlib.sha256(tokenizer_state.encode()).hexdigest()
    everything = [CACHE_VERSION, tokenizer_state, tokenizer.eos_token_id, tokenizer.bos_token_id, *parts]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:24]


@contextmanager
def cache_writer(file: Path, schema: pa.Schema, counts: PreparationCounts):
    """A writer of an Arrow file that appears, with its counts beside it, only when the block has ended well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(file) as scratch:
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            yield writer
        # The counts first: whoever finds the rows finds them too.
        write_text(file.with_suffix(".json"), json.dumps(vars(counts)))
        name_if_new(scratch, file)


def read_counts(file: Path) -> PreparationCounts | None:
    """What became of the rows of a file in the cache; None where that is not kept."""
    report = file.with_suffix(".json")
    return PreparationCounts(**json.loads(report.read_text())) if report.exists() else None


def print_counts(split: str, file: Path, used: int | None = None) -> str:
    """Print and return what became of the rows of a file in the cache; ``used``: how many go on, where not all do."""
    counts = read_counts(file)
    if counts is None:
        return ""
    less = "" if used is None or used == counts.kept else f"; of these rows only {used} fit the blend"
    print_rank_0(f"data ({split}): {counts}{less}")
    for warning in counts.warnings():
        print_rank_0(f"data ({split}): WARNING: {warning}")
    return f"{counts}{less}"
