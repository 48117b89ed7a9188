"""What a row says, whatever its schema: a conversation with its answers, or texts that stand as they are.

Messages are dicts {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str}, an assistant's
perhaps with ``reasoning_content``, ``tool_calls`` and ``weight`` (0: not learned). ``MessageReader`` makes them of
OpenAI's rows (role, content), ShareGPT's (from, value) and pairs {human, assistant}; they never go through text.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.data import prompt_format
from utils.data.row_texts import SkipRow, expect, usable

Message = dict[str, Any]  # {"role", "content", ...}

ROLES = {
    **dict.fromkeys(("system", "developer", "user", "assistant", "tool"), None),
    "human": "user",
    "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "ai", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
PAIRS = (("human", "assistant"), ("input", "output"))  # keys of turns that hold a question and its answer
REASONING = ("reasoning_content", "reasoning", "thinking")
# What a turn may hold beside these is counted and said, since nothing is done with it.
KNOWN_KEYS = (
    *("role", "from", "content", "value", "tool_calls", "function_call", "weight", "name", "tool_call_id"),
    *REASONING,
)
EMPTY = (None, "", [], {})


@dataclass(frozen=True)
class Conversation:
    """The turns before an answer, and one or several ways in which they go on.

    Attributes:
        prompt: ends in a turn of the user's or of a tool's.
        answers: for each way its turns, the first one the assistant's; empty where a step asks for prompts alone.
        tools: schemas of functions that the assistant may call.
        ranks: of the answers where there are more than two: 1 for the best; equal ones are a tie.
    """

    prompt: list[Message]
    answers: tuple[list[Message], ...] = ()
    tools: list | None = None
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Texts:
    """A prompt and its answers as the data writes them, marks of turns and blanks included.

    Attributes:
        wholes: the prompt with each answer.
        answers: each answer alone.
        turns: the prompt as messages, where the data tells; None: they are read from the prompt's marks.
        is_transcript: an answer may hold further turns, with marks.
    """

    prompt: str
    wholes: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    turns: tuple[Message, ...] | None = None
    is_transcript: bool = False

    def as_conversation(self) -> Conversation:
        turns = prompt_format.parse_turns(self.prompt) if self.turns is None else list(self.turns)
        if self.is_transcript:
            answers = (prompt_format.parse_transcript(self.prompt, answer) for answer in self.answers)
        else:
            answers = ([assistant(answer.strip())] for answer in self.answers)
        return Conversation(turns, tuple(answers))


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def loaded_json(value: Any, name: str) -> Any:
    """A list or an object that a column of texts spells in JSON, read; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise SkipRow(f"field '{name}' begins like JSON and is none") from None


# The beginning of a list of turns, in JSON or as Python prints it.
_SPELLED_TURNS = re.compile(r"\s*(\[\s*)?\{\s*[\"']")
_PRINTED_TURNS = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value|human)'")


def is_messages(value: Any) -> bool:
    """Whether a value is a list of turns or one turn, or spells one in JSON (or as Python prints it, which cannot be
    read: then it is no text either)."""
    if isinstance(value, str):
        if not _SPELLED_TURNS.match(value):
            return False
        try:
            value = loaded_json(value, "")
        except SkipRow:
            return _PRINTED_TURNS.match(value) is not None
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], Mapping) and _is_turn(value[0])
    return isinstance(value, Mapping) and _is_turn(value) and not {"content", "value"}.isdisjoint(value)


def _is_turn(value: Mapping) -> bool:
    return not {"role", "from"}.isdisjoint(value) or any(set(pair) <= value.keys() for pair in PAIRS)


