"""Text rows to id rows: what a row of each step holds, where its answers stand, what one that is too long loses."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Encoding, Tokenizer

from utils.data import prompt_format
from utils.data.raw_datasets import ConversationDataset, DataError, PromptRawDataset, RowReport
from utils.data.special_tokens import any_of, is_marked, pieces_of, special_spellings, unmarked

SFT, REWARD, RLHF = 1, 2, 3
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


# ---------------------------------------------------------------- ids of a text


@dataclass
class Ids:
    """The ids of one text, and how to find the token in which a character stands."""

    ids: list[int]
    given: str  # the text as it came, marks of special_tokens.py included: callers count its characters
    encoder: "TextEncoder"
    offsets: object | None = None  # the tokenizers library's record of them, where byte counts cannot tell
    stripped: int = 0  # EOS tokens taken off the end

    def token_at(self, char: int) -> int:
        """The first token that holds the text from character ``char`` on; len(ids) if there is none."""
        text, before = self.encoder.readable(self.given), self.encoder.readable(self.given[:char])
        if self.offsets is None and self.encoder.token_bytes is not None:
            position = self._token_at_byte(text, _byte_count(before))
            if position is not None:
                return position
            self.offsets = self.encoder.with_offsets([text])[0].offsets
        if self.offsets is not None:
            # Some tokenizers leave blanks out of a token's span, so the first character that has a token decides.
            for position in range(len(before), len(text)):
                token = self.offsets.char_to_token(position)
                if token is not None:
                    return min(token, len(self.ids))
            return len(self.ids)
        alone = self.encoder.encode([self.given[:char]])[0].ids
        pairs = zip(self.ids, alone, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(alone)))

    def _token_at_byte(self, text: str, byte: int) -> int | None:
        """None where the tokens' bytes are not the text's: a token swallowed blanks, or the text was normalised."""
        sizes, leading = self.encoder.token_bytes, self.encoder.leading
        ends = np.cumsum(sizes[self.ids[leading:]])
        rest = _byte_count(text) - (int(ends[-1]) if len(ends) else 0)
        if rest not in (0, self.stripped * sizes[self.encoder.tokenizer.eos_token_id]):
            return None
        return leading + int(np.searchsorted(ends, byte, side="right")) if self.encoder.keeps(text) else None


def _byte_count(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


@dataclass
class _JoinedOffsets:
    """Offsets of a text that was encoded in pieces, each behind a few characters that are no part of the text.

    Attributes:
        parts: (first character of the piece, characters before it, first token, what the tokenizer recorded) of each;
            the token counts from what stands before the piece.
    """

    parts: list[tuple[int, int, int, Encoding]] = field(default_factory=list)

    def char_to_token(self, char: int) -> int | None:
        start, before, first_token, record = next(part for part in reversed(self.parts) if part[0] <= char)
        token = record.char_to_token(char - start + before)
        return None if token is None else first_token + token


class TextEncoder:
    """Whole texts to ids, on all cores where the tokenizer is a fast one.

    A final EOS of the tokenizer's own is taken off, since the one EOS of a finished answer is added by the rules of
    the row.

    Args:
        special_tokens: whether the tokenizer puts its own BOS and the like around a text.
        template: the texts come from a chat template, which writes its special tokens itself; spellings of them in
            contents are marked (special_tokens.py).
        allow_special_tokens: a special token spelled in a text becomes that token; else it is encoded as text.

    Attributes:
        leading: how many tokens (BOS and the like) the tokenizer puts before every text.
        token_bytes: see ``byte_lengths``; None where only offsets can tell which characters a token stands for.
    """

    def __init__(self, tokenizer, special_tokens=True, template=False, allow_special_tokens=False):
        self.tokenizer, self.template = tokenizer, template
        self.special_tokens, self.allow_special_tokens = special_tokens and not template, allow_special_tokens
        self.leading = leading_specials(tokenizer) if self.special_tokens else 0
        self._first_ids = tokenizer("a")["input_ids"][: self.leading]
        self.token_bytes, self.normal_form = None, None
        if tokenizer.is_fast:
            self._written, self._backends = tokenizer.backend_tokenizer.to_str(), {}
            state = json.loads(self._written)
            self.token_bytes = byte_lengths(state)
            self.normal_form = (state["normalizer"] or {}).get("type")
        self._unsafe = None if allow_special_tokens else self._found_in_text()

    def _found_in_text(self) -> re.Pattern | None:
        """Special tokens that are found even in what is read as text, by vocabularies of whole words (Unigram, say)."""
        spellings = sorted(special_spellings(self.tokenizer) - {self.tokenizer.unk_token})
        rows = zip(spellings, self._ids(spellings, as_text=True), strict=True)
        return any_of(s for s, ids in rows if len(s) > 1 and self.tokenizer.convert_tokens_to_ids(s) in ids)

    def _backend(self, as_text: bool) -> Tokenizer:
        """A copy of the Rust tokenizer that reads special tokens as text, or as themselves.

        A copy, because the switch lies in the tokenizer: others who use it turn it, and while it is at work in another
        thread it cannot be changed.
        """
        if as_text not in self._backends:
            copy = Tokenizer.from_str(self._written)
            copy.encode_special_tokens = as_text
            copy.no_truncation()
            copy.no_padding()
            self._backends[as_text] = copy
        return self._backends[as_text]

    def readable(self, text: str) -> str:
        return unmarked(text) if self.template else text

    def keeps(self, text: str) -> bool:
        """Whether the tokenizer's normaliser leaves this text as it is."""
        return self.normal_form is None or text.isascii() or unicodedata.is_normalized(self.normal_form, text)

    @property
    def _as_text(self) -> bool:
        return not (self.template or self.allow_special_tokens)

    def encode(self, texts: list[str]) -> list[Ids]:
        if self.tokenizer.is_fast and self.token_bytes is None:
            encoded = self.with_offsets(texts)
        else:  # of a fast tokenizer a quarter less work than with offsets
            rows = self._ids([self.readable(text) for text in texts], self._as_text, self.special_tokens)
            encoded = [Ids(ids, text, self) for ids, text in zip(rows, texts, strict=True)]
        encoded = [self._in_pieces(row.given) if self._holds_spellings(row.given) else row for row in encoded]
        eos = self.tokenizer.eos_token_id
        for row in encoded:
            while row.ids and row.ids[-1] == eos:
                row.ids, row.stripped = row.ids[:-1], row.stripped + 1
        return encoded

    def _ids(self, texts: list[str], as_text: bool, special_tokens: bool = False) -> list[list[int]]:
        if self.tokenizer.is_fast:
            rows = self._backend(as_text).encode_batch_fast(texts, add_special_tokens=special_tokens)
            return [row.ids for row in rows]
        options = dict(add_special_tokens=special_tokens, split_special_tokens=as_text)
        return self.tokenizer(texts, **options)["input_ids"] if texts else []

    def with_offsets(self, texts: list[str]) -> list[Ids]:
        backend, readable = self._backend(self._as_text), [self.readable(text) for text in texts]
        rows = backend.encode_batch(readable, add_special_tokens=self.special_tokens)
        return [Ids(row.ids, text, self, row) for row, text in zip(rows, texts, strict=True)]

    def _holds_spellings(self, text: str) -> bool:
        """Whether a text has spellings of special tokens in it that one pass would not leave text."""
        if self.allow_special_tokens:
            return False
        return is_marked(text) if self.template else self._unsafe is not None and bool(self._unsafe.search(text))

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """(piece, whether it is to be read as text); within text, unsafe spellings are cut after their first letter."""
        pieces = []
        for piece, as_text in pieces_of(text) if self.template else [(text, True)]:
            found = self._unsafe.finditer(piece) if as_text and self._unsafe is not None else ()
            cuts = [0, *(match.start() + 1 for match in found), len(piece)]
            pieces += [(piece[start:end], as_text) for start, end in pairwise(cuts)]
        return pieces

    def _in_pieces(self, text: str) -> Ids:
        row = Ids(self._first_ids, text, self, _JoinedOffsets() if self.tokenizer.is_fast else None)
        [newline] = self._ids(["\n"], as_text=True)
        char = 0
        for piece, as_text in self._pieces(text):
            # Some tokenizers put a blank before a text. Behind a line's end, which is taken off again, they do not.
            before, skipped = ("\n", len(newline)) if char else ("", 0)
            [ids] = self._ids([before + piece], as_text)
            if ids[:skipped] != newline[:skipped]:
                before, skipped, [ids] = "", 0, self._ids([piece], as_text)
            if row.offsets is not None:
                record = self._backend(as_text).encode(before + piece, add_special_tokens=False)
                row.offsets.parts.append((char, len(before), len(row.ids) - skipped, record))
            row.ids = row.ids + ids[skipped:]
            char += len(piece)
        return row


