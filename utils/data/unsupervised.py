"""Plain text for the ptx loss of step 3: documents joined into blocks, blocks dealt out in micro-batches."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from utils.data.batching import DataCollatorSFT
from utils.data.cache import PromptDataset, cache_writer, content_key, print_counts
from utils.data.encoding import SFT, PreparationCounts, block_batch
from utils.data.errors import DataError
from utils.data.fingerprints import content_fingerprint
from utils.data.preparation import ROWS_PER_CHUNK
from utils.data.readers import TextFile, file_kind
from utils.data.row_texts import RowReport, SkipRow, text
from utils.data.rows import ConcatRows, Rows
from utils.data.splits import ALL, Flags, open_splits, splits_of_hub
from utils.data.text_encoder import TextEncoder
from utils.process.console import progress
from utils.process.errors import UserError
from utils.process.ranks import once_per_node
from utils.process.world import get_rank, get_world_size


def _unsupervised_rows(name: str, config_name: str | None) -> tuple[Rows, str]:
    """(rows with a field ``text``, fingerprint of their content): lines of .txt files, any other file or folder of
    rows, or a hub dataset."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    plain = [file for file in files if file_kind(file) == ".txt"]
    if plain and {file_kind(file) for file in files} <= {".txt", None}:  # beside data files they are a licence, say
        return ConcatRows([TextFile(file) for file in plain]), content_fingerprint(plain)
    flags = Flags("--unsupervised_dataset_config_name", "--unsupervised_dataset_name")
    if path.exists():  # plain text is plain text, of whatever variant it is
        splits = open_splits(path, config_name or ALL, None if path.is_file() else ALL, flags)
    else:
        splits = splits_of_hub(name, config_name, [path], flags=flags)
    splits.keep_columns(["text"])
    return splits["train"], splits.fingerprint


def _write_blocks(name: str, rows: Rows, encoder: TextEncoder, block: int, file: Path) -> None:
    """Texts joined by EOS and cut into blocks; a last one that is not full is left."""
    report, counts = RowReport(name), PreparationCounts()
    stream = np.zeros(0, np.int32)
    with cache_writer(file, pa.schema({"input_ids": pa.list_(pa.int32())}), counts) as writer:
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
        key = content_key(tokenizer, "unsupervised", fingerprint, block, args.allow_special_tokens)
        label = re.sub(r"[^\w.-]+", "_", Path(name).name)
        file = Path(args.data_output_path) / "tokenised" / f"{label}_unsupervised_{key}.arrow"

        def build() -> None:
            encoder = TextEncoder(tokenizer, special_tokens=False, allow_special_tokens=args.allow_special_tokens)
            _write_blocks(name, rows, encoder, block, file)

        once_per_node(file, build, args.rebuild_cache)
    except DataError as error:
        raise UserError(f"--unsupervised_dataset_name {error}") from error
    print_counts("unsupervised", file)
    return PromptDataset.from_file(file, SFT)


class UnsupervisedBatches:
    """Endless micro-batches of plain text, each rank reading its own share in a seeded order.

    Attributes:
        taken: batches handed out, which is the whole state: the order of each pass follows from its number.
    """

    def __init__(self, args, tokenizer):
        self._blocks = get_unsupervised_data(args, tokenizer)
        self._collator = DataCollatorSFT(tokenizer.pad_token_id, args.max_prompt_seq_len + args.max_answer_seq_len)
        self._seed, self._rows = args.seed, args.per_device_training_batch_size * get_world_size()
        self._pass, self._order, self.taken = None, None, 0

    def state_dict(self) -> dict:
        return {"taken": self.taken, "blocks": len(self._blocks), "rows": self._rows}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError: the text was another one."""
        if state.get("blocks") != len(self._blocks):
            raise ValueError(
                f"--unsupervised_dataset_name gives {len(self._blocks)} blocks, {state.get('blocks')} then"
            )
        then, blocks = int(state.get("rows", self._rows)), len(self._blocks)  # rows of a batch of all ranks
        passes, place = divmod(int(state["taken"]), -(-blocks // then))
        self.taken = passes * -(-blocks // self._rows) + -(-place * then // self._rows)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        passes, place = divmod(self.taken, -(-len(self._blocks) // self._rows))
        if passes != self._pass:
            order = np.random.default_rng([self._seed, 1, passes]).permutation(len(self._blocks))
            self._pass, self._order = passes, np.resize(order, -(-len(order) // self._rows) * self._rows)
        self.taken += 1
        rows = self._order.reshape(-1, self._rows)[place, get_rank() :: get_world_size()]
        return self._collator([self._blocks[i] | {"answer_spans": [], "answers_only": False} for i in rows])
