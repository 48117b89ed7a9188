"""The shapes in which people publish chat data, and how each is read: the one table of recognition.

A dataset without a class of its own (raw_datasets.py) is recognised by its columns and what its first rows hold there.
The rows of SHAPES are tried from the top; the first that fits reads the dataset. To add a shape, write a function that
takes ``Found`` and gives a ``Shape`` or None, and enter it where it belongs in the order.

A shape gives examples (conversation.py): texts that stand as they are, where a file names them prompt and chosen as the
published datasets do, or messages, which the run's prompt format writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from utils.data import prompt_format
from utils.data.conversation import (
    Conversation,
    Message,
    MessageReader,
    Texts,
    assistant,
    check_order,
    loaded_json,
    read_tools,
    system,
    user,
    without_last_answer,
)
from utils.data.readers import ConcatRows, Rows, TextFile
from utils.data.row_texts import Row, SkipRow, common_start, expect, number, text, usable

Example = Texts | Conversation

HEAD_ROWS = 50  # looked at to see what a column holds
MESSAGES_COLUMNS = ("messages", "conversation", "conversations")
SYSTEM_COLUMNS = ("system", "system_prompt")
QUESTION_COLUMNS = ("question", "query", "instruction", "prompt")
ANSWER_COLUMNS = ("answer", "response", "output", "completion")
CONTEXT_COLUMNS = ("input", "context")
LIST_COLUMNS = ("answers", "responses", "completions")


# ---------------------------------------------------------------- what is there


class Found:
    """The columns of a dataset, and what its first rows hold in them.

    Args:
        rows: of the train split.
        columns: own column names by role: prompt, chosen, rejected, messages, system, tools.
    """

    def __init__(self, rows: Rows, columns: Mapping[str, str] | None = None):
        self.names = list(rows.column_names)
        self.columns = dict(columns or {})
        self.head = rows.head(HEAD_ROWS)
        self.plain_text = all(
            isinstance(part, TextFile) for part in (rows.parts if isinstance(rows, ConcatRows) else [rows])
        )

    def first(self, name: str) -> Any:
        """The first value of a column that is neither null nor empty; None if there is none."""
        values = (row.get(name) for row in self.head if isinstance(row, Mapping))
        return next((value for value in values if value not in (None, "", [], {})), None)

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)

    def one_of(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.names), None)

    def holds_messages(self, name: str | None) -> bool:
        return name is not None and is_messages(self.first(name))

    def holds_text(self, name: str | None) -> bool:
        return name is not None and isinstance(self.first(name), str) and not self.holds_messages(name)

    def system(self) -> str | None:
        """The column of system prompts, if there is one: that of the flags, or one that holds texts or nothing yet."""
        there = (name for name in SYSTEM_COLUMNS if self.has(name))
        texts = (name for name in there if self.first(name) is None or self.holds_text(name))
        return self.columns.get("system") or next(texts, None)

    def tools(self) -> str | None:
        return self.columns.get("tools") or self.one_of(("tools",))


def is_messages(value: Any) -> bool:
    """Whether a value is a list of turns, or JSON that spells one."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return False
        try:
            value = loaded_json(value, "")
        except SkipRow:
            return False
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and not {"role", "from", "human"}.isdisjoint(value[0])
    )


# ---------------------------------------------------------------- what a shape is


