"""Text rows to id rows: what a row of each step holds, where its answers stand, what one that is too long loses.

A row is (ids, length) all the way to the batch: masks come from lengths, never from comparing ids with the pad id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from utils.data import prompt_format
from utils.data.own_files import ConversationDataset
from utils.data.raw_datasets import PromptRawDataset
from utils.data.readers import DataError
from utils.data.row_texts import RowReport
from utils.data.text_encoder import EncodedText, TextEncoder

SFT, REWARD, RLHF = 1, 2, 3  # the steps, as train_phase counts them
NEEDED_TEXTS = {SFT: ("prompt", "chosen"), REWARD: ("prompt", "chosen", "rejected"), RLHF: ("prompt",)}


@dataclass(frozen=True)
class TokenRules:
    """All that decides how a text becomes ids, besides the tokenizer; part of the cache key."""

    train_phase: int
    max_seq_len: int
    truncation_side: str = "left"
    chat_template: bool = False
    allow_special_tokens: bool = False


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

    ``texts(sample)`` gives (what to remember, texts to encode), or None for a sample that lacks one;
    ``row(remembered, encoded)`` makes the row of their ids, or None to drop it. In between, all texts of a chunk
    are encoded at once.

    Attributes:
        special_tokens: whether the tokenizer puts its own BOS and the like around each text.
        columns: name -> Arrow type of what ``row`` gives, in its order.
    """

    special_tokens = True
    columns: ClassVar[dict[str, pa.DataType]]

    def __init__(self, raw_dataset: PromptRawDataset, tokenizer, rules: TokenRules):
        self.raw, self.tokenizer, self.rules = raw_dataset, tokenizer, rules
        self.eos = tokenizer.eos_token_id
        self.counts = PreparationCounts()
        self.encoder = TextEncoder(tokenizer, self.special_tokens, rules.chat_template, rules.allow_special_tokens)
        self.leading = self.encoder.leading

    def prompt_text(self, sample) -> str | None:
        text = self.raw.get_prompt(sample)
        if text is None or not self.rules.chat_template:
            return text
        return prompt_format.prompt_from_text(text, prompt_format.CHAT_TEMPLATE, self.tokenizer)

    def prompt_and_answers(self, sample, *answers: str) -> tuple[str, list[str]] | None:
        """(prompt, prompt and "chosen" or "rejected" answer each), or None if one is missing."""
        prompt = self.prompt_text(sample)
        if self.rules.chat_template:
            bare = [getattr(self.raw, f"get_{answer}")(sample) for answer in answers]
            full = [None if None in (prompt, text) else prompt + self._template_answer(text) for text in bare]
        else:
            full = [getattr(self.raw, f"get_prompt_and_{answer}")(sample) for answer in answers]
        return None if prompt is None or None in full else (prompt, full)

    def _template_answer(self, text: str) -> str:
        return prompt_format.format_answer(text, prompt_format.CHAT_TEMPLATE, self.tokenizer)

    def tokens_to_drop(self, length: int, prompt_length: int) -> int:
        if self.rules.truncation_side == "right":
            return 0
        return prompt_tokens_to_drop(length, prompt_length, self.rules.max_seq_len, self.leading)

    def count_cut(self, was_cut: bool, ends: bool) -> None:
        self.counts.truncated += was_cut
        self.counts.without_eos += not ends


class SftRowMaker(RowMaker):
    """Prompt, chosen answer, EOS; ``answer_spans`` are flat [start, end) pairs of what an answer is."""

    columns: ClassVar = {
        "input_ids": pa.list_(pa.int32()),
        "answer_spans": pa.list_(pa.int32()),
        "answers_only": pa.int32(),
    }
    answers_only = False

    def texts(self, sample):
        return self.prompt_and_answers(sample, "chosen")

    def row(self, prompt, encoded):
        start = encoded[0].token_at(len(prompt))
        ids = [*encoded[0].ids, self.eos]
        return self.fitted(ids, [(start, len(ids))])

    def fitted(self, ids, spans):
        drop = self.tokens_to_drop(len(ids), spans[-1][0])
        kept = cut(ids, self.rules.max_seq_len, self.leading, drop)
        spans = moved_spans(spans, self.leading, drop, len(kept))
        self.count_cut(len(kept) < len(ids), kept[-1] == self.eos)
        return kept, list(chain.from_iterable(spans)), self.answers_only