def byte_lengths(state: dict) -> np.ndarray | None:
    """[vocabulary] how many bytes of the text each token stands for, where a tokenizer cuts the text's bytes and does
    nothing else to them (byte-level BPE of GPT-2, Llama 3, Qwen, SmolLM2 and others); None for any other tokenizer.

    Args:
        state: what the tokenizers library writes to tokenizer.json.
    """
    splitter = state["pre_tokenizer"] or {}
    parts = [part for part in splitter.get("pretokenizers", [splitter]) if part.get("type") == "ByteLevel"]
    keeps_text = (state["normalizer"] or {"type": "NFC"})["type"] == "NFC"
    if not keeps_text or len(parts) != 1 or parts[0]["add_prefix_space"] or state["model"]["type"] != "BPE":
        return None
    # Every byte has one character in a byte-level vocabulary; added tokens are written as they are.
    lengths = {index: len(token) for token, index in state["model"]["vocab"].items()}
    lengths |= {token["id"]: len(token["content"].encode()) for token in state["added_tokens"]}
    table = np.zeros(max(lengths) + 1, np.int64)
    table[list(lengths)] = list(lengths.values())
    return table


def leading_specials(tokenizer) -> int:
    """How many tokens (BOS and the like) the tokenizer puts before every text."""
    with_specials, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_specials) - len(without) + 1):
        if with_specials[start : start + len(without)] == without:
            return start
    return 0