@dataclass
class Shape:
    """How the rows of one dataset are read.

    Attributes:
        description: in words, for the log: "preference pairs as messages, prompt implicit".
        columns: those that are read.
        has_answer, has_rejected: what a row holds beside a prompt.
        system, tools: columns beside the conversation.
    """

    description: str
    columns: list[str]
    has_answer: bool = False
    has_rejected: bool = False
    system: str | None = None
    tools: str | None = None
    reader: MessageReader = field(default_factory=MessageReader)

    def __post_init__(self):
        extra = [name for name in (self.system, self.tools) if name is not None]
        self.columns = list(dict.fromkeys(name for name in [*self.columns, *extra] if name))

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        """What a row gives to a step that needs ``need`` of prompt, chosen, rejected; mostly one example.

        Raises:
            SkipRow: the row lacks something of it.
        """
        raise NotImplementedError

    def grouped(self, rows: Rows) -> Rows:
        """The rows that are shared out over the steps: those of the file, or groups of them."""
        return rows

    # What several shapes do with a row

    def with_columns(self, row: Row, conversation: Conversation) -> Conversation:
        """The conversation with the row's own columns of a system prompt and of tools."""
        tools = read_tools(row.get(self.tools)) if self.tools else None
        prompt, given = conversation.prompt, row.get(self.system) if self.system else None
        if isinstance(given, str) and given.strip():
            usable(given, f"'{self.system}'")
            if prompt and prompt[0]["role"] in ("system", "developer"):
                if prompt[0]["content"].strip() != given.strip():
                    raise SkipRow(f"field '{self.system}' and the first turn are two system prompts")
            else:
                prompt = [system(given), *prompt]
        return replace(conversation, prompt=prompt, tools=tools)

    def checked(self, conversation: Conversation, name: str) -> Conversation:
        for answer in conversation.answers or ((),):
            check_order([*conversation.prompt, *answer], name)
        return conversation


# ---------------------------------------------------------------- prompt, chosen, rejected


@dataclass
class NamedRoles(Shape):
    """A prompt and one or two answers, each a text or a list of messages."""

    prompt: str | None = "prompt"
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None  # unpaired feedback: whether the answer was liked
    question: bool = False  # texts are bare questions and answers: the prompt format writes them

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        answers = [name for role, name in (("chosen", self.chosen), ("rejected", self.rejected)) if role in need]
        if self.label and "chosen" in need and row.get(self.label) is not True and row.get(self.label) != 1:
            raise SkipRow(f"field '{self.label}' is not true: the answer was not liked")
        if None in answers:
            raise SkipRow("the dataset has no such answer")
        has_system = self.system is not None and isinstance(row.get(self.system), str) and row[self.system].strip()
        tools = self.tools is not None and row.get(self.tools)
        values = [row.get(name) for name in (self.prompt, *answers)]
        if not (self.question or has_system or tools or any(map(is_messages, values))):
            prompt = text(row, self.prompt)
            texts = tuple(text(row, name) for name in answers)
            return [Texts(prompt, tuple(prompt + answer for answer in texts), texts)]
        return [self._conversation(row, answers)]

    def _conversation(self, row: Row, names: list[str]) -> Conversation:
        answers = [self._answer(row, name) for name in names]
        given = row.get(self.prompt)
        if not is_messages(given):
            written = text(row, self.prompt)
            prompt = [user(written)] if self.question else prompt_format.parse_turns(written)
        else:
            prompt = self.reader.read(given, self.prompt)
        whole = [answer for answer in answers if answer[0]["role"] != "assistant"]
        if whole:  # the answers repeat the prompt
            prompt = common_turns(whole)
            answers = [answer[len(prompt) :] if answer in whole else answer for answer in answers]
        elif prompt and prompt[-1]["role"] == "assistant":
            prompt, _ = without_last_answer(prompt)
        return self.checked(self.with_columns(row, Conversation(prompt, tuple(answers))), self.prompt)

    def _answer(self, row: Row, name: str) -> list[Message]:
        return self.reader.read(row[name], name) if is_messages(row.get(name)) else [assistant(text(row, name).strip())]


def common_turns(wholes: Sequence[list[Message]]) -> list[Message]:
    """The turns with which all begin, up to the last turn before an answer."""
    first, count = wholes[0], 0
    shortest = min(len(without_last_answer(whole)[0]) for whole in wholes)
    while count < shortest and all(whole[count] == first[count] for whole in wholes):
        count += 1
    prompt, _ = without_last_answer(first[:count])
    if not prompt:
        raise SkipRow("the answers have no prompt in common")
    return prompt