def answered(messages: list[dict] | None) -> list[dict]:
    """The turns up to the last answer: a question without one teaches nothing."""
    messages = list(messages or [])
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


class ConversationRowMaker(SftRowMaker):
    """Each turn: BOS question EOS, BOS answer EOS; only answers and their EOS are learned."""

    special_tokens = False
    answers_only = True

    def __init__(self, *args):
        super().__init__(*args)
        self.bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        self.leading = len(self.bos)

    def texts(self, sample):
        messages = answered(self.raw.get_messages(sample))
        if not messages:
            return None
        return [message["role"] for message in messages], [message["content"] for message in messages]

    def row(self, roles, encoded):
        ids, spans = [], []
        for role, piece in zip(roles, encoded, strict=True):
            start = len(ids) + len(self.bos)
            ids += [*self.bos, *piece.ids, self.eos]
            if role == "assistant":
                spans.append((start, len(ids)))
        return self.fitted(ids, spans)


class TemplateConversationRowMaker(SftRowMaker):
    """A conversation as the tokenizer's chat template writes it; only answers and the EOS behind them are learned.

    A template with generation markers says itself what an answer is. For any other, an answer is what the rendering of
    the conversation up to it has more than the rendering that asks for it.
    """

    answers_only = True

    def texts(self, sample):
        messages = answered(self.raw.get_messages(sample))
        if not messages:
            return None
        rendered, answers = prompt_format.render(messages, self.tokenizer)
        if not prompt_format.has_generation_markers(self.tokenizer):
            answers = self._rendered_answers(messages, rendered)
        return answers, [rendered]

    def row(self, answers, encoded):
        [whole] = encoded
        ids = list(whole.ids)
        learned = []
        for start, end in ((whole.token_at(start), whole.token_at(end)) for start, end in answers):
            # The EOS belongs to the answer, whatever blanks the template puts behind it.
            while end > start + 1 and end <= len(ids) and ids[end - 1] != self.eos and self.eos in ids[start : end - 1]:
                end -= 1
            learned.append((start, end + 1 if end < len(ids) and ids[end] == self.eos else end))
        end = learned[-1][1]
        ids = ids[:end]
        if ids[-1] != self.eos:
            ids, learned[-1] = [*ids, self.eos], (learned[-1][0], end + 1)
        return self.fitted(ids, learned)

    def _rendered_answers(self, messages, whole: str) -> list[tuple[int, int]]:
        """[start, end) of each answer in the characters of the whole rendering."""
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, _ = prompt_format.render(messages[:i], self.tokenizer, add_generation_prompt=True)
            answered, _ = prompt_format.render(messages[: i + 1], self.tokenizer)
            if not answered.startswith(asked) or not whole.startswith(answered.rstrip()):
                raise DataError(
                    "--chat_template: the tokenizer's template writes earlier turns differently once later ones "
                    "follow, so answers cannot be told from the rest; one with {% generation %} markers says it itself"
                )
            answers.append((len(asked), len(answered.rstrip())))
        return answers


class Pair(NamedTuple):
    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    was_cut: bool


class RewardRowMaker(RowMaker):
    """Two answers to one prompt; both lose the same part of it, so that they differ in nothing but the answer."""

    columns: ClassVar = {
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
    }

    def texts(self, sample):
        return self.prompt_and_answers(sample, "chosen", "rejected")

    def pair(self, prompt: str, encoded: list[EncodedText]) -> Pair:
        starts = [text.token_at(len(prompt)) for text in encoded]
        rows = [[*e.ids, self.eos] for e in encoded]
        drop = max(self.tokens_to_drop(len(ids), start) for ids, start in zip(rows, starts, strict=True))
        drop = max(0, min(drop, min(starts) - self.leading))  # what is dropped must lie in the prompt of both
        chosen, rejected = (cut(ids, self.rules.max_seq_len, self.leading, drop) for ids in rows)
        was_cut = len(chosen) < len(rows[0]) or len(rejected) < len(rows[1])
        return Pair(chosen, rejected, min(starts[0] - drop, len(chosen)), was_cut)

    def row(self, prompt, encoded):
        pair = self.pair(prompt, encoded)
        if pair.chosen == pair.rejected:
            self.counts.identical += 1
            return None
        self.count_cut(pair.was_cut, pair.chosen[-1] == pair.rejected[-1] == self.eos)
        return pair.chosen, pair.rejected, pair.prompt_length