# ---------------------------------------------------------------- what fits


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


# ---------------------------------------------------------------- one kind of row per step


class _Rows:
    """Turns samples of one dataset into id rows.

    ``texts(sample)`` gives (what to remember, texts to encode), or None for a sample that lacks one;
    ``row(remembered, encoded)`` makes the row of their ids, or None to drop it. In between, all texts of a chunk
    are encoded at once.
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


class SftRows(_Rows):
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


class ConversationRows(SftRows):
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


class TemplateConversationRows(SftRows):
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


class RewardRows(_Rows):
    """Two answers to one prompt; both lose the same part of it, so that they differ in nothing but the answer."""

    columns: ClassVar = {
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
    }

    def texts(self, sample):
        return self.prompt_and_answers(sample, "chosen", "rejected")

    def pair(self, prompt: str, encoded: list[Ids]) -> Pair:
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


class PromptRows(_Rows):
    """A prompt alone. The end of a prompt holds the question, so a long one loses its beginning under either rule."""

    columns: ClassVar = {"input_ids": pa.list_(pa.int32())}

    def texts(self, sample):
        prompt = self.prompt_text(sample)
        return None if prompt is None else (None, [prompt])

    def row(self, _, encoded):
        ids, limit = encoded[0].ids, self.rules.max_seq_len
        self.counts.truncated += len(ids) > limit
        return (cut(ids, limit, self.leading, max(0, len(ids) - limit)),)


def row_maker(raw_dataset: PromptRawDataset, tokenizer, rules: TokenRules) -> _Rows:
    """The kind of rows a step makes of a dataset.

    Raises:
        DataError: no rejected answers for step 2, or no chat template where one is asked for.
    """
    if rules.train_phase == REWARD and not raw_dataset.has_rejected:
        raise DataError(f"--data_path {raw_dataset.dataset_name}: has no rejected answers, so step 2 cannot use it")
    if rules.chat_template and not prompt_format.has_own_template(tokenizer):
        raise DataError("--chat_template: the tokenizer has none of its own")
    if rules.train_phase == SFT and isinstance(raw_dataset, ConversationDataset):
        kind = TemplateConversationRows if rules.chat_template else ConversationRows
    else:
        kind = {SFT: SftRows, REWARD: RewardRows, RLHF: PromptRows}[rules.train_phase]
    return kind(raw_dataset, tokenizer, rules)


def columns_of_step(train_phase: int) -> dict[str, pa.DataType]:
    return {SFT: SftRows, REWARD: RewardRows, RLHF: PromptRows}[train_phase].columns


class RowEncoder:
    """The chunk-wise way from text rows to Arrow batches: read, tokenise, finish.

    The middle stage runs in the tokenizers library without Python's lock, so that one chunk can be tokenised while the
    next is read and the last is finished.
    """

    def __init__(self, raw_dataset: PromptRawDataset, tokenizer, rules: TokenRules):
        self.raw, self.tokenizer, self.rules = raw_dataset, tokenizer, rules
        self.rows = row_maker(raw_dataset, tokenizer, rules)
        self.report = RowReport(raw_dataset.dataset_name)

    @property
    def counts(self) -> PreparationCounts:
        return self.rows.counts

    def read(self, rows, positions) -> list[tuple]:
        """(what the row maker wants to remember, texts) of each usable row; the others are counted with their place."""
        found = []
        for position in positions.tolist():
            sample = rows[position]
            try:
                made = self.rows.texts(sample)
            except DataError:
                raise
            except ValueError as error:  # of a chat template
                raise DataError(f"--chat_template: {rows.where(position)}: {error}") from error
            reason = None
            if made is None:
                reason = self.raw.skip_reason(sample, NEEDED_TEXTS[self.rules.train_phase]) or "a text is missing"
            else:
                found.append(made)
            self.report.note(position, reason, rows)
        return found

    def tokenise(self, samples: list[tuple]) -> tuple[list[tuple], list[Ids]]:
        texts = [text for _, texts in samples for text in texts]
        return samples, self.rows.encoder.encode(texts)

    def finish(self, samples: list[tuple], encoded: list[Ids]) -> pa.RecordBatch:
        ends = np.cumsum([0] + [len(texts) for _, texts in samples]).tolist()
        made = [
            self.rows.row(memory, encoded[start:end])
            for (memory, _), (start, end) in zip(samples, pairwise(ends), strict=True)
        ]
        made = [row for row in made if row is not None]
        self.counts.kept += len(made)
        columns = zip(*made, strict=True) if made else [() for _ in self.rows.columns]
        arrays = [_array(values, kind) for values, kind in zip(columns, self.rows.columns.values(), strict=True)]
        return pa.RecordBatch.from_arrays(arrays, names=list(self.rows.columns))


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