@dataclass
class ImplicitPrompt(Shape):
    """Two whole conversations whose common beginning is the prompt: lists of messages, or transcripts."""

    chosen: str = "chosen"
    rejected: str = "rejected"

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        if is_messages(row.get(self.chosen)):
            wholes = [self.reader.read(row.get(name), name) for name in (self.chosen, self.rejected)]
            prompt = common_turns(wholes)
            answers = tuple(whole[len(prompt) :] for whole in wholes)
            conversation = Conversation(prompt, answers[: len(need) - 1])
            return [self.checked(self.with_columns(row, conversation), self.chosen)]
        chosen, rejected = text(row, self.chosen), text(row, self.rejected)
        prompt = transcript_prompt(chosen, rejected)
        wholes = (chosen, rejected)[: len(need) - 1]
        answers = tuple(usable(whole[len(prompt) :], f"'{self.chosen}' after its prompt") for whole in wholes)
        texts = Texts(prompt, wholes, answers, is_transcript=True)
        if self.system and isinstance(row.get(self.system), str) and row[self.system].strip():
            return [self.checked(self.with_columns(row, texts.as_conversation()), self.chosen)]
        return [texts]


def transcript_prompt(*wholes: str) -> str:
    """What transcripts have in common up to the last mark of the assistant's in it.

    Raises:
        SkipRow: there is none.
    """
    common = common_start(wholes)
    end = prompt_format.end_of_last_mark(common)
    if end is None:
        raise SkipRow("the answers have no prompt in common that ends in 'Assistant:'")
    return common[:end]


# ---------------------------------------------------------------- conversations


@dataclass
class Messages(Shape):
    """Conversations in one column."""

    name: str = "messages"

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        messages = self.messages(row)
        prompt, answer = without_last_answer(messages)
        if "chosen" not in need:
            return [self.checked(self.with_columns(row, Conversation(prompt)), self.name)]
        while messages and not answer:  # turns behind the last answer teach nothing
            messages = messages[:-1]
            prompt, answer = without_last_answer(messages)
        if not answer:
            raise SkipRow(f"field '{self.name}' holds no answer")
        return [self.checked(self.with_columns(row, Conversation(prompt, (answer,))), self.name)]

    def messages(self, row: Row) -> list[Message]:
        if self.name not in row:
            raise SkipRow(f"field '{self.name}' is missing")
        return self.reader.read(row[self.name], self.name)


# ---------------------------------------------------------------- questions with a context, comparisons, lists


@dataclass
class Instruction(Shape):
    """A question, what it is about (which may be empty), and an answer."""

    question: str = "instruction"
    context: str | None = None
    answer: str | None = None

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        asked = text(row, self.question)
        about = row.get(self.context) if self.context else None
        if isinstance(about, list) and all(isinstance(part, str) for part in about):
            about = "\n".join(about)
        if about not in (None, ""):
            expect(isinstance(about, str), (self.context,), about, "a string")
            if about.strip():
                asked = f"{asked}\n\n{usable(about, repr(self.context))}"
        answers = ()
        if "chosen" in need:
            if self.answer is None:
                raise SkipRow("the dataset has no answers")
            answers = ([assistant(text(row, self.answer))],)
        turns = prompt_format.parse_turns(asked) if self.question == "prompt" and not about else [user(asked)]
        return [self.with_columns(row, Conversation(turns, answers))]


@dataclass
class Comparison(Shape):
    """Two answers and which of them is better.

    Attributes:
        prompt: of a row, as turns.
        pair: (first answer, second answer, above 0 where the second is better, 0 for a tie) of a row.
    """

    prompt: Callable[[Row], list[Message]] = None
    pair: Callable[[Row], tuple[str, str, float]] = None

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        prompt = self.prompt(row)
        if "chosen" not in need:
            return [self.with_columns(row, Conversation(prompt))]
        first, second, preference = self.pair(row)
        if preference == 0:
            raise SkipRow("neither answer is preferred")
        better, worse = (first, second) if preference < 0 else (second, first)
        answers = ([assistant(better)], [assistant(worse)])
        return [self.with_columns(row, Conversation(prompt, answers[: len(need) - 1]))]


