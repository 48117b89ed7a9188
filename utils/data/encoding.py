"""Examples to id rows: what a row of each step holds, where its answers stand, what one that is too long loses.

A row is (ids, length) all the way to the batch: masks come from lengths, never from comparing ids with the pad id.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from utils.data import prompt_format
from utils.data.batching import ranked_pairs
from utils.data.conversation import Conversation, Texts
from utils.data.errors import DataError
from utils.data.raw_datasets import PromptRawDataset
from utils.data.rendering import (
    ConversationWriter,
    Rendered,
    as_it_stands,
    as_written,
    one_per_answer,
    without_oldest,
)
from utils.data.row_texts import RowReport, SkipRow
from utils.data.special_tokens import special_token_ids
from utils.data.text_encoder import EncodedText, TextEncoder

GLUED_EXAMPLES = 2
FIRST_ROWS = 100  # of a dataset, among which one that can be used is looked for before all are read
SFT, REWARD, RLHF = 1, 2, 3  # the steps, as train_phase counts them
NEEDED_TEXTS = {SFT: ("prompt", "chosen"), REWARD: ("prompt", "chosen", "rejected"), RLHF: ("prompt",)}


@dataclass(frozen=True)
class TokenRules:
    """All that decides how a row becomes ids, besides the tokenizer; part of the cache key.

    Attributes:
        prompt_format: in which every row is written; None: texts stand as they are, and conversations are written as
            human_assistant.
        keep_columns: of step 3: columns whose values go along with a prompt, for reward functions; "all" for all.
        mask_prompt: of step 1: only answers are learned, also of texts; a row that has none left is dropped.
    """

    train_phase: int
    max_seq_len: int
    truncation_side: str = "left"
    prompt_format: str | None = None
    allow_special_tokens: bool = False
    keep_columns: tuple[str, ...] | str = ()
    mask_prompt: bool = False


@dataclass
class PreparationCounts:
    """What happened to the rows of one dataset split, printed with every run so that no loss is silent.

    Attributes:
        read: rows used and skipped, with reasons and places.
        without_answer: rows that were dropped, since nothing to learn was left of them.
        glued: rows whose prompt and answer have no blank between them; glued_examples: how the first ones read there.
        unused: fields of turns that nothing is done with, and in how many turns they are.
    """

    read: str = ""
    kept: int = 0
    truncated: int = 0
    without_eos: int = 0
    identical: int = 0
    without_answer: int = 0
    glued: int = 0
    glued_examples: list[str] = field(default_factory=list)
    unused: dict[str, int] = field(default_factory=dict)

    def __str__(self):
        parts = [self.read]
        if self.truncated:
            parts.append(f"{self.truncated} too long and truncated")
        if self.without_eos:
            parts.append(f"{self.without_eos} of them before the end of an answer, which is not learned then")
        if self.identical:
            parts.append(f"{self.identical} pairs dropped, their answers being identical")
        if self.without_answer:
            parts.append(f"{self.without_answer} dropped, no answer being left of them within the length")
        if self.unused:
            parts.append("not used: " + ", ".join(f"{name} ({count} turns)" for name, count in self.unused.items()))
        return ", ".join(parts)

    def warnings(self) -> list[str]:
        if not self.glued:
            return []
        examples = " and ".join(map(repr, self.glued_examples))
        return [
            f"in {self.glued} rows the answer begins right behind the prompt's last character, as in {examples}: if "
            "prompts are questions, --prompt_format human_assistant (or --chat_template) writes them as such; bare "
            "texts are learned as they stand"
        ]


def prompt_tokens_to_drop(length: int, prompt_length: int, max_length: int, leading: int) -> int:
    """How many tokens a prompt loses at its beginning so that prompt, answer and EOS (``length``) fit ``max_length``.

    The ``leading`` special tokens always stay. Where not even the bare answer would fit, dropping the whole prompt
    would not save its end: the prompt then keeps up to half the room.
    """
    answer_fits = length - prompt_length <= max_length - leading
    needed = length - max_length if answer_fits else prompt_length - max_length // 2
    return max(0, min(needed, prompt_length - leading))


def cut(ids: list[int], max_length: int, leading: int = 0, drop: int = 0) -> list[int]:
    """Drop ``drop`` tokens after the leading ones, then what is still too long at the end."""
    return (ids[:leading] + ids[leading + drop :])[:max_length]


def moved_spans(spans: Sequence[tuple[int, int]], leading: int, drop: int, length: int) -> list[tuple[int, int]]:
    """Where answers [start, end) stand after ``cut``; those that are gone are left out."""
    moved = [(max(start - drop, leading), min(end - drop, length)) for start, end in spans]
    return [(start, end) for start, end in moved if start < end]


class RowMaker:
    """Turns samples of one dataset into id rows.

    ``samples(row)`` gives (what to remember, texts to encode) for each id row that a row of the data makes;
    ``row(remembered, encoded)`` makes the id row of their ids, or None to drop it. In between, all texts of a chunk
    are encoded at once.

    Attributes:
        columns: name -> Arrow type of what ``row`` gives, in its order.
    """

    columns: ClassVar[dict[str, pa.DataType]]
    learns = False  # all answers of a conversation, not the last one alone

    def __init__(self, raw_dataset: PromptRawDataset, tokenizer, rules: TokenRules):
        self.raw, self.tokenizer, self.rules = raw_dataset, tokenizer, rules
        self.eos = tokenizer.eos_token_id
        self.counts = PreparationCounts()
        self.by_template = rules.prompt_format == prompt_format.CHAT_TEMPLATE
        self.need = NEEDED_TEXTS[rules.train_phase]
        self.writer = ConversationWriter(
            tokenizer, rules.prompt_format or prompt_format.HUMAN_ASSISTANT, learns=self.learns
        )
        self.encoder = TextEncoder(
            tokenizer, template=self.by_template, allow_special_tokens=rules.allow_special_tokens
        )
        self.leading = self.encoder.leading
        self.end_ids = prompt_format.end_ids(tokenizer, self.by_template)

    def samples(self, row) -> list[tuple]:
        """Raises SkipRow where the step cannot use the row."""
        return [made for example in self.raw.examples(row, self.need) for made in self.samples_of(example, row)]

    def samples_of(self, example: Texts | Conversation, row) -> list[tuple]:
        answers_only = self.by_template or isinstance(example, Conversation)
        if isinstance(example, Texts) and as_written(example, self.rules.prompt_format):
            self.note_glued(example)
            written = [(example, as_it_stands(example))]
        else:
            conversation = example.as_conversation() if isinstance(example, Texts) else example
            written = self.written(conversation)
            answer = conversation.answers[0] if conversation.answers else ()
            for name in self.writer.left_out([*conversation.prompt, *answer]):
                self.counts.unused[name] = self.counts.unused.get(name, 0) + 1
        return [((one, rendered, answers_only), [part.text for part in rendered]) for one, rendered in written]

    def note_glued(self, example: Texts) -> None:
        start = len(example.prompt)
        if not example.wholes or not example.wholes[0][start - 1 : start + 1].isascii():  # scripts without blanks
            return
        before, after = example.wholes[0][start - 1], example.wholes[0][start : start + 1]
        if not before.isspace() and not after.isspace():
            self.counts.glued += 1
            if self.counts.glued <= GLUED_EXAMPLES:
                self.counts.glued_examples.append(example.wholes[0][max(0, start - 30) : start + 30])

    def written(self, conversation: Conversation) -> list[tuple[Conversation, list[Rendered]]]:
        """The rows of a conversation: what each is made of, and its texts."""
        return [(conversation, self.texts(conversation))]

    def texts(self, conversation: Conversation) -> list[Rendered]:
        """The texts of one row, without where its learned answers stand."""
        return [self.writer.answered(conversation, answer, spans=False) for answer in conversation.answers]

    def encoded(self, rendered: list[Rendered]) -> list[EncodedText]:
        return self.encoder.encode([one.text for one in rendered])

    def closed(self, ids: list[int], start: int) -> list[int]:
        """The ids of a row, ended by exactly one end token after the last answer, which begins at ``start``."""
        end = self.closing(ids, start, len(ids)) if self.by_template else None
        return [*ids, self.eos] if end is None else ids[: end + 1]

    def closing(self, ids: list[int], start: int, end: int) -> int | None:
        """Where the first end token in [start, end) stands: contents that spell one are encoded as text."""
        return next((i for i in range(start, end) if ids[i] in self.end_ids), None)

    def fitting(self, example, rendered: list[Rendered], encoded: list[EncodedText]):
        """(rendered, encoded, how many tokens stay at the beginning): without the oldest turns that do not fit.

        Texts that stand as they are lose tokens instead, as published, and so does a question that alone is too long.
        """
        leading = self.leading
        if self.rules.truncation_side == "right" or isinstance(example, Texts) or self.fits(rendered, encoded):
            return rendered, encoded, leading
        example = without_oldest(example, self.fits_alone)
        [(_, rendered)] = self.written(example)
        encoded = self.encoded(rendered)
        if not self.fits(rendered, encoded):
            leading = max(leading, encoded[0].token_at(self.writer.head(example)))
        return rendered, encoded, leading

    def fits_alone(self, example: Conversation) -> bool:
        """Whether the row of a conversation fits, which costs one rendering where finding its answers costs many."""
        rendered = self.texts(example)
        return self.fits(rendered, self.encoded(rendered))

    def fits(self, rendered: list[Rendered], encoded: list[EncodedText]) -> bool:
        limit = self.rules.max_seq_len
        return all(
            len(text.ids) < limit or len(self.closed(text.ids, text.token_at(one.last))) <= limit
            for one, text in zip(rendered, encoded, strict=True)
        )

    def tokens_to_drop(self, length: int, prompt_length: int, leading: int) -> int:
        if self.rules.truncation_side == "right":
            return 0
        return prompt_tokens_to_drop(length, prompt_length, self.rules.max_seq_len, leading)

    def count_cut(self, was_cut: bool, ends: bool) -> None:
        self.counts.truncated += was_cut
        self.counts.without_eos += not ends


class SftRowMaker(RowMaker):
    """A conversation, or a prompt and its chosen answer; ``answer_spans`` are flat [start, end) pairs of its answers.

    ``answers_only``: the rest is not learned. ``end_id``: the row's last token, which follows an answer in the labels
    where another turn follows it in the ids without an end token in between; -1 where all answers have one in the ids.
    """

    columns: ClassVar = {
        "input_ids": pa.list_(pa.int32()),
        "answer_spans": pa.list_(pa.int32()),
        "answers_only": pa.int32(),
        "end_id": pa.int32(),
    }
    learns = True

    def __init__(self, *args):
        super().__init__(*args)
        self.special_ids = special_token_ids(self.tokenizer)

    def written(self, conversation):
        [answer] = conversation.answers
        if self.writer.splits and any(message["role"] == "assistant" for message in conversation.prompt):
            parts = one_per_answer(conversation, answer)
        else:
            parts = [(conversation, answer)]
        rows = [(replace(part, answers=(last,)), [self.writer.answered(part, last)]) for part, last in parts]
        if not any(rendered.answers for _, [rendered] in rows):
            raise SkipRow("every answer has the weight 0")
        return rows

    def row(self, remembered, encoded):
        example, rendered, answers_only = remembered
        fits = self.fits(rendered, encoded)
        [rendered], [encoded], leading = self.fitting(example, rendered, encoded)
        start = encoded.token_at(rendered.start)
        ids = self.closed(encoded.ids, encoded.token_at(rendered.last))
        spans = [self.span(encoded, rendered, ids, *answer) for answer in rendered.answers]
        closed = self.by_template and all(ids[end - 1] in self.special_ids for _, end in spans)
        drop = self.tokens_to_drop(len(ids), start, leading)
        kept = cut(ids, self.rules.max_seq_len, leading, drop)
        spans = moved_spans(spans, leading, drop, len(kept))
        if not spans and (answers_only or self.rules.mask_prompt):
            self.counts.without_answer += 1
            return None
        self.count_cut(not fits, kept[-1] in self.end_ids)
        return kept, list(chain.from_iterable(spans)), answers_only, -1 if closed else ids[-1]

    def span(self, encoded: EncodedText, rendered: Rendered, ids: list[int], start: int, end: int) -> tuple[int, int]:
        """[start, end) in tokens of an answer given in characters, its end token included where the text has one."""
        first = encoded.token_at(start)
        if start == rendered.last:
            return first, len(ids)
        until = min(encoded.token_at(end), len(ids))
        closing = self.closing(ids, first, until) if self.by_template else None
        return first, until if closing is None else closing + 1


class Pair(NamedTuple):
    rows: list[list[int]]  # of each answer
    starts: list[int]  # where each answer begins in its row: the prompt's last token may differ with what follows it
    was_cut: bool


class RewardRowMaker(RowMaker):
    """Two answers to one prompt, or a ranked list of more; all lose the same part of the prompt, so that they differ in
    nothing but the answer.

    ``ranked_ids`` and ``ranks`` are empty for a pair; else the best answer is also the chosen one, the worst the
    rejected one. ``answer_starts``: where the answers begin in their rows, in the order of ``ranked_ids``, or of the
    chosen and the rejected one.
    """

    columns: ClassVar = {
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
        "answer_starts": pa.list_(pa.int32()),
        "ranked_ids": pa.list_(pa.list_(pa.int32())),
        "ranks": pa.list_(pa.int32()),
    }

    def pair_of(self, example: Texts | Conversation, ended: Sequence[bool] = ()) -> Pair:
        """One example, encoded. Raises SkipRow where the prompt format cannot write it.

        Args:
            ended: of each answer; one that was cut off gets no end token. Empty: all ended.
        """
        [((example, rendered, _), _)] = self.samples_of(example, {})
        pair = self.pair(example, rendered, self.encoded(rendered))
        if all(ended):
            return pair
        rows = [
            ids if end or ids[-1] not in self.end_ids else ids[:-1] for ids, end in zip(pair.rows, ended, strict=True)
        ]
        return pair._replace(rows=rows)

    def pair(self, example, rendered: list[Rendered], encoded: list[EncodedText]) -> Pair:
        fits = self.fits(rendered, encoded)
        rendered, encoded, leading = self.fitting(example, rendered, encoded)
        starts = [text.token_at(one.start) for text, one in zip(encoded, rendered, strict=True)]
        rows = [self.closed(text.ids, text.token_at(one.last)) for text, one in zip(encoded, rendered, strict=True)]
        drop = max(self.tokens_to_drop(len(ids), start, leading) for ids, start in zip(rows, starts, strict=True))
        drop = max(0, min(drop, min(starts) - leading))  # what is dropped must lie in the prompt of all
        kept = [cut(ids, self.rules.max_seq_len, leading, drop) for ids in rows]
        starts = [min(start - drop, len(ids)) for start, ids in zip(starts, kept, strict=True)]
        return Pair(kept, starts, not fits)

    def row(self, remembered, encoded):
        example, rendered, _ = remembered
        rows, starts, was_cut = self.pair(example, rendered, encoded)
        ranks = list(example.ranks) if isinstance(example, Conversation) else []
        ranked = rows if ranks else []
        if rows[0] == rows[-1] if not ranks else not ranked_pairs({"ranked_ids": ranked, "ranks": ranks}):
            self.counts.identical += 1
            return None
        self.count_cut(was_cut, all(row[-1] in self.end_ids for row in rows))
        return rows[0], rows[-1], starts[0], starts, ranked, ranks


class PromptRowMaker(RowMaker):
    """A prompt alone. The end of a prompt holds the question, so a long one loses its beginning under either rule."""

    def __init__(self, *args):
        super().__init__(*args)
        self.columns = {"input_ids": pa.list_(pa.int32())}
        if self.rules.keep_columns:
            self.columns["columns"] = pa.string()

    def texts(self, conversation):
        return [self.writer.prompt(conversation)]

    def samples_of(self, example, row):
        [((one, rendered, _), texts)] = super().samples_of(example, row)
        kept = (self.kept_columns(row, one),) if self.rules.keep_columns else ()
        return [((one, rendered, *kept), texts)]

    def kept_columns(self, row, example) -> str:
        """The columns that reward functions ask for, and the prompt's turns, as JSON; null for what a row lacks."""
        wanted = self.rules.keep_columns
        kept = dict(row) if wanted == "all" else {name: row.get(name) for name in wanted}
        if wanted == "all" or "prompt_messages" in wanted:
            turns = example.as_conversation() if isinstance(example, Texts) else example
            kept["prompt_messages"] = turns.prompt
        return json.dumps(kept, ensure_ascii=False, default=str)

    def closed(self, ids, start):
        return ids

    def row(self, remembered, encoded):
        example, rendered, *columns = remembered
        limit = self.rules.max_seq_len
        self.counts.truncated += len(encoded[0].ids) > limit
        if len(encoded[0].ids) > limit:
            _, encoded, leading = self.fitting(example, rendered, encoded)
        else:
            leading = 0
        ids = encoded[0].ids
        return (cut(ids, limit, leading, max(0, len(ids) - limit)), *columns)


