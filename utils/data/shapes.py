"""The shapes in which people publish chat data, and how each is recognised: the one table of them.

A dataset without a class of its own (raw_datasets.py) is recognised by its columns and by what its first rows hold
there. The rows of SHAPES are tried from the top; the first that fits reads the dataset. To add a shape, write a
function that takes ``Found`` and gives a ``Shape`` (shape_kinds.py) or None, and enter it where it belongs.

A shape gives examples (conversation.py): texts that stand as they are, where a file names them prompt and chosen as the
published datasets do, or messages, which the run's prompt format writes. Columns of other contents than the shape's
are no such shape: better refused than learned as what they are not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.data.conversation import Message, MessageReader, is_messages, loaded_json, user
from utils.data.readers import TextFile
from utils.data.row_texts import Row, SkipRow, expect, number, text
from utils.data.rows import EMPTY, ConcatRows, Rows
from utils.data.shape_kinds import (
    Comparison,
    ImplicitPrompt,
    Instruction,
    Messages,
    NamedRoles,
    NestedPreferences,
    RankedList,
    RatedAnswers,
    Shape,
    Trees,
    TwoAnswers,
    answered,
)

HEAD_ROWS = 50  # looked at to see what a column holds
MESSAGES_COLUMNS = ("messages", "conversation", "conversations")
SYSTEM_COLUMNS = ("system", "system_prompt")
QUESTION_COLUMNS = ("question", "query", "instruction", "problem", "prompt", "input")
ANSWER_COLUMNS = ("solution", "answer", "response", "output", "completion")
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

    def values(self, name: str) -> list[Any]:
        """What a column holds that is neither null nor empty, nor JSON of an empty list or object."""
        values = (row.get(name) for row in self.head if isinstance(row, Mapping))
        return [value for value in values if value not in EMPTY and loaded_json_or_none(value) not in ([], {})]

    def first(self, name: str) -> Any:
        """The first value of a column that is neither null nor empty; None if there is none."""
        return next(iter(self.values(name)), None)

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)

    def one_of(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.names), None)

    def holds_messages(self, name: str | None) -> bool:
        return name is not None and is_messages(self.first(name))

    def holds_text(self, name: str | None) -> bool:
        return name is not None and isinstance(self.first(name), str) and not self.holds_messages(name)

    def holds_list(self, name: str) -> bool:
        return isinstance(loaded_json_or_none(self.first(name)), list)

    def text_of(self, names: Sequence[str]) -> str | None:
        """The first of some columns that holds texts."""
        return next((name for name in names if self.holds_text(name)), None)

    def system(self) -> str | None:
        """The column of system prompts, if there is one: that of the flags, or one that holds texts or nothing yet."""
        there = (name for name in SYSTEM_COLUMNS if self.has(name))
        texts = (name for name in there if self.first(name) is None or self.holds_text(name))
        return self.columns.get("system") or next(texts, None)

    def tools(self) -> str | None:
        """The column of tools, likewise: one that holds a list of objects, or JSON that spells one, or nothing yet."""
        if self.columns.get("tools") or not self.has("tools"):
            return self.columns.get("tools")
        try:
            first = loaded_json(self.first("tools"), "tools")
        except SkipRow:
            return None
        holds_tools = not first or (isinstance(first, list) and isinstance(first[0], Mapping))
        return "tools" if holds_tools else None

    def asking(self, question: str) -> dict[str, str | None]:
        """The columns of what a question is about, and of turns before it."""
        context = next((name for name in CONTEXT_COLUMNS if self.has(name) and name != question), None)
        history = loaded_json_or_none(self.first("history")) if self.has("history") else None
        holds_pairs = isinstance(history, list) and any(isinstance(pair, list) for pair in history)
        return {"context": context, "history": "history" if holds_pairs else None}


def loaded_json_or_none(value: Any) -> Any:
    try:
        return loaded_json(value, "")
    except SkipRow:
        return None


# ---------------------------------------------------------------- the columns that a user names


def _named_columns(found: Found) -> Shape | None:
    """Columns that the user names: texts stand as they are."""
    columns = found.columns
    if "messages" in columns:
        return _conversations(found, columns["messages"])
    if not {"prompt", "chosen", "rejected"} & set(columns):
        return None
    prompt, chosen, rejected = (columns.get(role, role) for role in ("prompt", "chosen", "rejected"))
    return _roles(found, prompt, chosen, rejected)


# ---------------------------------------------------------------- pairs


def _roles(
    found: Found,
    prompt: str,
    chosen: str | None = None,
    rejected: str | None = None,
    question: bool = False,
    label: str | None = None,
) -> Shape | None:
    """Named columns of a prompt, and of answers where they are there.

    Args:
        question: texts are bare questions and answers.
        label: of unpaired feedback.
    """
    if not found.has(prompt):
        return None
    chosen, rejected = (name if name is not None and found.has(name) else None for name in (chosen, rejected))
    shape = NamedRoles(
        "",
        [prompt],
        chosen is not None,
        chosen is not None and rejected is not None and label is None,
        found.system(),
        found.tools(),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        label=label,
        conversation=question,
        **(found.asking(prompt) if question else {}),
    )
    shape.conversation |= shape.speaks or any(
        is_messages(value) for name in (prompt, chosen, rejected) if name for value in found.values(name)
    )
    shape.columns += [name for name in (chosen, rejected, label, shape.context, shape.history) if name]
    shape.description = _words_for(found, shape)
    return shape


def _words_for(found: Found, shape: NamedRoles) -> str:
    as_messages = [found.holds_messages(name) for name in (shape.prompt, shape.chosen, shape.rejected) if name]
    form = "as messages" if all(as_messages) else "as texts and messages" if any(as_messages) else "as texts"
    kind = "preference pairs" if shape.has_rejected else "prompts and answers" if shape.chosen else "prompts"
    if shape.label:
        kind = "unpaired feedback (answers that were liked are used)"
    words = f"{kind} {form}"
    if any(as_messages):
        repeats = shape.chosen and _repeats(found, shape.chosen)
        words += ", which begin with the prompt" if repeats else ", prompt explicit" if shape.chosen else ""
    elif shape.conversation:
        words += ", written as conversations" + (f" with {shape.context}" if shape.context else "")
    return words


def _repeats(found: Found, chosen: str) -> bool:
    try:
        return MessageReader().read(found.first(chosen), chosen)[0]["role"] != "assistant"
    except SkipRow:
        return False


def _pairs(found: Found) -> Shape | None:
    if not found.has("chosen"):
        return None
    if found.has("prompt"):
        return _roles(found, "prompt", "chosen", "rejected")
    if question := found.text_of(QUESTION_COLUMNS):
        return _roles(found, question, "chosen", "rejected", question=True)
    if not found.has("rejected"):
        return None
    if found.holds_messages("chosen"):
        beside = next((name for name in MESSAGES_COLUMNS if found.holds_messages(name)), None)
        if beside and not _repeats(found, "chosen"):
            return _roles(found, beside, "chosen", "rejected")
        form, tools = "messages", found.tools()
    elif found.holds_text("chosen"):
        form, tools = "transcripts", None
    else:
        return None
    description = f"preference pairs as {form}, prompt implicit"
    return ImplicitPrompt(description, ["chosen", "rejected"], True, True, found.system(), tools)


def _preferred_output(found: Found) -> Shape | None:
    columns = ["input", "preferred_output", "non_preferred_output"]
    first = found.first("input")
    if not found.has(*columns) or not isinstance(first, Mapping) or not is_messages(first.get("messages")):
        return None
    names = dict(zip(("prompt", "chosen", "rejected"), columns, strict=True))
    description = "preference pairs as messages, as OpenAI's files hold them"
    return NestedPreferences(description, columns, True, True, found.system(), "tools", **names)


def _prompt_completion(found: Found) -> Shape | None:
    if not found.has("prompt", "completion"):
        return None
    return _roles(found, "prompt", "completion", label="label" if _is_label(found.values("label")) else None)


def _is_label(values: Sequence[Any]) -> bool:
    """Whether values say yes or no: booleans, 0 and 1, or what a CSV file makes of these."""
    spelled = [value.lower() if isinstance(value, str) else value for value in values]
    return bool(spelled) and all(value in (True, False, "true", "false", "1", "0") for value in spelled)


# ---------------------------------------------------------------- comparisons and lists


def _summarize(found: Found) -> Shape | None:
    columns = ["info", "summaries", "choice"]
    if not found.has(*columns) or not isinstance(found.first("info"), Mapping):
        return None
    return Comparison("comparisons of two summaries", columns, True, True, asks=_post, pair=_summaries, prompt="info")


def _post(row: Row) -> list[Message]:
    """The task of the published comparisons, in words: the post with its title and place, to be summarised."""
    info = row.get("info")
    expect(isinstance(info, Mapping), ("info",), info, "an object")
    lines = [f"{name.upper()}: {text(row, 'info', name)}" for name in ("subreddit", "title") if info.get(name)]
    body = text(row, "info", "post") if info.get("post") else text(row, "info", "article")
    return [user("\n".join(["Summarize this post.", *lines, f"POST: {body}"]))]


def _summaries(row: Row) -> TwoAnswers:
    choice = number(row, "choice")
    if choice not in (0, 1):
        raise SkipRow("field 'choice': expected 0 or 1, found another number")
    return TwoAnswers(answered(row, "summaries", 0, "text"), answered(row, "summaries", 1, "text"), 2 * choice - 1)


# The columns of two responses and of which is better: a strength (below 0: the first, 0: a tie), or its number.
_STRENGTHS = (("response_1", "response_2", "preference_strength"), ("response1", "response2", "overall_preference"))
_NUMBERS = (("response_0", "response_1", "better_response_id"),)


def _two_responses(found: Found) -> Shape | None:
    names = next((names for names in (*_STRENGTHS, *_NUMBERS) if found.has(*names)), None)
    prompt = next((name for name in ("prompt", "context") if found.first(name) is not None), None)
    if prompt is None or names is None:
        return None
    first, second, preference = names

    def pair(row: Row) -> TwoAnswers:
        value = number(row, preference)
        if names in _NUMBERS:
            if value not in (0, 1):
                raise SkipRow(f"field '{preference}': expected 0 or 1, found another number")
            value = 2 * value - 1
        return TwoAnswers(answered(row, first), answered(row, second), value)

    description = f"comparisons of two responses by {preference}"
    columns = [prompt, *names]
    return Comparison(description, columns, True, True, found.system(), found.tools(), pair=pair, prompt=prompt)


def _ranked_list(found: Found) -> Shape | None:
    answers = next(
        (name for name in LIST_COLUMNS if found.holds_list(name) and not found.holds_messages(name)),
        None,
    )
    prompt = next((n for n in ("prompt", *QUESTION_COLUMNS) if found.holds_text(n) or found.holds_messages(n)), None)
    if prompt is None or answers is None or found.has("chosen"):
        return None
    known = (*RankedList.RANKS, *RankedList.SCORES)
    beside = [name for name in found.names if name != answers and _goes_with(found, name, answers)]
    order = next((name for name in known if name in beside), None)
    if beside and order is None:
        return None  # a number for each answer, which may mean anything: steps, labels, lengths
    first = loaded_json(found.first(answers), answers)[0]
    how = f"by {order}" if order else "the best one first" if isinstance(first, str) else "by their ranks or scores"
    return RankedList(
        f"lists of answers, {how}",
        [prompt, answers, *([order] if order else [])],
        True,
        True,
        found.system(),
        found.tools(),
        prompt=prompt,
        answers=answers,
        order=order,
    )


def _goes_with(found: Found, name: str, answers: str) -> bool:
    """Whether a column has a number, or yes or no, for each of a list of answers."""
    for row in found.head:
        values, items = loaded_json_or_none(row.get(name)), loaded_json_or_none(row.get(answers))
        if isinstance(values, list) and values and isinstance(items, list):
            return len(values) == len(items) and all(isinstance(value, int | float) for value in values)
    return False


def _rated(found: Found) -> Shape | None:
    columns = ["prompt", "response", "helpfulness"]
    if not found.has(*columns):
        return None
    return RatedAnswers("rated responses, grouped by prompt", columns, True, True, found.system())


def _trees(found: Found) -> Shape | None:
    root = found.first("prompt") if found.has("prompt") else None
    if isinstance(root, Mapping) and {"text", "replies"} <= root.keys():
        return Trees("trees of messages: best path, ranked siblings", ["prompt"], True, True)
    flat = ["message_id", "parent_id", "text", "role"]
    if not found.has(*flat):
        return None
    more = [name for name in ("message_tree_id", "rank", "deleted") if found.has(name)]
    return Trees("messages of trees: best path, ranked siblings", flat + more, True, True, flat=True)


# ---------------------------------------------------------------- conversations, questions, prompts


def _conversations(found: Found, name: str) -> Shape:
    first = loaded_json_or_none(found.first(name))
    turn = first[0] if isinstance(first, list) and first else {}
    form = "messages"
    if isinstance(turn, str):
        form = "texts in turns"
    elif isinstance(turn, Mapping) and "role" not in turn:
        form = "ShareGPT" if "from" in turn else "pairs of question and answer" if len(turn) > 1 else form
    description = f"conversations as {form}"
    return Messages(description, [name], True, False, found.system(), found.tools(), name=name)


def _messages(found: Found) -> Shape | None:
    name = next((name for name in MESSAGES_COLUMNS if found.holds_messages(name)), None)
    return None if name is None else _conversations(found, name)


def _question_answer(found: Found) -> Shape | None:
    answer = found.text_of(ANSWER_COLUMNS)
    for question in ("prompt", "input"):
        if found.holds_messages(question):
            return _roles(found, question, answer)
    question = found.text_of(QUESTION_COLUMNS)
    if question is None or (question in ("prompt", "input") and answer is None):
        return None
    beside = found.asking(question)
    context, history = beside["context"], beside["history"]
    return Instruction(
        "questions" + (f" with {context}" if context else "") + (" and answers" if answer else ""),
        [name for name in (question, context, history, answer) if name],
        answer is not None,
        False,
        found.system(),
        found.tools(),
        question=question,
        answer=answer,
        **beside,
    )


def _prompts(found: Found) -> Shape | None:
    return _roles(found, "prompt") if found.has("prompt") else None


def _lines(found: Found) -> Shape | None:
    if not found.plain_text:
        return None
    return Instruction("lines of text, a prompt each", ["text"], question="text")


def _other_conversations(found: Found) -> Shape | None:
    """A column whose name promises conversations, whatever its first rows hold: each row says what is wrong with it."""
    name = found.one_of(MESSAGES_COLUMNS)
    return None if name is None else _conversations(found, name)


SHAPES: dict[str, Callable[[Found], Shape | None]] = {
    "columns": _named_columns,
    "trees": _trees,
    "summaries": _summarize,
    "two_responses": _two_responses,
    "preferred_output": _preferred_output,
    "ranked": _ranked_list,
    "pairs": _pairs,
    "rated": _rated,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "prompts": _prompts,
    "lines": _lines,
    "conversations": _other_conversations,
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