def without_nulls(value: Any) -> Any:
    """A value without the keys that hold null: columnar files fill objects up to the keys that any row has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@dataclass
class MessageReader:
    """Reads the messages of a field, and counts what their turns hold that nothing is done with."""

    unused: Counter[str] = field(default_factory=Counter)  # "messages[].score" -> turns

    def read(self, value: Any, name: str) -> list[Message]:
        """The messages of a list of turns, of a single turn, or of JSON that spells them.

        Raises:
            SkipRow: anything else, an empty list, a turn without a role or content that can be used.
        """
        turns = loaded_json(value, name)
        turns = [turns] if isinstance(turns, Mapping) else turns
        expect(isinstance(turns, list), (name,), turns, "a list of turns")
        if not turns:
            raise SkipRow(f"field '{name}' is an empty list")
        if all(isinstance(turn, str) for turn in turns):  # user and assistant in turns, without their names
            return [(user, assistant)[i % 2](_text(turn, name)) for i, turn in enumerate(turns)]
        messages: list[Message] = []
        for turn in turns:
            expect(isinstance(turn, Mapping), (name, "turn"), turn, "an object")
            pair = next((pair for pair in PAIRS if pair[0] in turn and _role(turn) is None), None)
            messages += self._pair(turn, pair, name) if pair else self._message(turn, name)
        if not messages:
            raise SkipRow(f"field '{name}' holds no turn but an empty one of the system's")
        return messages

    def _pair(self, turn: Mapping, keys: tuple[str, str], name: str) -> list[Message]:
        """A question and its answer; a question alone where the answer is null."""
        self.note_unused(turn, keys, f"{name}[]")
        asks, answers = keys
        question = user(_text(turn[asks], asks))
        return [question] if turn.get(answers) is None else [question, assistant(_text(turn[answers], answers))]

    def _message(self, turn: Mapping, name: str) -> list[Message]:
        given = _role(turn)
        if not isinstance(given, str) or given.lower() not in ROLES:
            raise SkipRow(f"field '{name}': expected the role {', '.join(list(ROLES)[:5])}; found another or none")
        given = given.lower()
        message: Message = {"role": ROLES[given] or given}
        key = "content" if turn.get("content") is not None or "value" not in turn else "value"
        content = turn.get(key)
        self.note_unused(turn, KNOWN_KEYS, f"{name}[]")
        if message["role"] in ("system", "developer") and content in EMPTY and key in turn:
            self.unused[f"{name}[].{key} of system turns that are empty"] += 1
            return []
        if given in ("function_call", "tool_call"):
            message |= {"content": "", "tool_calls": self._calls(content, name)}
        else:
            calls = next((turn[key] for key in ("tool_calls", "function_call") if without_nulls(turn.get(key))), None)
            if calls:
                message["tool_calls"] = self._calls(calls, name)
            if key not in turn and not calls:
                raise SkipRow("field 'content' is missing")
            message["content"] = _content(key, content, may_be_empty=bool(calls) or message["role"] == "tool")
        return [message | _extras(turn, message["role"])]

    def _calls(self, given: Any, name: str) -> list[dict]:
        """Calls as templates of transformers read them: {"type": "function", "function": {"name", "arguments": {}}}."""
        calls, read = loaded_json(given, name), []
        for call in calls if isinstance(calls, list) else [calls]:
            function = (call.get("function") or call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise SkipRow(f"field '{name}': expected calls of functions with a name")
            arguments = without_nulls(function.get("arguments"))
            arguments = {} if arguments in EMPTY else loaded_json(arguments, "arguments")
            expect(isinstance(arguments, Mapping), (name, "arguments"), arguments, "an object, or JSON that spells one")
            read.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
            if call.get("id") is not None:
                read[-1]["id"] = call["id"]
        return read

    def note_unused(self, given: Mapping, known: Sequence[str], name: str) -> None:
        """Counts the fields of a turn, or of what a list holds, that are not among the known ones."""
        for key, value in given.items():
            if key not in known and without_nulls(value) not in EMPTY:
                self.unused[f"{name}.{key}"] += 1

    def note_behind(self, turns: int) -> None:
        """Counts turns behind the last answer of a conversation."""
        if turns:
            self.unused["turns behind the last answer"] += turns


def _role(turn: Mapping) -> Any:
    return turn.get("role") if turn.get("role") is not None else turn.get("from")


def _extras(turn: Mapping, role: str) -> Message:
    """What a message holds beside its content: reasoning, the weight of an answer, names."""
    found = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
    if reasoning is not None:
        found["reasoning_content"] = _text(reasoning, "reasoning_content")
    weight = turn.get("weight")
    if weight is not None and role == "assistant":
        if weight not in (0, 1):
            raise SkipRow("field 'weight': expected 0 or 1, found another value")
        found["weight"] = int(weight)
    return found


def _content(key: str, content: Any, may_be_empty: bool) -> str:
    content = _joined_parts(content) if isinstance(content, list) else content
    return "" if may_be_empty and content in EMPTY else _text(content, key)


def _joined_parts(parts: list) -> str:
    """The text of a content that is given in parts; a part that is no text (an image, say) cannot be learned."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "input_text", "output_text"):
            texts.append(_text(part.get("text"), "content[].text"))
        else:
            raise SkipRow("field 'content' has parts that are no text")
    return "".join(texts)


def _text(value: Any, name: str) -> str:
    expect(isinstance(value, str), (name,), value, "a string")
    return usable(value, f"'{name}'")


def check_order(messages: Sequence[Message], name: str) -> None:
    """SkipRow unless a system turn comes first or none, and then user (or tool) and assistant take turns."""
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles and roles[0] in ("system", "developer") else roles
    after = {None: ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    for before, role in zip([None, *spoken], spoken, strict=False):
        if role not in after.get(before, ()):
            break
    else:
        if spoken:
            return
    raise SkipRow(f"field '{name}': expected user and assistant in turns, the user first, found another order")


def without_last_answer(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """(the turns before the last answer, the turns of it): the answer is what the assistant says at the end."""
    cut = len(messages)
    while cut and messages[cut - 1]["role"] == "assistant":
        cut -= 1
    return messages[:cut], messages[cut:]


def read_tools(value: Any, name: str = "tools") -> list | None:
    """The schemas of a field, a list or JSON that spells one; None for none."""
    tools = loaded_json(value, name)
    if tools in EMPTY:
        return None
    expect(isinstance(tools, list), (name,), tools, "a list")
    return without_nulls(tools)