def check_answers(raw_dataset: PromptRawDataset, train_phase: int) -> None:
    """Raises DataError: the rows of a dataset have no answers for step 1, or no rejected ones for step 2."""
    for step, has, what in (
        (SFT, raw_dataset.has_answer, "answers (a column chosen, say)"),
        (REWARD, raw_dataset.has_rejected, "rejected answers"),
    ):
        if train_phase == step and not has:
            read = raw_dataset.recognised()
            raise DataError(f"{raw_dataset.dataset_name}: has no {what}, so step {step} cannot use it (read as {read})")


def check_rows(raw_dataset: PromptRawDataset, train_phase: int, split: str | None = None) -> None:
    """Read rows of a split (None: that of training) until a step can use one.

    The first rows are cheap in every kind of file. Only if none of them serves, the whole is opened, which copies the
    rows of some kinds to a temporary file.

    Raises:
        NoUsableRows: not one of them can be used, with the reasons and their places.
        DataError: damage that was met on the way.
    """
    check_answers(raw_dataset, train_phase)
    rows = raw_dataset.rows_of(split or raw_dataset.train_split)
    need, report = NEEDED_TEXTS[train_phase], RowReport(raw_dataset.dataset_name)
    for row in rows.head(FIRST_ROWS):
        with contextlib.suppress(SkipRow):
            if raw_dataset.examples(row, need):
                return
    for position in range(len(rows)):
        try:
            if raw_dataset.examples(rows[position], need):
                return
        except SkipRow as skipped:
            report.note(position, str(skipped), rows)
    report.raise_if_none(rows, need)


