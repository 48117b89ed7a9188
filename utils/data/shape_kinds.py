"""The kinds of shapes: how a row becomes examples, once shapes.py has found which columns hold what.

NamedRoles     a prompt with a chosen and perhaps a rejected answer, each a text or a list of messages
ImplicitPrompt two whole conversations that begin alike
Messages       one conversation
Instruction    a question, perhaps with a context, and its answer
Comparison     two answers and which is better
RankedList     a list of answers
RatedAnswers   rows of one rated answer each
Trees          conversations that branch
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from utils.data import prompt_format
from utils.data.conversation import (
    Conversation,
    Message,
    MessageReader,
    Texts,
    assistant,
    check_order,
    is_messages,
    loaded_json,
    read_tools,
    system,
    user,
    without_last_answer,
)
from utils.data.row_texts import Row, SkipRow, common_start, expect, number, text, usable
from utils.data.rows import ListRows, Rows

Example = Texts | Conversation
ASKING = ("user", "tool")  # roles of the turn before an answer


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
        self.columns = list(dict.fromkeys(name for name in [*self.columns, self.system, self.tools] if name))

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

    @property
    def speaks(self) -> bool:
        """Whether columns beside the texts make conversations of them, so that no row stands as it is."""
        return self.system is not None or self.tools is not None

    def turns(self, row: Row, name: str) -> list[Message]:
        """The turns of a prompt, which is messages, or a text with or without marks."""
        given = row.get(name)
        return self.reader.read(given, name) if is_messages(given) else prompt_turns(text(row, name))

    def finished(self, row: Row, conversation: Conversation, name: str) -> Conversation:
        """The conversation with the row's own columns of a system prompt and of tools.

        Raises:
            SkipRow: it does not ask, answer and ask in turns.
        """
        conversation = self._with_columns(row, conversation)
        prompt, answers = conversation.prompt, conversation.answers
        for answer in answers or ((),):
            check_order([*prompt, *answer], name)
        if prompt[-1]["role"] not in ASKING:
            raise SkipRow(f"field '{name}': the prompt ends in a turn of the role {prompt[-1]['role']}")
        if any(not answer or answer[-1]["role"] != "assistant" for answer in answers):
            raise SkipRow(f"field '{name}': an answer ends in a turn that is not the assistant's")
        return conversation

    def _with_columns(self, row: Row, conversation: Conversation) -> Conversation:
        prompt = conversation.prompt
        given = row.get(self.system) if self.system else None
        expect(given is None or isinstance(given, str), (self.system,), given, "a string")
        if given and given.strip():
            usable(given, f"'{self.system}'")
            if prompt and prompt[0]["role"] in ("system", "developer"):
                if prompt[0]["content"].strip() != given.strip():
                    raise SkipRow(f"field '{self.system}' and the first turn are two system prompts")
            else:
                prompt = [system(given), *prompt]
        tools = read_tools(row.get(self.tools), self.tools) if self.tools else None
        return replace(conversation, prompt=prompt, tools=tools)


# How some datasets set the turns of a prompt apart.
_EXTRA_ID_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def prompt_turns(written: str) -> list[Message]:
    """Turns of a prompt text: those that its marks name; of a text without marks, one question."""
    if "<extra_id_1>" in written:
        first, *rest = _EXTRA_ID_MARK.split(written)
        if rest and first.strip():
            makers = {"User": user, "Assistant": assistant}
            pairs = zip(rest[::2], rest[1::2], strict=True)
            return [user(first.strip()), *(makers[who](said.strip()) for who, said in pairs)]
    return prompt_format.parse_turns(written)


def answered(row: Row, *path: str | int) -> list[Message]:
    """The turns of an answer that is a text: one, without the blanks around it."""
    return [assistant(text(row, *path).strip())]


class Group(dict):
    """Rows that belong together: the columns of the first, and all of them in ``rows``."""

    def __init__(self, rows: list[Row]):
        super().__init__(rows[0])
        self.rows = rows


class GroupedRows(Rows):
    """Rows put together by a key, in the order in which the keys first come: a Group each.

    Args:
        find_key: rows -> the function that gives the key of any of them; called on first use, as it may read them all.
    """

    def __init__(self, rows: Rows, find_key: Callable[[Rows], Callable[[Row], str]]):
        self.rows, self.find_key, self.column_names = rows, find_key, rows.column_names
        self._groups: list[list[int]] | None = None

    def _first_rows(self, count: int) -> list[Group]:
        """Groups of the first rows alone: they may lack members that come later."""
        return list(GroupedRows(ListRows(self.rows.head(count), ""), self.find_key))

    def _made(self) -> list[list[int]]:
        if self._groups is None:
            groups: dict[int, list[int]] = {}
            key = self.find_key(self.rows)
            for position in range(len(self.rows)):
                # The hash, since the keys are whole prompts.
                groups.setdefault(hash(key(self.rows[position])), []).append(position)
            self._groups = list(groups.values())
        return self._groups

    def __len__(self) -> int:
        return len(self._made())

    def _row(self, position: int) -> Group:
        return Group([self.rows[i] for i in self._made()[position]])

    def where(self, index: int) -> str:
        return self.rows.where(self._made()[int(index)][0])


def rows_of_group(row: Row) -> list[Row]:
    return row.rows if isinstance(row, Group) else [row]


# ---------------------------------------------------------------- prompt, chosen, rejected


@dataclass
class NamedRoles(Shape):
    """A prompt and one or two answers, each a text or a list of messages.

    Attributes:
        label: of unpaired feedback: whether the answer was liked.
        conversation: texts, too, are turns that the prompt format writes; else they stand as they are.
        context, history: columns of what a question is about, and of turns before it.
    """

    prompt: str = "prompt"
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    conversation: bool = False
    context: str | None = None
    history: str | None = None

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        names = [name for role, name in (("chosen", self.chosen), ("rejected", self.rejected)) if role in need]
        if self.label and "chosen" in need and not is_true(row, self.label):
            raise SkipRow(f"field '{self.label}' is not true: the answer was not liked")
        if None in names:
            raise SkipRow("the dataset has no such answer")
        # All columns decide, so that the steps write a row alike whatever of it they need.
        columns = [name for name in (self.prompt, self.chosen, self.rejected) if name]
        if self.conversation or any(is_messages(row.get(name)) for name in columns):
            return [self._conversation(row, names)]
        prompt = text(row, self.prompt)
        answers = tuple(text(row, name) for name in names)
        return [Texts(prompt, tuple(prompt + answer for answer in answers), answers)]

    def _conversation(self, row: Row, names: Sequence[str]) -> Conversation:
        answers = {name: self._answer(row, name) for name in names}
        for name in (self.chosen, self.rejected):
            if name is not None and name not in answers and is_messages(row.get(name)):
                answers |= self._readable(row, name)
        wholes = {name: turns for name, turns in answers.items() if turns[0]["role"] != "assistant"}
        if wholes:  # the answers repeat the prompt
            prompt = common_turns(list(wholes.values()))
            self._check_repeated(row, prompt)
        elif is_messages(row.get(self.prompt)):
            prompt = self.reader.read(row[self.prompt], self.prompt)
        else:
            prompt = asked(row, self.prompt, self.context, self.history)
        kept = tuple(answers[name][len(prompt) if name in wholes else 0 :] for name in names)
        return self.finished(row, Conversation(prompt, kept), self.prompt)

    def _answer(self, row: Row, name: str) -> list[Message]:
        return self.reader.read(row[name], name) if is_messages(row.get(name)) else answered(row, name)

    def _readable(self, row: Row, name: str) -> dict[str, list[Message]]:
        """An answer that a step does not need, for the prompt in it; empty where it cannot be read."""
        try:
            return {name: self.reader.read(row[name], name)}
        except SkipRow:
            return {}

    def _check_repeated(self, row: Row, prompt: list[Message]) -> None:
        """SkipRow where a prompt is given as messages and the answers begin with others. A text counts as not used
        where it neither is one of their turns nor holds the question."""
        given = row.get(self.prompt)
        if not is_messages(given):
            turns = [turn["content"].strip() for turn in prompt]
            if isinstance(given, str) and given.strip() not in ("", *turns) and turns[-1] not in given:
                self.reader.unused[f"{self.prompt}, which is not what the answers begin with"] += 1
            return
        given, there = (
            [(turn["role"], turn["content"].strip()) for turn in turns]
            for turns in (self.reader.read(row[self.prompt], self.prompt), prompt)
        )
        if there[0][0] != "user" and given[0][0] == "user":
            there = there[1:]  # a system turn that the answers alone have
        if given[: len(there)] != there[: len(given)]:
            raise SkipRow(f"field '{self.prompt}' is not what the answers begin with")


def is_true(row: Row, name: str) -> bool:
    """Whether a field is true, 1, or text of a CSV file that says so."""
    value = row.get(name)
    return value in (True, 1) or (isinstance(value, str) and value.lower() in ("true", "1"))


def asked(row: Row, question: str, context: str | None, history: str | None = None) -> list[Message]:
    """The turns that ask a question: what was said before, and the question with what it is about behind it."""
    asks, about = text(row, question), row.get(context) if context else None
    if isinstance(about, list) and all(isinstance(part, str) for part in about):
        about = "\n".join(about)
    expect(about is None or isinstance(about, str), (context,), about, "a string")
    if about and about.strip():
        turns = [user(f"{asks.strip()}\n\n{usable(about, repr(context)).strip()}")]
    else:
        turns = prompt_turns(asks)
    return [*_history(row, history), *turns]


def _history(row: Row, name: str | None) -> list[Message]:
    """The turns of [[question, answer], ...]."""
    pairs = loaded_json(row.get(name), name) if name else None
    if pairs in (None, ""):
        return []
    expect(isinstance(pairs, list), (name,), pairs, "a list")
    turns = []
    for pair in pairs:
        expect(isinstance(pair, list) and len(pair) == 2, (name,), pair, "pairs of question and answer")
        turns += [user(text({name: pair[0]}, name)), assistant(text({name: pair[1]}, name))]
    return turns


def common_turns(wholes: Sequence[list[Message]]) -> list[Message]:
    """The turns with which all begin, up to the last turn before an answer."""
    first, count = wholes[0], 0
    shortest = min(len(without_last_answer(whole)[0]) for whole in wholes)
    while count < shortest and all(whole[count] == first[count] for whole in wholes):
        count += 1
    prompt, _ = without_last_answer(first[:count])
    if not prompt or prompt[-1]["role"] not in ASKING:
        raise SkipRow("the answers have no prompt in common")
    return prompt


@dataclass
class NestedPreferences(NamedRoles):
    """Preferences as files for OpenAI's preference tuning hold them: the prompt's messages and tools in one field."""

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        given = row.get(self.prompt)
        expect(isinstance(given, Mapping), (self.prompt,), given, "an object")
        self.reader.note_unused(given, ("messages", "tools"), self.prompt)
        return super().examples({**row, self.prompt: given.get("messages"), self.tools: given.get("tools")}, need)


@dataclass
class ImplicitPrompt(Shape):
    """Two whole conversations whose common beginning is the prompt: lists of messages, or transcripts."""

    chosen: str = "chosen"
    rejected: str = "rejected"

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        if is_messages(row.get(self.chosen)):
            wholes = [self.reader.read(row.get(name), name) for name in (self.chosen, self.rejected)]
            prompt = common_turns(wholes)
            answers = tuple(whole[len(prompt) :] for whole in wholes)[: len(need) - 1]
            return [self.finished(row, Conversation(prompt, answers), self.chosen)]
        chosen, rejected = text(row, self.chosen), text(row, self.rejected)
        prompt = transcript_prompt(chosen, rejected)
        wholes = (chosen, rejected)[: len(need) - 1]
        names = (self.chosen, self.rejected)
        answers = tuple(
            usable(whole[len(prompt) :], f"'{name}' after its prompt")
            for whole, name in zip(wholes, names, strict=False)
        )
        texts = Texts(prompt, wholes, answers, is_transcript=True)
        return [self.finished(row, texts.as_conversation(), self.chosen) if self.speaks else texts]


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
            return [self.finished(row, Conversation(prompt), self.name)]
        turns = len(messages)
        while messages and not answer:  # turns behind the last answer teach nothing
            messages = messages[:-1]
            prompt, answer = without_last_answer(messages)
        if not answer:
            raise SkipRow(f"field '{self.name}' holds no answer")
        self.reader.note_behind(turns - len(messages))
        return [self.finished(row, Conversation(prompt, (answer,)), self.name)]

    def messages(self, row: Row) -> list[Message]:
        if self.name not in row:
            raise SkipRow(f"field '{self.name}' is missing")
        return self.reader.read(row[self.name], self.name)


@dataclass
class Instruction(Shape):
    """A question, what it is about (which may be empty), and an answer."""

    question: str = "instruction"
    context: str | None = None
    answer: str | None = None
    history: str | None = None

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        answers = ()
        if "chosen" in need:
            if self.answer is None:
                raise SkipRow("the dataset has no answers")
            answers = (answered(row, self.answer),)
        turns = asked(row, self.question, self.context, self.history)
        return [self.finished(row, Conversation(turns, answers), self.question)]


# ---------------------------------------------------------------- comparisons


class TwoAnswers(NamedTuple):
    first: list[Message]
    second: list[Message]
    preference: float  # above 0 where the second is better, 0 for a tie


@dataclass
class Comparison(Shape):
    """Two answers and which of them is better.

    Attributes:
        asks: the prompt of a row.
        pair: its answers.
    """

    asks: Callable[[Row], list[Message]] | None = None  # None: the column ``prompt``
    pair: Callable[[Row], TwoAnswers] | None = None
    prompt: str = "prompt"

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        prompt = self.asks(row) if self.asks else self.turns(row, self.prompt)
        answers = ()
        if "chosen" in need:
            first, second, preference = self.pair(row)
            if preference == 0:
                raise SkipRow("neither answer is preferred")
            answers = ((first, second) if preference < 0 else (second, first))[: len(need) - 1]
        return [self.finished(row, Conversation(prompt, answers), self.prompt)]


@dataclass
class RankedList(Shape):
    """A prompt with a list of answers: strings or objects, in order or with ranks or scores."""

    prompt: str = "prompt"
    answers: str = "answers"
    order: str | None = None  # a column beside the list with a rank or a score of each

    TEXT_KEYS = ("answer", "response", "text", "content", "generated_text", "output")
    RANKS = ("rank", "ranks", "ranking")
    SCORES = (
        *("score", "scores", "overall_score", "rating", "ratings"),
        *("reward", "rewards", "rm_scores", "all_rm_scores", "pm_score"),
    )

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        conversation = Conversation(self.turns(row, self.prompt))
        if "chosen" in need:
            items = loaded_json(row.get(self.answers), self.answers)
            expect(isinstance(items, list), (self.answers,), items, "a list")
            answers = [self._answer(item) for item in items]
            conversation = ranked(conversation, answers, self._keys(row, items), need, self.answers)
        return [self.finished(row, conversation, self.prompt)]

    def _answer(self, item: Any) -> list[Message]:
        if isinstance(item, list) and is_messages(item):
            return self.reader.read(item, self.answers)
        if isinstance(item, Mapping):
            key = next((key for key in self.TEXT_KEYS if item.get(key) is not None), None)
            if key is None:
                raise SkipRow(f"field '{self.answers}' holds objects without any of {', '.join(self.TEXT_KEYS)}")
            self.reader.note_unused(item, (key, self._key_of([item])[0]), f"{self.answers}[]")
            item = item.get(key)
        return answered({self.answers: item}, self.answers)

    def _keys(self, row: Row, items: list) -> list[float]:
        """What answers are ordered by, the best one lowest."""
        if self.order is not None:
            values = loaded_json(row.get(self.order), self.order)
            expect(isinstance(values, list) and len(values) == len(items), (self.order,), values, "a number per answer")
            sign = -1 if self.order in self.SCORES else 1
            return [sign * number({self.order: value}, self.order) for value in values]
        if all(isinstance(item, str) for item in items):
            return list(range(len(items)))  # the best one first
        name, sign = self._key_of(items)
        if name is None:
            raise SkipRow(f"field '{self.answers}' holds objects without a rank or a score")
        expect(all(isinstance(item, Mapping) for item in items), (self.answers,), items, "objects")
        return [sign * number(item, name) for item in items]

    def _key_of(self, items: list) -> tuple[str | None, int]:
        """The field of ranks or scores in objects, and the sign with which it puts the best one lowest."""
        objects = [item for item in items if isinstance(item, Mapping)]
        there = {name for item in objects for name, value in item.items() if value is not None}
        signs = dict.fromkeys(self.RANKS, 1) | dict.fromkeys(self.SCORES, -1)
        return next(((name, sign) for name, sign in signs.items() if name in there), (None, 1))


def ranked(
    conversation: Conversation, answers: Sequence[list[Message]], keys: Sequence[float], need: Sequence[str], name: str
) -> Conversation:
    """The conversation with its answers, the best one (of the lowest key) first; those of equal keys share a rank.

    Raises:
        SkipRow: a step that compares finds no two answers of different ranks.
    """
    order = sorted(range(len(answers)), key=lambda i: keys[i])
    if not order:
        raise SkipRow(f"field '{name}' is an empty list")
    if "rejected" not in need:
        return replace(conversation, answers=(answers[order[0]],))
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise SkipRow(f"field '{name}' holds no two answers of different ranks")
    ranks = tuple(distinct.index(keys[i]) + 1 for i in order)
    return replace(conversation, answers=tuple(answers[i] for i in order), ranks=ranks if len(answers) > 2 else ())


@dataclass
class RatedAnswers(Shape):
    """Rows of one answer with its rating; those of one prompt belong together."""

    prompt: str = "prompt"
    answer: str = "response"
    rating: str = "helpfulness"

    def grouped(self, rows: Rows) -> Rows:
        names = [name for name in (self.system, self.prompt) if name]
        return GroupedRows(rows, lambda _: lambda row: json.dumps([row.get(name) for name in names], default=str))

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        rows = rows_of_group(row)
        conversation = Conversation(self.turns(rows[0], self.prompt))
        if "chosen" in need:
            answers, keys = [answered(one, self.answer) for one in rows], [-number(one, self.rating) for one in rows]
            conversation = ranked(conversation, answers, keys, need, self.rating)
        return [self.finished(rows[0], conversation, self.prompt)]


# ---------------------------------------------------------------- trees

TREE_KEYS = ("role", "text", "rank", "replies", "deleted", "message_id", "parent_id", "message_tree_id")


@dataclass
class Trees(Shape):
    """Conversations that branch (OpenAssistant): the best path to learn, ranked siblings to compare."""

    flat: bool = False  # rows are the messages of trees; else whole trees

    def grouped(self, rows: Rows) -> Rows:
        return GroupedRows(rows, root_finder) if self.flat else rows

    def examples(self, row: Row, need: Sequence[str]) -> list[Example]:
        root = self._tree_of(rows_of_group(row)) if self.flat else row.get("prompt")
        expect(isinstance(root, Mapping), ("prompt",), root, "a tree of messages")
        if is_true(root, "deleted"):
            raise SkipRow("the tree's first message was deleted")
        if "rejected" in need:
            found = self._comparisons(root)
            if not found:
                raise SkipRow("the tree holds no two ranked answers to one message")
            return found
        path = self._best_path(root)
        prompt, answer = without_last_answer(path)
        if "chosen" in need and not answer:
            raise SkipRow("the tree holds no answer")
        return [self.finished(row, Conversation(prompt, (answer,) if "chosen" in need else ()), "replies")]

    def _turn(self, node: Mapping) -> Message:
        role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
        if role is None:
            raise SkipRow("field 'role': expected prompter or assistant, found another or none")
        if not self.flat:  # of flat ones they are columns
            self.reader.note_unused(node, TREE_KEYS, "prompt[]")
        return {"role": role, "content": text(node, "text")}

    def _best_path(self, root: Mapping) -> list[Message]:
        path, node = [self._turn(root)], root
        while replies := _replies(node):
            node = replies[0]
            path.append(self._turn(node))
        turns = len(path)
        while len(path) > 1 and path[-1]["role"] == "user":
            path.pop()
        self.reader.note_behind(turns - len(path))
        return path

    def _comparisons(self, root: Mapping) -> list[Conversation]:
        """A conversation with ranked answers for each message that has two or more of them."""
        found, waiting = [], [(root, [])]
        while waiting:
            node, before = waiting.pop()
            here, replies = [*before, self._turn(node)], _replies(node)
            rated = [reply for reply in replies if reply.get("role") == "assistant" and _rank(reply) is not None]
            if here[-1]["role"] == "user" and len({_rank(reply) for reply in rated}) > 1:
                answers = [[assistant(text(reply, "text"))] for reply in rated]
                keys = [_rank(reply) for reply in rated]
                example = ranked(Conversation(here), answers, keys, ("prompt", "chosen", "rejected"), "replies")
                found.append(self.finished({}, example, "replies"))
            waiting += [(reply, here) for reply in reversed(replies)]
        return found

    def _tree_of(self, messages: Sequence[Row]) -> dict:
        """The messages of one tree, put below their parents."""
        nodes = {_id(message, "message_id"): {**message, "replies": []} for message in messages}
        if repeated := len(messages) - len(nodes):
            self.reader.unused["messages whose message_id comes again later"] += repeated
        roots = []
        for name, node in nodes.items():
            parent = _id(node, "parent_id")
            if parent is None:
                roots.append(node)
            elif parent in nodes and parent != name:
                nodes[parent]["replies"].append(node)
            else:
                self.reader.unused["messages whose parent is not there"] += 1
        if len(roots) != 1:
            raise SkipRow(f"the tree has {'several first messages' if roots else 'no first message'}")
        return roots[0]


def _id(message: Mapping, name: str) -> str | None:
    """An id in a field; None for none, as of the parent of a first message, which CSV files write as an empty text."""
    return None if message.get(name) in (None, "") else str(message[name])


def _rank(node: Mapping) -> float | None:
    """The rank of a reply; None for none, which some files write as NaN."""
    return None if str(node.get("rank")).lower() in ("none", "", "nan") else number(node, "rank")


def _replies(node: Mapping) -> list[Mapping]:
    """Replies that were not deleted, the best one first; those without a rank come last."""
    replies = node.get("replies") or []
    expect(isinstance(replies, list), ("replies",), replies, "a list")
    there = [reply for reply in replies if isinstance(reply, Mapping) and not is_true(reply, "deleted")]
    return sorted(there, key=lambda reply: (_rank(reply) is None, _rank(reply) or 0))


def root_finder(rows: Rows) -> Callable[[Row], str]:
    """A function that names the tree of a message: by its own column, or by following the parents."""
    if "message_tree_id" in rows.column_names:
        return lambda row: str(row.get("message_tree_id"))
    parents = {_id(row, "message_id"): _id(row, "parent_id") for row in (rows[i] for i in range(len(rows)))}

    def root(row: Row) -> str:
        node, seen = _id(row, "message_id"), set()
        while parents.get(node) is not None and node not in seen:
            seen.add(node)
            node = parents[node]
        return str(node)

    return root