def _summaries(row: Row) -> tuple[str, str, float]:
    choice = number(row, "choice")
    if choice not in (0, 1):
        raise SkipRow("field 'choice': expected 0 or 1, found another number")
    return text(row, "summaries", 0, "text"), text(row, "summaries", 1, "text"), 1 if choice == 1 else -1


def _post(row: Row) -> list[Message]:
    """The task of the published comparisons, in words: the post with its title and place, to be summarised."""
    info = row.get("info")
    expect(isinstance(info, Mapping), ("info",), info, "an object")
    lines = [f"{name.upper()}: {info[name]}" for name in ("subreddit", "title") if info.get(name)]
    body = text(row, "info", "post") if info.get("post") else text(row, "info", "article")
    return [user("\n".join(["Summarize this post.", *lines, f"POST: {body}"]))]


def _strength(row: Row) -> tuple[str, str, float]:
    return text(row, "response_1"), text(row, "response_2"), number(row, "preference_strength")


@dataclass
class RankedList(Shape):
    """A prompt with a list of answers: strings or objects, in order or with ranks or scores."""

    prompt: str = "prompt"
    answers: str = "answers"
    order: str | None = None  # a column beside the list with a rank or a score of each

    TEXT_KEYS = ("answer", "response", "text", "content", "generated_text", "output")
    RANKS, SCORES = ("rank", "ranks", "ranking"), ("score", "scores", "overall_score", "rating", "ratings")

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        given = row.get(self.prompt)
        prompt = (
            self.reader.read(given, self.prompt)
            if is_messages(given)
            else prompt_format.parse_turns(text(row, self.prompt))
        )
        if "chosen" not in need:
            return [self.checked(self.with_columns(row, Conversation(prompt)), self.prompt)]
        items = loaded_json(row.get(self.answers), self.answers)
        expect(isinstance(items, list), (self.answers,), items, "a list")
        texts = [self._text(item) for item in items]
        return [ranked(self.with_columns(row, Conversation(prompt)), texts, self._keys(row, items), need, self.answers)]

    def _text(self, item: Any) -> str:
        if isinstance(item, Mapping):
            item = next((item[key] for key in self.TEXT_KEYS if key in item), None)
        expect(isinstance(item, str), (self.answers,), item, "texts")
        return usable(item, f"'{self.answers}'")

    def _keys(self, row: Row, items: list) -> list[float]:
        """What answers are ordered by, the best one lowest."""
        if self.order is not None:
            values = loaded_json(row.get(self.order), self.order)
            expect(isinstance(values, list) and len(values) == len(items), (self.order,), values, "a number per answer")
            signs = -1 if self.order in self.SCORES else 1
            return [signs * number({self.order: value}, self.order) for value in values]
        for names, sign in ((self.RANKS, 1), (self.SCORES, -1)):
            for name in names:
                if all(isinstance(item, Mapping) and item.get(name) is not None for item in items):
                    return [sign * number(item, name) for item in items]
        return list(range(len(items)))  # the best one first


def ranked(
    conversation: Conversation, texts: Sequence[str], keys: Sequence[float], need: Sequence[str], name: str
) -> Conversation:
    """The conversation with its answers, the best one first; those of equal keys share a rank.

    Raises:
        SkipRow: a step that compares finds no two answers of different ranks.
    """
    order = sorted(range(len(texts)), key=lambda i: keys[i])
    if not order:
        raise SkipRow(f"field '{name}' is an empty list")
    if "rejected" not in need:
        return replace(conversation, answers=([assistant(texts[order[0]])],))
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise SkipRow(f"field '{name}' holds no two answers of different ranks")
    answers = tuple([assistant(texts[i])] for i in order)
    ranks = tuple(distinct.index(keys[i]) + 1 for i in order)
    return replace(conversation, answers=answers, ranks=ranks if len(answers) > 2 else ())