def make_row_maker(raw_dataset: PromptRawDataset, tokenizer, rules: TokenRules) -> RowMaker:
    """What makes a step's rows of a dataset.

    Raises:
        DataError: no answers for step 1 or 2, or no chat template where one is asked for.
    """
    if raw_dataset is not None:
        check_answers(raw_dataset, rules.train_phase)
    if rules.prompt_format == prompt_format.CHAT_TEMPLATE and not prompt_format.has_own_template(tokenizer):
        raise DataError("--chat_template: the tokenizer has none of its own; name one, as in --chat_template chatml")
    kind = {SFT: SftRowMaker, REWARD: RewardRowMaker, RLHF: PromptRowMaker}[rules.train_phase]
    try:
        return kind(raw_dataset, tokenizer, rules)
    except ValueError as error:  # of a chat template that cannot be used
        raise DataError(f"--chat_template: {error}") from error


class RowEncoder:
    """The chunk-wise way from text rows to Arrow batches: read, tokenise, finish.

    The middle stage runs in the tokenizers library without Python's lock, so that one chunk can be tokenised while the
    next is read and the last is finished.
    """

    def __init__(self, raw_dataset: PromptRawDataset, tokenizer, rules: TokenRules):
        self.raw, self.rules = raw_dataset, rules
        self.maker = make_row_maker(raw_dataset, tokenizer, rules)
        self.report = RowReport(raw_dataset.dataset_name)

    @property
    def counts(self) -> PreparationCounts:
        return self.maker.counts

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(self.maker.columns)

    def read(self, rows, positions) -> list[tuple]:
        """(what the row maker remembers, texts) of each usable row; the others are counted with their place."""
        samples = []
        for position in positions.tolist():
            reason = None
            try:
                samples += self.maker.samples(rows[position])
            except SkipRow as skipped:
                reason = str(skipped)
            self.report.note(position, reason, rows)
        return samples

    def tokenise(self, samples: list[tuple]) -> tuple[list[tuple], list[EncodedText]]:
        texts = [text for _, texts in samples for text in texts]
        return samples, self.maker.encoder.encode(texts)

    def finish(self, samples: list[tuple], encoded: list[EncodedText]) -> pa.RecordBatch:
        ends = np.cumsum([0] + [len(texts) for _, texts in samples]).tolist()
        made = [
            self._row(remembered, encoded[start:end])
            for (remembered, _), (start, end) in zip(samples, pairwise(ends), strict=True)
        ]
        made = [row for row in made if row is not None]
        self.counts.kept += len(made)
        columns = zip(*made, strict=True) if made else [() for _ in self.maker.columns]
        arrays = [_array(values, kind) for values, kind in zip(columns, self.maker.columns.values(), strict=True)]
        return pa.RecordBatch.from_arrays(arrays, names=list(self.maker.columns))

    def _row(self, remembered: tuple, encoded: list[EncodedText]) -> tuple | None:
        """A row; None to drop it, also where what is left of one that is too long can no longer be used."""
        try:
            return self.maker.row(remembered, encoded)
        except SkipRow:  # the learned answers were among the oldest turns, or a template refuses the rest
            self.counts.without_answer += 1
            return None


def _array(values: Sequence, kind: pa.DataType) -> pa.Array:
    """A column of numbers, texts or (lists of) lists. Built from buffers: pa.array would load pandas, for nothing."""
    if pa.types.is_string(kind):
        encoded = [value.encode() for value in values]
        buffers = [None, pa.py_buffer(_offsets(encoded)), pa.py_buffer(b"".join(encoded))]
        return pa.Array.from_buffers(kind, len(values), buffers)
    if not pa.types.is_list(kind):
        return _numbers(np.fromiter(values, np.int32, len(values)))
    flat = _array(list(chain.from_iterable(values)), kind.value_type)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(_offsets(values))], children=[flat])


def _offsets(values: Sequence) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.fromiter(map(len, values), np.int64, len(values)))]).astype(np.int32)


def block_batch(ids: np.ndarray, block: int) -> pa.RecordBatch:
    """[n * block] int32 -> n rows of a column ``input_ids``."""
    offsets = np.arange(0, len(ids) + 1, block, dtype=np.int32)
    rows = pa.Array.from_buffers(
        pa.list_(pa.int32()), len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[_numbers(ids.copy())]
    )
    return pa.RecordBatch.from_arrays([rows], names=["input_ids"])


def _numbers(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
