"""Whole texts to ids, and from a character of a text to the token that holds it."""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from tokenizers import Encoding, Tokenizer

from utils.data.special_tokens import any_of, is_marked, pieces_of, special_spellings, unmarked


@dataclass
class EncodedText:
    """The ids of one text, and how to find the token in which a character stands."""

    ids: list[int]
    given: str  # the text as it came, marks of special_tokens.py included: callers count its characters
    encoder: "TextEncoder"
    offsets: object | None = None  # the tokenizers library's record of them, where byte counts cannot tell
    stripped: int = 0  # EOS tokens taken off the end
    _ends: np.ndarray | None = None  # in bytes, of each token behind the leading ones

    def token_at(self, char: int) -> int:
        """The first token that holds the text from character ``char`` on; len(ids) if there is none."""
        if char >= len(self.given) and not self.stripped:
            return len(self.ids)
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
        if self._ends is None or len(self._ends) != len(self.ids) - leading:
            self._ends = np.cumsum(sizes[self.ids[leading:]])
        ends = self._ends
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

    def encode(self, texts: list[str]) -> list[EncodedText]:
        if self.tokenizer.is_fast and self.token_bytes is None:
            encoded = self.with_offsets(texts)
        else:  # of a fast tokenizer a quarter less work than with offsets
            rows = self._ids([self.readable(text) for text in texts], self._as_text, self.special_tokens)
            encoded = [EncodedText(ids, text, self) for ids, text in zip(rows, texts, strict=True)]
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

    def with_offsets(self, texts: list[str]) -> list[EncodedText]:
        backend, readable = self._backend(self._as_text), [self.readable(text) for text in texts]
        rows = backend.encode_batch(readable, add_special_tokens=self.special_tokens)
        return [EncodedText(row.ids, text, self, row) for row, text in zip(rows, texts, strict=True)]

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

    def _in_pieces(self, text: str) -> EncodedText:
        row = EncodedText(self._first_ids, text, self, _JoinedOffsets() if self.tokenizer.is_fast else None)
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