@dataclass
class RatedAnswers(Shape):
    """Rows of one answer with its rating; those of one prompt belong together."""

    prompt: str = "prompt"
    answer: str = "response"
    rating: str = "helpfulness"

    def grouped(self, rows: Rows) -> Rows:
        return GroupedRows(rows, lambda row: str(row.get(self.prompt)))

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        rows = row["rows"]
        prompt = prompt_format.parse_turns(text(rows[0], self.prompt))
        conversation = self.with_columns(rows[0], Conversation(prompt))
        if "chosen" not in need:
            return [conversation]
        texts, keys = [text(one, self.answer) for one in rows], [-number(one, self.rating) for one in rows]
        return [ranked(conversation, texts, keys, need, self.rating)]


class GroupedRows(Rows):
    """Rows put together by a key, in the order in which the keys first come: {"rows": [...]} each."""

    def __init__(self, rows: Rows, key: Callable[[Row], str]):
        self.rows, self.key, self.column_names = rows, key, rows.column_names
        self._groups: list[list[int]] | None = None

    def _made(self) -> list[list[int]]:
        if self._groups is None:
            groups: dict[str, list[int]] = {}
            for position in range(len(self.rows)):
                groups.setdefault(self.key(self.rows[position]), []).append(position)
            self._groups = list(groups.values())
        return self._groups

    def __len__(self) -> int:
        return len(self._made())

    def _row(self, position: int) -> dict[str, Any]:
        return {"rows": [self.rows[i] for i in self._made()[position]]}

    def where(self, index: int) -> str:
        return self.rows.where(self._made()[int(index)][0])


# ---------------------------------------------------------------- trees


@dataclass
class Trees(Shape):
    """Conversations that branch (OpenAssistant): the best path to learn, ranked siblings to compare."""

    flat: bool = False  # rows are the messages of trees; else whole trees

    def grouped(self, rows: Rows) -> Rows:
        return GroupedRows(rows, root_finder(rows)) if self.flat else rows

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        root = tree_of(row["rows"]) if self.flat else row.get("prompt")
        expect(isinstance(root, Mapping), ("prompt",), root, "a tree of messages")
        if "rejected" in need:
            found = list(_comparisons(root, []))
            if not found:
                raise SkipRow("the tree holds no two ranked answers to one message")
            return found
        path = best_path(root)
        prompt, answer = without_last_answer(path)
        if "chosen" in need and not answer:
            raise SkipRow("the tree holds no answer")
        return [self.checked(Conversation(prompt, (answer,) if "chosen" in need else ()), "replies")]


def _turn(node: Mapping) -> Message:
    role = {"prompter": "user", "assistant": "assistant"}.get(node.get("role"))
    if role is None:
        raise SkipRow("field 'role': expected prompter or assistant, found another or none")
    return {"role": role, "content": text(node, "text")}