class PromptRowMaker(RowMaker):
    """A prompt alone. The end of a prompt holds the question, so a long one loses its beginning under either rule."""

    columns: ClassVar = {"input_ids": pa.list_(pa.int32())}

    def texts(self, sample):
        prompt = self.prompt_text(sample)
        return None if prompt is None else (None, [prompt])

    def row(self, _, encoded):
        ids, limit = encoded[0].ids, self.rules.max_seq_len
        self.counts.truncated += len(ids) > limit
        return (cut(ids, limit, self.leading, max(0, len(ids) - limit)),)


def make_row_maker(raw_dataset: PromptRawDataset, tokenizer, rules: TokenRules) -> RowMaker:
    """What makes a step's rows of a dataset.

    Raises:
        DataError: no rejected answers for step 2, or no chat template where one is asked for.
    """
    if rules.train_phase == REWARD and not raw_dataset.has_rejected:
        raise DataError(f"--data_path {raw_dataset.dataset_name}: has no rejected answers, so step 2 cannot use it")
    if rules.chat_template and not prompt_format.has_own_template(tokenizer):
        raise DataError("--chat_template: the tokenizer has none of its own")
    if rules.train_phase == SFT and isinstance(raw_dataset, ConversationDataset):
        kind = TemplateConversationRowMaker if rules.chat_template else ConversationRowMaker
    else:
        kind = {SFT: SftRowMaker, REWARD: RewardRowMaker, RLHF: PromptRowMaker}[rules.train_phase]
    return kind(raw_dataset, tokenizer, rules)


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
            sample = rows[position]
            try:
                made = self.maker.texts(sample)
            except DataError:
                raise
            except ValueError as error:  # of a chat template
                raise DataError(f"--chat_template: {rows.where(position)}: {error}") from error
            reason = None
            if made is None:
                reason = self.raw.skip_reason(sample, NEEDED_TEXTS[self.rules.train_phase]) or "a text is missing"
            else:
                samples.append(made)
            self.report.note(position, reason, rows)
        return samples

    def tokenise(self, samples: list[tuple]) -> tuple[list[tuple], list[EncodedText]]:
        texts = [text for _, texts in samples for text in texts]
        return samples, self.maker.encoder.encode(texts)

    def finish(self, samples: list[tuple], encoded: list[EncodedText]) -> pa.RecordBatch:
        ends = np.cumsum([0] + [len(texts) for _, texts in samples]).tolist()
        made = [
            self.maker.row(remembered, encoded[start:end])
            for (remembered, _), (start, end) in zip(samples, pairwise(ends), strict=True)
        ]
        made = [row for row in made if row is not None]
        self.counts.kept += len(made)
        columns = zip(*made, strict=True) if made else [() for _ in self.maker.columns]
        arrays = [_array(values, kind) for values, kind in zip(columns, self.maker.columns.values(), strict=True)]
        return pa.RecordBatch.from_arrays(arrays, names=list(self.maker.columns))


def _array(values: Sequence, kind: pa.DataType) -> pa.Array:
    """A column of numbers or of id lists. Built from buffers: pa.array would load pandas, for nothing."""
    if not pa.types.is_list(kind):
        return _numbers(np.fromiter(values, np.int32, len(values)))
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.fromiter(chain.from_iterable(values), np.int32, int(offsets[-1]))
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(offsets)], children=[_numbers(flat)])


def block_batch(ids: np.ndarray, block: int) -> pa.RecordBatch:
    """[n * block] int32 -> n rows of a column ``input_ids``."""
    offsets = np.arange(0, len(ids) + 1, block, dtype=np.int32)
    rows = pa.Array.from_buffers(
        pa.list_(pa.int32()), len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[_numbers(ids.copy())]
    )
    return pa.RecordBatch.from_arrays([rows], names=["input_ids"])


def _numbers(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
