"""What a row says, whatever its schema: a conversation with its answers, or texts that stand as they are.

Messages are dicts {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str}, an assistant's
perhaps with ``reasoning_content``, ``tool_calls`` and ``weight`` (0: not learned). ``read_messages`` makes them of
OpenAI's rows (role, content), ShareGPT's (from, value) and pairs {human, assistant}; they never go through text.
"""

import json
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
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
# What a turn may hold beside these is counted and said, since nothing is done with it.
KNOWN_KEYS = {"role", "from", "content", "value", "tool_calls", "weight", "name", "tool_call_id", *REASONING}


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


@dataclass
class MessageReader:
    """Reads the messages of a field, and counts what their turns hold that nothing is done with."""

    unused: Counter[str] = field(default_factory=Counter)  # "messages[].score" -> turns

    def read(self, value: Any, name: str) -> list[Message]:
        """The messages of a list, or of JSON that spells one.

        Raises:
            SkipRow: anything else, an empty list, a turn without a role or content that can be used.
        """
        turns = loaded_json(value, name)
        expect(isinstance(turns, list), (name,), turns, "a list of turns")
        if not turns:
            raise SkipRow(f"field '{name}' is an empty list")
        messages: list[Message] = []
        for turn in turns:
            expect(isinstance(turn, Mapping), (name, "turn"), turn, "an object")
            messages += self._pair(turn) if "human" in turn else [self._message(turn, name)]
        return messages

    def _pair(self, turn: Mapping) -> list[Message]:
        question = user(_text(turn["human"], "human"))
        return (
            [question]
            if turn.get("assistant") is None
            else [question, assistant(_text(turn["assistant"], "assistant"))]
        )

    def _message(self, turn: Mapping, name: str) -> Message:
        given = turn.get("role", turn.get("from"))
        if not isinstance(given, str) or given.lower() not in ROLES:
            raise SkipRow(f"field '{name}': expected the role {', '.join(list(ROLES)[:5])}; found another or none")
        given = given.lower()
        message: Message = {"role": ROLES[given] or given}
        content = turn["content"] if "content" in turn else turn.get("value")
        if given in ("function_call", "tool_call"):
            message |= {"content": "", "tool_calls": _tool_calls([loaded_json(content, name)], name)}
        else:
            if turn.get("tool_calls"):
                message["tool_calls"] = _tool_calls(loaded_json(turn["tool_calls"], "tool_calls"), name)
            message["content"] = _content(turn, content, bool(message.get("tool_calls")) or message["role"] == "tool")
        self._extras(turn, message, name)
        return message

    def _extras(self, turn: Mapping, message: Message, name: str) -> None:
        reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
        if reasoning is not None:
            message["reasoning_content"] = _text(reasoning, "reasoning_content")
        for key in ("name", "tool_call_id"):
            if turn.get(key) is not None:
                message[key] = turn[key]
        weight = turn.get("weight")
        if weight is not None and message["role"] == "assistant":
            if weight not in (0, 1):
                raise SkipRow("field 'weight': expected 0 or 1, found another value")
            message["weight"] = int(weight)
        for key, value in turn.items():
            if key not in KNOWN_KEYS and value not in (None, "", [], {}):
                self.unused[f"{name}[].{key}"] += 1


def _content(turn: Mapping, content: Any, may_be_empty: bool) -> str:
    if isinstance(content, list):
        content = _joined_parts(content)
    name = "content" if "value" not in turn else "value"
    if may_be_empty and (content is None or content == ""):
        return ""
    if "content" not in turn and "value" not in turn:
        raise SkipRow("field 'content' is missing")
    return _text(content, name)


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


def _tool_calls(calls: Any, name: str) -> list[dict]:
    """Calls as templates of transformers read them: [{"type": "function", "function": {"name", "arguments": {}}}]."""
    expect(isinstance(calls, list), (name, "tool_calls"), calls, "a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise SkipRow("field 'tool_calls': expected calls of functions with a name")
        arguments = loaded_json(function.get("arguments", {}), "tool_calls.arguments")
        read.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        if call.get("id") is not None:
            read[-1]["id"] = call["id"]
    return read


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


def read_tools(value: Any) -> list | None:
    """The schemas of a field ``tools``, a list or JSON that spells one; None for none."""
    tools = loaded_json(value, "tools")
    if tools is None or tools in ("", []):
        return None
    expect(isinstance(tools, list), ("tools",), tools, "a list")
    return tools
