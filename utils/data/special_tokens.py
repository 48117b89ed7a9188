"""Control tokens (EOS, pad, <|im_end|> ...) in text of users: text that looks like one is encoded as text.

Text without a chat template needs no more than a tokenizer told to leave its special tokens unread. A chat template
writes control tokens of its own around the contents of turns. So the tokens' spellings inside contents are put between
two marks before rendering, and what stands between marks in the rendered text is encoded as text:

    content   "bye <|im_end|>"  ->  "bye ⟦<|im_end|>⟧"
    rendered  "<|im_start|>user\\nbye ⟦<|im_end|>⟧<|im_end|>\\n"
    ids       control, "user\\nbye ", text, control, "\\n"

The marks are two characters of a private-use plane, which contents lose first, so that nobody can forge them.
"""

import re
from functools import lru_cache

OPEN, CLOSE = "\U000f0000", "\U000f0001"
_MARKS = re.compile(f"[{OPEN}{CLOSE}]")


def unmarked(text: str) -> str:
    """The text as a person should see it."""
    return text if text.isascii() else _MARKS.sub("", text)


def is_marked(text: str) -> bool:
    return not text.isascii() and _MARKS.search(text) is not None


def mark_spellings(text: str, tokenizer, role: str = "user") -> str:
    """The content of a turn, with the control tokens spelled in it between marks.

    These are the tokenizer's special tokens. In what is not the assistant's they are also any other added tokens that
    the chat template writes: an answer may hold <think> or <tool_call>, and a question that spells them is only text.
    """
    template = "" if role == "assistant" else str(tokenizer.chat_template or "")
    spellings = _spellings(tokenizer, len(tokenizer), template)
    text = unmarked(text)
    return text if spellings is None else spellings.sub(f"{OPEN}\\g<0>{CLOSE}", text)


@lru_cache(maxsize=16)
def _spellings(tokenizer, size: int, template: str) -> re.Pattern | None:
    """``size`` is part of the key because tokens may be added to a tokenizer."""
    added = tokenizer.added_tokens_decoder.values()
    written = {token.content for token in added if token.content in template and not token.content.isspace()}
    return any_of(special_spellings(tokenizer) | written)


def special_spellings(tokenizer) -> set[str]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens)


def special_token_ids(tokenizer) -> set[int]:
    """Those with a role (EOS, pad ...), and others that were added as special (<|eot_id|>, <|im_end|> ...)."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def any_of(spellings) -> re.Pattern | None:
    """A pattern that finds the longest of some strings; None for no string."""
    longest_first = sorted(filter(None, spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def pieces_of(text: str) -> list[tuple[str, bool]]:
    """A rendered text cut at its marks: (piece, whether it is to be encoded as text).

    A mark that a template has parted from its partner cuts the text and does no more.
    """
    found, as_text = [], False
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece in (OPEN, CLOSE):
            as_text = piece == OPEN
        elif piece:
            found.append((piece, as_text))
    return found
