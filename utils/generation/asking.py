"""How a saved model is asked: in which prompt format, and its prompts as ids, as its training wrote them."""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

from utils.data import prompt_format
from utils.data.conversation import Conversation, Texts
from utils.data.encoding import cut
from utils.data.prompt_format import BARE, CHAT_TEMPLATE, FORMATS, HUMAN_ASSISTANT
from utils.data.rendering import ConversationWriter, Rendered, as_written, without_oldest
from utils.data.text_encoder import EncodedText, TextEncoder
from utils.process.errors import UserError

OLD_NAMES = {"plain": HUMAN_ASSISTANT}  # of --prompt_style


class _OneFormat(argparse.Action):
    """Both names of the flag set one value, so that two different ones cannot be meant."""

    def __call__(self, parser, namespace, value, option_string=None):
        before = getattr(namespace, self.dest)
        if before not in (None, value):
            raise UserError(f"{option_string} {value}: the prompt format was already given as {before}; name one")
        setattr(namespace, self.dest, value)


def add_prompt_format_argument(parser, otherwise: str) -> None:
    """--prompt_format, also by its former name; ``otherwise`` says what holds for a model that names no format."""
    parser.add_argument(
        "--prompt_format",
        "--prompt_style",
        action=_OneFormat,
        type=lambda name: OLD_NAMES.get(name, name),
        choices=FORMATS,
        default=None,
        help="how a conversation is written: human_assistant (' Human: ... Assistant:', formerly plain), hh (the same "
        "on paragraphs of their own, as in rm-static), bare (the question alone) or the tokenizer's chat_template "
        f"(default: the format that the model was trained on; {otherwise})",
    )


# ---------------------------------------------------------------- the format


class AskedFormat(NamedTuple):
    """The prompt format in which a model is asked.

    Attributes:
        name: of prompt_format.FORMATS.
        known: a flag or the model names it; else it is what suits such a model most often.
        reason: a few words for the log, "its own format, hh".
    """

    name: str
    known: bool
    reason: str


_NAMES_NONE = f"{HUMAN_ASSISTANT} (it names no format of its own; --prompt_format chooses another)"
UNNAMED = AskedFormat(HUMAN_ASSISTANT, False, _NAMES_NONE)  # of a model that tells nothing


def choose_format(path: str, tokenizer, asked: str | None) -> AskedFormat:
    """The format of a flag, else the one that a model was trained on, else what suits it.

    A chat template that training set aside is brought back into the tokenizer if the flag asks for it.

    Raises:
        UserError: the tokenizer has no chat template, or one that cannot be used.
    """
    chosen = _choice(tokenizer, asked)
    if chosen.name == CHAT_TEMPLATE and not prompt_format.has_own_template(tokenizer):
        own = prompt_format.own_template(tokenizer)
        if own is not None:
            tokenizer.chat_template = own
    try:
        prompt_format.format_prompt([{"role": "user", "content": "?"}], chosen.name, tokenizer)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return chosen


def _choice(tokenizer, asked: str | None) -> AskedFormat:
    own = prompt_format.remembered(tokenizer)
    if asked is not None:
        but = f", although it was trained on {own}" if own not in (None, asked) else ""
        return AskedFormat(asked, True, f"{asked}, as --prompt_format says{but}")
    if own is not None:
        return AskedFormat(own, True, f"its own format, {own}")
    if prompt_format.has_own_template(tokenizer):
        return AskedFormat(CHAT_TEMPLATE, False, "its tokenizer's chat template (it names no format of its own)")
    return UNNAMED


# ---------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: special tokens that contents spell are marked in it (special_tokens.py).
        dropped: how many of the oldest turns were left out.
        lost: tokens that even the rest lost at its beginning.
    """

    text: str
    ids: list[int]
    dropped: int = 0
    lost: int = 0


class PromptWriter:
    """Prompts of one model: their ids are those of step 3's rows in the same format.

    Args:
        allow_special_tokens: special tokens spelled in what users wrote become these tokens; else they are text.
    """

    def __init__(self, tokenizer, asked: AskedFormat, allow_special_tokens: bool = False):
        self.asked = asked
        self.writer = ConversationWriter(tokenizer, asked.name)
        self.encoder = TextEncoder(
            tokenizer, template=asked.name == CHAT_TEMPLATE, allow_special_tokens=allow_special_tokens
        )

    def write(self, example: Texts | Conversation, max_tokens: int | None = None) -> Prompt:
        """The prompt of a conversation, or of a text with or without the marks of turns.

        Of one that is too long the oldest turns go, but for a system turn; a question that alone is too long loses its
        beginning behind its head (BOS, the system turn, the template's header).

        Raises:
            SkipRow: the format, or the chat template, has no place for something in the conversation.
        """
        if isinstance(example, Texts):
            if self._stands(example):
                rendered = Rendered(example.prompt, len(example.prompt))
                return self._shortened(rendered, self._encoded(rendered), self.encoder.leading, max_tokens, 0)
            example = example.as_conversation()
        given = len(example.prompt)
        rendered = self.writer.prompt(example)
        encoded = self._encoded(rendered)
        if max_tokens is not None and len(encoded.ids) > max_tokens:
            example = without_oldest(
                example, lambda less: len(self._encoded(self.writer.prompt(less)).ids) <= max_tokens
            )
            rendered = self.writer.prompt(example)
            encoded = self._encoded(rendered)
        head = self.encoder.leading
        if max_tokens is not None and len(encoded.ids) > max_tokens:
            head = max(head, encoded.token_at(self.writer.head(example)))
        return self._shortened(rendered, encoded, head, max_tokens, given - len(example.prompt))

    def _stands(self, texts: Texts) -> bool:
        """Whether a text is asked as it was written: it has the format, or its marks and no format is known."""
        if as_written(texts, self.asked.name):
            return True
        guessed = not self.asked.known and self.asked.name not in (BARE, CHAT_TEMPLATE)
        return guessed and prompt_format.is_formatted(texts.prompt)

    def _encoded(self, rendered: Rendered) -> EncodedText:
        return self.encoder.encode([rendered.text])[0]

    def _shortened(
        self, rendered: Rendered, encoded: EncodedText, head: int, max_tokens: int | None, dropped: int
    ) -> Prompt:
        ids = encoded.ids
        lost = 0 if max_tokens is None else max(0, len(ids) - max_tokens)
        if lost and head >= max_tokens:  # no room for what matters most, which stands at the end
            head = min(self.encoder.leading, max_tokens - 1)
        return Prompt(rendered.text, cut(ids, len(ids), head, lost), dropped, lost)