def _replies(node: Mapping) -> list[Mapping]:
    """Replies that were not deleted, the best one first; those without a rank come last."""
    replies = node.get("replies") or []
    expect(isinstance(replies, list), ("replies",), replies, "a list")
    there = [reply for reply in replies if isinstance(reply, Mapping) and not reply.get("deleted")]
    return sorted(there, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def best_path(root: Mapping) -> list[Message]:
    path, node = [_turn(root)], root
    while replies := _replies(node):
        node = replies[0]
        path.append(_turn(node))
    while len(path) > 1 and path[-1]["role"] == "user":
        path.pop()
    return path


def _comparisons(node: Mapping, before: list[Message]):
    """A conversation with ranked answers for each message that has two or more of them."""
    here, replies = [*before, _turn(node)], _replies(node)
    rated = [reply for reply in replies if reply.get("rank") is not None]
    if here[-1]["role"] == "user" and len({reply["rank"] for reply in rated}) > 1:
        texts, keys = [text(reply, "text") for reply in rated], [number(reply, "rank") for reply in rated]
        yield ranked(Conversation(here), texts, keys, ("prompt", "chosen", "rejected"), "replies")
    for reply in replies:
        yield from _comparisons(reply, here)


def root_finder(rows: Rows) -> Callable[[Row], str]:
    """A function that names the tree of a message: by its own column, or by following the parents."""
    if "message_tree_id" in rows.column_names:
        return lambda row: str(row.get("message_tree_id"))
    parents = {row.get("message_id"): row.get("parent_id") for row in (rows[i] for i in range(len(rows)))}

    def root(row: Row) -> str:
        node, seen = row.get("message_id"), set()
        while parents.get(node) is not None and node not in seen:
            seen.add(node)
            node = parents[node]
        return str(node)

    return root


def tree_of(messages: Sequence[Row]) -> dict:
    """The messages of one tree, put below their parents."""
    nodes = {message.get("message_id"): {**message, "replies": []} for message in messages}
    root = None
    for node in nodes.values():
        parent = nodes.get(node.get("parent_id"))
        if parent is not None and parent is not node:
            parent["replies"].append(node)
        elif node.get("parent_id") is None:
            root = node
    if root is None:
        raise SkipRow("the tree has no first message")
    return root


# ---------------------------------------------------------------- the table


def _named_columns(found: Found) -> Shape | None:
    """Columns that the user names: texts stand as they are."""
    columns = found.columns
    if "messages" in columns:
        return Messages(
            "conversations as messages",
            [columns["messages"]],
            True,
            False,
            found.system(),
            found.tools(),
            name=columns["messages"],
        )
    if not {"prompt", "chosen", "rejected"} & set(columns):
        return None
    prompt, chosen, rejected = (columns.get(role, role) for role in ("prompt", "chosen", "rejected"))
    return _roles(found, prompt, chosen, rejected)


def _roles(
    found: Found, prompt: str, chosen: str, rejected: str, question: bool = False, label: str | None = None
) -> Shape | None:
    """Named columns of a prompt, and of answers where they are there."""
    if not found.has(prompt):
        return None
    chosen, rejected = (name if found.has(name) else None for name in (chosen, rejected))
    as_messages = [found.holds_messages(name) for name in (prompt, chosen, rejected) if name]
    form = "as messages" if all(as_messages) else "as texts and messages" if any(as_messages) else "as texts"
    kind = "preference pairs" if chosen and rejected else "prompts and answers" if chosen else "prompts"
    explicit = ", prompt explicit" if any(as_messages) and chosen else ""
    if any(as_messages) and chosen and not found.holds_messages(prompt) and _repeats(found, chosen):
        explicit = ", which begin with the prompt"
    if label:
        kind = "unpaired feedback (answers that were liked are used)"
    return NamedRoles(
        f"{kind} {form}{explicit}" + (", written as questions" if question and not any(as_messages) else ""),
        [prompt, chosen, rejected, label],
        chosen is not None,
        chosen is not None and rejected is not None and label is None,
        found.system(),
        found.tools(),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        label=label,
        question=question,
    )


def _repeats(found: Found, chosen: str) -> bool:
    try:
        return MessageReader().read(found.first(chosen), chosen)[0]["role"] != "assistant"
    except SkipRow:
        return False


def _trees(found: Found) -> Shape | None:
    root = found.first("prompt") if found.has("prompt") else None
    if isinstance(root, Mapping) and {"text", "replies"} <= root.keys():
        return Trees("trees of messages: best path, ranked siblings", ["prompt"], True, True)
    flat = ["message_id", "parent_id", "text", "role"]
    if not found.has(*flat):
        return None
    more = [name for name in ("message_tree_id", "rank", "deleted") if found.has(name)]
    return Trees("messages of trees: best path, ranked siblings", flat + more, True, True, flat=True)


def _summarize(found: Found) -> Shape | None:
    if not found.has("info", "summaries", "choice"):
        return None
    return Comparison(
        "comparisons of two summaries", ["info", "summaries", "choice"], True, True, prompt=_post, pair=_summaries
    )


def _preference_strength(found: Found) -> Shape | None:
    columns = ["prompt", "response_1", "response_2", "preference_strength"]
    if not found.has(*columns):
        return None
    return Comparison(
        "comparisons of two responses",
        columns,
        True,
        True,
        found.system(),
        prompt=lambda row: prompt_format.parse_turns(text(row, "prompt")),
        pair=_strength,
    )


def _ranked_list(found: Found) -> Shape | None:
    prompt = found.columns.get("prompt") or found.one_of(("prompt", *QUESTION_COLUMNS))
    answers = next(
        (name for name in LIST_COLUMNS if isinstance(found.first(name), list) and not found.holds_messages(name)), None
    )
    if prompt is None or answers is None or found.has("chosen"):
        return None
    order = found.one_of(("ranks", "ranking", "scores", "ratings"))
    return RankedList(
        "ranked lists of answers",
        [prompt, answers, order],
        True,
        True,
        found.system(),
        prompt=prompt,
        answers=answers,
        order=order,
    )


def _pairs(found: Found) -> Shape | None:
    if not found.has("chosen"):
        return None
    if found.has("prompt"):
        return _roles(found, "prompt", "chosen", "rejected")
    question = next((name for name in QUESTION_COLUMNS if found.holds_text(name)), None)
    if question:
        return _roles(found, question, "chosen", "rejected", question=True)
    if not found.has("rejected"):
        return None
    if found.holds_messages("chosen"):
        return ImplicitPrompt(
            "preference pairs as messages, prompt implicit",
            ["chosen", "rejected"],
            True,
            True,
            found.system(),
            found.tools(),
        )
    if found.holds_text("chosen"):
        return ImplicitPrompt(
            "preference pairs as transcripts, prompt implicit", ["chosen", "rejected"], True, True, found.system()
        )
    return None


def _rated(found: Found) -> Shape | None:
    columns = ["prompt", "response", "helpfulness"]
    if not found.has(*columns):
        return None
    return RatedAnswers("rated responses, grouped by prompt", columns, True, True, found.system())


def _messages(found: Found) -> Shape | None:
    name = next((name for name in MESSAGES_COLUMNS if found.has(name)), None)
    if name is None:
        return None
    first = found.first(name)
    turn = first[0] if isinstance(first, list) and first and isinstance(first[0], Mapping) else {}
    form = "ShareGPT" if "from" in turn else "pairs of human and assistant" if "human" in turn else "messages"
    return Messages(f"conversations as {form}", [name], True, False, found.system(), found.tools(), name=name)


def _prompt_completion(found: Found) -> Shape | None:
    if not found.has("prompt", "completion"):
        return None
    return _roles(found, "prompt", "completion", "", label="label" if isinstance(found.first("label"), bool) else None)


def _question_answer(found: Found) -> Shape | None:
    question = next((name for name in QUESTION_COLUMNS if found.holds_text(name)), None)
    answer = next((name for name in ANSWER_COLUMNS if found.holds_text(name)), None)
    if question is None or (question == "prompt" and answer is None):
        return None
    context = next((name for name in CONTEXT_COLUMNS if found.has(name)), None)
    parts = [question, *([context] if context else []), *([answer] if answer else [])]
    return Instruction(
        "questions" + (f" with {context}" if context else "") + (" and answers" if answer else ""),
        parts,
        answer is not None,
        False,
        found.system(),
        question=question,
        context=context,
        answer=answer,
    )


def _prompts(found: Found) -> Shape | None:
    return _roles(found, "prompt", "", "") if found.has("prompt") else None


def _lines(found: Found) -> Shape | None:
    if not found.plain_text:
        return None
    return Instruction("lines of text, a prompt each", ["text"], question="text")


SHAPES: dict[str, Callable[[Found], Shape | None]] = {
    "columns": _named_columns,
    "trees": _trees,
    "summaries": _summarize,
    "preference_strength": _preference_strength,
    "ranked": _ranked_list,
    "pairs": _pairs,
    "rated": _rated,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "prompts": _prompts,
    "lines": _lines,
}


def recognise(rows: Rows, columns: Mapping[str, str] | None = None, name: str | None = None) -> Shape | None:
    """The shape of a dataset, or None where none fits.

    Args:
        rows: of its train split.
        columns: own column names by role.
        name: of SHAPES, to try this one alone.
    """
    found = Found(rows, columns)
    tried = SHAPES.values() if name is None else [SHAPES[name]]
    return next((shape for shape in (bind(found) for bind in tried) if shape is not None), None)
