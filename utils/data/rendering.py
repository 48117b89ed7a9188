"""A conversation as the text of one row: where its answers stand in it, and what a row that is too long must keep."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from utils.data import chat_templates, prompt_format
from utils.data.conversation import Conversation, Message, Texts
from utils.data.row_texts import SkipRow, common_start

SYSTEM_ROLES = ("system", "developer")


@dataclass
class Rendered:
    """The text of a row.

    Attributes:
        text: special tokens that contents spell are marked in it (special_tokens.py) where a chat template wrote it.
        start: where what follows the prompt begins, in characters; the text's length for a prompt alone.
        answers: [start, end) of each answer that is learned. Its end token stands before ``end``, unless the format
            writes none there.
        last: where the last answer begins: behind ``start`` where the answer is several turns; None: there.
    """

    text: str
    start: int
    answers: list[tuple[int, int]] = field(default_factory=list)
    last: int | None = None

    def __post_init__(self):
        self.last = self.start if self.last is None else self.last


class ConversationWriter:
    """Writes conversations in one of the prompt formats.

    Args:
        style: of prompt_format.FORMATS.
        learns: every answer of a conversation is to be learned, not the last one alone; a chat template that would
            write earlier turns otherwise is then used in its training form.

    Attributes:
        splits: conversations of several answers make a row per answer, since the template has no training form.
        closes_turns: a template that writes an end token behind every answer, also where another turn follows.
    """

    def __init__(self, tokenizer, style: str, learns: bool = False):
        self.tokenizer, self.style, self.learns = tokenizer, style, learns
        self.by_template, self.template, self.splits = style == prompt_format.CHAT_TEMPLATE, None, False
        self.closes_turns = False
        if not self.by_template:
            return
        own, self.special = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        self.abilities = chat_templates.abilities(own, self.special)
        form = chat_templates.training_form(own, self.special) if learns else None
        self.template = form or own
        self.splits = learns and form is None and chat_templates.rewrites_turns(own, self.special)
        ends = tokenizer.convert_ids_to_tokens(sorted(prompt_format.end_ids(tokenizer, by_template=True)))
        self.closes_turns = chat_templates.closes_answers(self.template, self.special, frozenset(ends))

    def prompt(self, conversation: Conversation) -> Rendered:
        """The text up to where the next answer begins."""
        messages, tools = self._suited(conversation.prompt, conversation.tools)
        text, _ = self._written(messages, tools, waits=True)
        return Rendered(text, len(text))

    def answered(self, conversation: Conversation, answer: Sequence[Message], spans: bool = True) -> Rendered:
        """The text of the prompt with one of its answers. Every turn of the assistant's that has no weight 0 is one.

        Args:
            spans: whether to find where the learned answers stand, which writes the text anew for each of them.
        """
        turns, first = [*conversation.prompt, *answer], len(conversation.prompt)
        messages, tools = self._suited(turns, conversation.tools)
        text, places = self._written(messages, tools)
        if self.by_template and len(answer) == 1 and not (self.learns or places):
            return self._behind_its_prompt(text, messages, tools)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if places and self.by_template:
            if len(places) != len(answers):
                raise SkipRow("the chat template's {% generation %} marks are not one for each answer")
            places = dict(zip(answers, places, strict=True))
        learned = [i for i in answers if turns[i].get("weight") != 0] if self.learns and spans else []
        found = {i: self._answer_span(i, text, places, messages, tools) for i in {*learned, first, answers[-1]}}
        return Rendered(text, found[first][0], [found[i] for i in learned], found[answers[-1]][0])

    def left_out(self, messages: Sequence[Message]) -> Iterator[str]:
        """Fields of messages that say who speaks or what is answered, and that the format has no place for."""
        for message in messages:
            is_result = message["role"] == "tool"
            for name, ability in (("name", "result_names" if is_result else "names"), ("tool_call_id", "call_ids")):
                if name in message and not (self.by_template and getattr(self.abilities, ability)):
                    yield name

    def _behind_its_prompt(self, text: str, messages: list[Message], tools) -> Rendered:
        """A row whose last turn is its answer, which follows its prompt as it is asked for.

        A template may write the prompt otherwise once it is answered (Mistral's takes the system turn away). The
        answer is then written by its training form, behind the prompt as the template asks.
        """
        asked = self._written(messages[:-1], tools, waits=True)[0]
        if not text.startswith(asked) and (form := chat_templates.training_form(self.template, self.special)):
            offered = chat_templates.render_template(form, self.special, messages[:-1], tools, True)[0]
            written = chat_templates.render_template(form, self.special, messages, tools)[0]
            if written.startswith(offered):
                text = asked + written[len(offered) :]
        start = len(common_start([asked, text]))
        return Rendered(text, start)

    def head(self, conversation: Conversation) -> int:
        """How much of a row's text stays when its beginning is cut: BOS, system turn, the header of the first question.

        As published, a text without a system turn loses the mark of its first turn, too, where no template wrote it.
        """
        messages = conversation.prompt
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        if not first and not self.by_template:
            return 0
        other = [*messages[:first], messages[first] | {"content": "\uf8ff"}, *messages[first + 1 :]]
        texts = [self.prompt(replace(conversation, prompt=part)).text for part in (messages, other)]
        return len(common_start(texts))

    # How a format writes

    def _written(self, messages, tools, waits=False) -> tuple[str, list]:
        try:
            if self.by_template:
                text, marks = chat_templates.render_template(self.template, self.special, messages, tools, waits)
                # What parts turns is no part of an answer where EOS is to follow the answer itself.
                return text if waits or self.closes_turns else text.rstrip(), marks
            return prompt_format.write_turns(messages, self.style, waits)
        except ValueError as error:
            raise SkipRow(str(error)) from error

    def _answer_span(self, i: int, text: str, places, messages, tools) -> tuple[int, int]:
        """[start, end) of turn ``i``, an answer, in the text of all turns.

        Where the template closes each turn by a token, that one tells the end, and the text's own end is given here.
        Else an answer ends where the template goes on otherwise than it would end the text there.
        """
        last = i == len(messages) - 1
        if places and not self.closes_turns:
            return places[i]
        if places:
            start = places[i][0]
        else:
            asked = self._written(messages[:i], tools, waits=True)[0]
            # A template may write the beginning of an answer otherwise where it asks for one (an open <think>, say).
            start = len(common_start([asked, text]))
        if self.closes_turns or last:
            return start, len(text)
        return start, len(common_start([self._written(messages[: i + 1], tools)[0], text]))

    # What a format can write

    def _suited(self, messages: Sequence[Message], tools: list | None) -> tuple[list[Message], list | None]:
        """Messages and tools as the format takes them.

        Raises:
            SkipRow: they hold something that the format would leave out in silence.
        """
        if self.by_template:
            if tools and not self.abilities.tools:
                raise SkipRow("the chat template writes no tools")
            suited = [self._for_template(message) for message in messages]
            return prompt_format.marked_turns(suited, self.tokenizer), prompt_format.marked_tools(tools, self.tokenizer)
        for name in ("tool_calls", "reasoning_content"):
            if any(message.get(name) for message in messages):
                raise SkipRow(f"field '{name}' needs --chat_template, with a template that writes it")
        if tools:
            raise SkipRow("field 'tools' needs --chat_template, with a template that writes it")
        return list(messages), None

    def _for_template(self, message: Message) -> Message:
        can = self.abilities
        if message["role"] == "developer" and not can.developer:
            message = message | {"role": "system"}
        if message["role"] == "system" and not can.system:
            raise SkipRow("the chat template writes no system turn")
        if message["role"] == "tool" and not can.tool:
            raise SkipRow("the chat template writes no turn of the role tool")
        if message.get("tool_calls") and not (can.calls_with_text if message["content"] else can.tool_calls):
            raise SkipRow("the chat template writes no tool_calls" + " beside text" * bool(message["content"]))
        if message.get("reasoning_content") and not can.reasoning:
            raise SkipRow("the chat template writes no reasoning_content")
        return message


def without_oldest(conversation: Conversation, fits: Callable[[Conversation], bool]) -> Conversation:
    """The conversation without its oldest turns, up to the first question from which on it fits; where none does, its
    last question alone. A system turn stays.

    Each turn that goes makes a text shorter, so that bisection finds the question.
    """
    prompt = conversation.prompt
    kept = 1 if prompt and prompt[0]["role"] in SYSTEM_ROLES else 0
    questions = [i for i, message in enumerate(prompt) if i > kept and message["role"] == "user"]
    if not questions:
        return conversation

    def beginning_at(question: int) -> Conversation:
        return replace(conversation, prompt=[*prompt[:kept], *prompt[question:]])

    first = bisect_left(questions, True, key=lambda question: fits(beginning_at(question)))
    return beginning_at(questions[min(first, len(questions) - 1)])


def one_per_answer(conversation: Conversation, answer: list[Message]) -> list[tuple[Conversation, list[Message]]]:
    """A conversation with several answers, as one conversation for each that is learned, in which it is the last."""
    messages, made = [*conversation.prompt, *answer], []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") != 0:
            before = [other | {"weight": 0} if other["role"] == "assistant" else other for other in messages[:i]]
            made.append((replace(conversation, prompt=before), [message]))
    return made


def as_written(texts: Texts, style: str | None) -> bool:
    """Whether texts of a dataset already are in the format that a run asks for, so that they stay as they are."""
    if style is None:
        return True
    if style == prompt_format.CHAT_TEMPLATE:
        return False
    formatted = prompt_format.is_formatted(texts.prompt)
    return (
        not formatted
        if style == prompt_format.BARE
        else formatted and prompt_format.written_style(texts.prompt) == style
    )


def as_it_stands(texts: Texts) -> list[Rendered]:
    """Texts of a dataset as the texts of rows, the prompt alone where there is no answer."""
    start = len(texts.prompt)
    if not texts.wholes:
        return [Rendered(texts.prompt, start)]
    if not texts.is_transcript:
        return [Rendered(whole, start, [(start, len(whole))]) for whole in texts.wholes]
    parts = [prompt_format.transcript_parts(texts.prompt, whole[start:]) for whole in texts.wholes]
    answers = [[(start + a, start + b) for role, a, b in turns if role == "assistant"] for turns in parts]
    return [Rendered(whole, start, spans, spans[-1][0]) for whole, spans in zip(texts.wholes, answers, strict=True)]
