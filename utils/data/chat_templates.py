"""What a chat template can write, and which one to train with.

A template is a program, so what it does is found by letting it write probe conversations, never by reading its source:

    abilities       system turns, tools, reasoning ...: what of a conversation a template writes at all
    rewrites_turns  whether earlier turns change once later ones follow, so that answers cannot be told from the rest
    training_form   a template of ours that writes each answer as the model's own writes a last one, and marks it
    named_template  templates for models that have none, by name (utils/data/templates) or from a file
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from utils.data.chat_template_guard import check_template_ends
from utils.data.errors import DataError

Messages = Sequence[dict[str, Any]]
Spans = list[tuple[int, int]]
SpecialTokens = dict[str, Any]  # as a tokenizer's special_tokens_map

TEMPLATES = Path(__file__).with_name("templates")
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


# ---------------------------------------------------------------- rendering


@lru_cache(maxsize=32)
def marks_answers(template: str) -> bool:
    """Whether a template says itself what the assistant writes, by {% generation %}."""
    return bool(_GENERATION_MARKER.search(template))


def render_template(
    template: str,
    special_tokens: SpecialTokens,
    messages: Messages,
    tools: list[dict] | None = None,
    add_generation_prompt: bool = False,
) -> tuple[str, Spans]:
    """A conversation as a template writes it.

    Returns:
        (text, [start, end) in characters of what stands between generation markers; none where there are none).

    Raises:
        ValueError: a template that refuses these messages, fails at them or does not end.
    """
    if template not in _own_templates():
        check_template_ends(template, special_tokens)
    try:
        [text], spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marks_answers(template),
            **special_tokens,
        )
    except Exception as error:  # a template is a program of a stranger's: it may fail in any way
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {reason}") from error
    return text, spans[0] if spans else []


@dataclass(frozen=True)
class _Writer:
    """A template with the special tokens that it writes with."""

    template: str
    special_tokens: SpecialTokens

    @classmethod
    def of_key(cls, template: str, key: str) -> "_Writer":
        return cls(template, json.loads(key))

    def text(self, messages: Messages, tools: list[dict] | None = None, prompt: bool = False) -> str:
        return render_template(self.template, self.special_tokens, messages, tools, add_generation_prompt=prompt)[0]

    def text_or_none(self, messages: Messages, tools: list[dict] | None = None, prompt: bool = False) -> str | None:
        """None where the template refuses."""
        try:
            return self.text(messages, tools, prompt)
        except ValueError:
            return None

    def stems(self, text: str) -> tuple[str, ...]:
        """What a later rendering must begin with: the text without blanks at its end, also less a last EOS."""
        stem, eos = text.rstrip(), str(self.special_tokens.get("eos_token") or "")
        return (stem, stem.removesuffix(eos).rstrip()) if eos and stem.endswith(eos) else (stem,)


def _key(special_tokens: SpecialTokens) -> str:
    """Special tokens as something that a cache can look up."""
    return json.dumps({name: _plain(value) for name, value in special_tokens.items()}, sort_keys=True)


def _plain(value: Any) -> Any:
    return [str(part) for part in value] if isinstance(value, list | tuple) else value and str(value)


# ---------------------------------------------------------------- probes

# Words that no template writes by itself.
_SYSTEM, _REASON, _FUNCTION, _ARGUMENT, _RESULT = "zsystem", "zreason", "zfunction", "zargument", "zresult"
_NAME = "zname"
_VALUE = "zvalue"
_CALL_ID = "zcall0001"  # nine letters and digits, as Mistral's templates want them
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _FUNCTION,
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {_ARGUMENT: {"type": "string"}}, "required": [_ARGUMENT]},
        },
    }
]


def _system(content: str = _SYSTEM, role: str = "system") -> dict:
    return {"role": role, "content": content}


def _question(number: int = 1) -> dict:
    return {"role": "user", "content": f"zquestion{number}"}


def _answer(number: int = 1, **fields: Any) -> dict:
    return {"role": "assistant", "content": f"zanswer{number}"} | fields


def _reasoned(number: int = 1) -> dict:
    return _answer(number, reasoning_content=f"{_REASON}{number}")


def _call(**fields: Any) -> dict:
    function = {"name": _FUNCTION, "arguments": {_ARGUMENT: _VALUE}}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]} | fields


def _result() -> dict:
    return {"role": "tool", "content": _RESULT, "tool_call_id": _CALL_ID, "name": _FUNCTION}


# ---------------------------------------------------------------- abilities


@dataclass(frozen=True)
class Abilities:
    """What of a conversation a template writes; what it does not is either refused or left out by it.

    Attributes:
        system, developer, tool: turns of this role.
        tools: the schemas of functions that may be called.
        tool_calls: calls of an answer without content.
        calls_with_text: also the content of an answer that has calls.
        reasoning: ``reasoning_content`` of the last answer.
        parts: contents that are lists of text parts, written as if they were one text.
        names, result_names, call_ids: the ``name`` of who speaks, that of a tool's result, and the ids of calls.
        refusals: for each ability that is False, what the template says to it.
    """

    system: bool
    developer: bool
    tool: bool
    tools: bool
    tool_calls: bool
    calls_with_text: bool
    reasoning: bool
    parts: bool
    names: bool
    result_names: bool
    call_ids: bool
    refusals: dict[str, str] = field(default_factory=dict, compare=False)


def abilities(template: str, special_tokens: SpecialTokens) -> Abilities:
    """What a template writes, found once for each template.

    Raises:
        ValueError: the template does not end in time.
    """
    return _abilities(template, _key(special_tokens))


@lru_cache(maxsize=32)
def _abilities(template: str, key: str) -> Abilities:
    writer = _Writer.of_key(template, key)
    if template not in _own_templates():
        check_template_ends(template, writer.special_tokens)
    parts = [{"role": "user", "content": [{"type": "text", "text": _question()["content"]}]}]
    calls = _refusal(writer, [_question(), _call()], None, False, (_FUNCTION, _ARGUMENT))
    asked_tool = [_question(), _answer() if calls else _call(), _result()]
    probes = {  # messages, tools, whether an answer is asked for, words that must be there
        "system": ([_system(), _question()], None, True, (_SYSTEM,)),
        "developer": ([_system(role="developer"), _question()], None, True, (_SYSTEM,)),
        "tool": (asked_tool, None, True, (_RESULT,)),
        "tools": ([_question()], _TOOLS, True, (_FUNCTION, _ARGUMENT)),
        "calls_with_text": ([_question(), _call(content=_answer()["content"])], None, False, ("zanswer1", _FUNCTION)),
        "reasoning": ([_question(), _reasoned()], None, False, (_REASON,)),
        "parts": (parts, None, True, (_question()["content"],)),
        "names": ([_question() | {"name": _NAME}], None, True, (_NAME,)),
        "result_names": ([*asked_tool[:-1], _result() | {"name": _NAME}], None, True, (_NAME,)),
        "call_ids": (asked_tool, None, True, (_CALL_ID,)),
    }
    refusals = {"tool_calls": calls} | {name: _refusal(writer, *probe) for name, probe in probes.items()}
    plain = writer.text_or_none([_question()], prompt=True)
    if refusals["parts"] is None and writer.text_or_none(parts, prompt=True) != plain:
        refusals["parts"] = "it writes the list itself instead of its text"
    found = {name: refusal is None for name, refusal in refusals.items()}
    return Abilities(**found, refusals={name: refusal for name, refusal in refusals.items() if refusal})


def _refusal(writer: _Writer, messages: Messages, tools: list[dict] | None, prompt: bool, words) -> str | None:
    """Why a template does not write a probe, or None if it does."""
    try:
        text = writer.text(messages, tools, prompt)
    except ValueError as error:
        return str(error)
    if any(word not in text for word in words):
        return "it leaves them out"
    empty = [message | {"content": message["content"] or ""} for message in messages]
    if "None" in text and "None" not in (writer.text_or_none(empty, tools, prompt) or ""):
        return "it writes None where there is no content"
    return None


# ---------------------------------------------------------------- turns that are written anew


def rewrites_turns(template: str, special_tokens: SpecialTokens) -> bool:
    """Whether a template writes turns differently once later ones follow, or an answer not behind its prompt.

    A last EOS that goes away when more turns follow (Phi-3) does not count.
    """
    return _rewrites_turns(template, _key(special_tokens))


@lru_cache(maxsize=32)
def _rewrites_turns(template: str, key: str) -> bool:
    writer = _Writer.of_key(template, key)
    return not all(_grows(writer, messages, tools) for messages, tools in _long_probes(writer))


def _long_probes(writer: _Writer) -> Iterator[tuple[Messages, list[dict] | None]]:
    """Conversations of several answers that a template writes, with what it can write."""
    able = abilities(writer.template, writer.special_tokens)
    plain = [_question(1), _answer(1), _question(2), _answer(2), _question(3), _answer(3)]
    called = [_question(1), _call(), _result(), _answer(1), _question(2), _answer(2)]
    yield plain, None
    if able.system:
        yield [_system(), *plain], None
    if able.reasoning:
        yield [_question(1), _reasoned(1), _question(2), _reasoned(2)], None
    if able.tools:
        yield plain, _TOOLS
    if able.tool_calls and able.tool:
        yield called, _TOOLS if able.tools else None


def _grows(writer: _Writer, messages: Messages, tools: list[dict] | None) -> bool:
    """Whether each answer follows its prompt, and the whole what was written up to each answer."""
    whole = writer.text_or_none(messages, tools)
    if whole is None:
        return True  # it refuses such conversations, and will when it is used
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = writer.text_or_none(messages[:i], tools, prompt=True)
        answered = writer.text_or_none(messages[: i + 1], tools)
        if (
            asked is None
            or answered is None
            or not answered.startswith(asked)
            or not any(whole.startswith(stem) for stem in writer.stems(answered))
        ):
            return False
    return True


def closes_answers(template: str, special_tokens: SpecialTokens, end_tokens: frozenset[str]) -> bool:
    """Whether one of some tokens stands between each answer, calls of tools included, and the turn that follows it."""
    return _closes_answers(template, _key(special_tokens), end_tokens)


@lru_cache(maxsize=32)
def _closes_answers(template: str, key: str, end_tokens: frozenset[str]) -> bool:
    writer = _Writer.of_key(template, key)
    for messages, tools in _long_probes(writer):
        text = writer.text_or_none(messages, tools)
        if text is None:
            continue  # it refuses such conversations, and will when it is used
        for answer, following in itertools.pairwise(messages):
            if answer["role"] != "assistant":
                continue
            end, said = text.find(following["content"]), answer["content"] or _VALUE
            start = text.rfind(said, 0, max(end, 0))
            if start < 0 or not any(token in text[start + len(said) : end] for token in end_tokens):
                return False
    return True


# ---------------------------------------------------------------- forms for training


def training_form(template: str, special_tokens: SpecialTokens) -> str | None:
    """A template that writes conversations of one answer as ``template`` does, and longer ones so that they can be
    learned: every answer as a last one, between generation markers, and nothing changes as turns follow.

    Returns:
        None where the template needs none, having markers or writing its turns for good; and where none fits.
    """
    return _training_form(template, _key(special_tokens))


@lru_cache(maxsize=32)
def _training_form(template: str, key: str) -> str | None:
    if marks_answers(template) or not (_rewrites_turns(template, key) or _ends_conversations(template, key)):
        return None
    writer = _Writer.of_key(template, key)
    return next((form for form in _forms() if _fits(_Writer(form, writer.special_tokens), writer)), None)


def _ends_conversations(template: str, key: str) -> bool:
    """Whether an EOS behind the last turn goes away when more follow, as Phi-3's does."""
    writer = _Writer.of_key(template, key)
    turns = [_question(1), _answer(1), _question(2)]
    shorter, longer = writer.text_or_none(turns[:2]), writer.text_or_none(turns, prompt=True)
    return None not in (shorter, longer) and not longer.startswith(shorter.rstrip())


@lru_cache(maxsize=1)
def _forms() -> tuple[str, ...]:
    """The forms of utils/data/templates/training, each with the values that its heading names set before it."""
    brackets = itertools.product(
        (("[INST] ", " "), ("[INST]", ""), (" [INST] ", " ")), ("[/INST]", " [/INST]"), (" ", ""), (True, False)
    )
    return (
        *(_form("qwen3", opens_think=opens) for opens in (False, True)),
        *(_form("phi3", newline=newline, begins_with_bos=bos) for newline in ("\n", "") for bos in (False, True)),
        *(
            _form("mistral", opening=opening, gap=gap, closing=closing, before_answer=blank, trims=trims)
            for (opening, gap), closing, blank, trims in brackets
        ),
    )


def _form(name: str, **values: str | bool) -> str:
    settings = "".join("{%- set " + name + " = " + json.dumps(value) + " -%}" for name, value in values.items())
    return settings + (TEMPLATES / "training" / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _own_templates() -> frozenset[str]:
    """Templates that are not tried before they are used, being ours."""
    return frozenset({*_forms(), *(named_template(name) for name in template_names())})


def _fits(form: _Writer, own: _Writer) -> bool:
    """Whether a form writes what a model's own template writes, wherever that one writes turns for good."""
    return all(_same(form, own, messages, tools) for messages, tools in _fitting_probes(own))


def _fitting_probes(own: _Writer) -> Iterator[tuple[Messages, list[dict] | None]]:
    """Conversations in which only a last answer may be written anew, with what the template can write."""
    able = abilities(own.template, own.special_tokens)
    blanks = [_question() | {"content": "  zquestion1 \n"}, _answer(content="\n\n zanswer1\nmore \n")]
    thought = [_question(), _answer(content="<think>\nzthought\n</think>\n\nzanswer1")]
    two_calls = _call(tool_calls=_call()["tool_calls"] * 2)
    yield from (([_question(), _answer()], None), (blanks, None), (thought, None))
    yield [_system(), _question(), _answer()], None  # also where it is refused: then by both
    yield [_question(1), _question(2), _answer()], None
    if able.reasoning:
        yield [_question(), _reasoned()], None
    if able.tools:
        yield [_question(), _answer()], _TOOLS * 2
        yield [_system(), _question(), _answer()], _TOOLS
    tools = _TOOLS if able.tools else None
    if able.tool_calls:
        for call in (_call(), _call(content="ztext"), two_calls):
            yield [_question(), call], tools
            if able.reasoning:
                yield [_question(), call | {"reasoning_content": _REASON}], tools
    if able.tool and able.tool_calls:
        thoughts = {"reasoning_content": _REASON} if able.reasoning else {}
        yield [_question(), _call(**thoughts), _result(), _answer(**thoughts)], tools
        yield [_question(), two_calls | thoughts, _result(), _result(), _answer(**thoughts)], tools
    yield [_question(1), _answer(1), _question(2), _answer(2)], None


def _same(form: _Writer, own: _Writer, messages: Messages, tools: list[dict] | None) -> bool:
    """Whether a form writes a conversation as the model's own template does: the prompt of the last answer, and it all.

    The model's own may move what stands before the first question (Mistral) and may take back what it wrote before an
    earlier answer (Qwen3). So where the conversation does not begin with its prompt, what follows the question counts;
    where there are earlier answers, what follows the first of them, or the question if that one is a call.
    """
    want, got = own.text_or_none(messages, tools), form.text_or_none(messages, tools)
    if want is None or got is None:
        return want is got
    asked, offered = (writer.text_or_none(messages[:-1], tools, prompt=True) for writer in (own, form))
    if asked is None or offered is None or not got.startswith(offered):
        return False
    earlier = [message["content"] for message in messages[:-1] if message["role"] == "assistant"]
    start = "" if not earlier else earlier[0] or messages[0]["content"]
    if _from(start, asked) != _from(start, offered):
        return False
    if not earlier and not want.startswith(asked):
        start = messages[-2]["content"].strip()
    return _from(start, got).rstrip() in own.stems(_from(start, want))


def _from(start: str, text: str) -> str:
    return text[max(0, text.find(start)) :]


# ---------------------------------------------------------------- templates by name


def template_names() -> list[str]:
    """The names that ``named_template`` knows."""
    return sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


def named_template(text: str) -> str:
    """The Jinja source of a template of ours, by name, or of a file.

    Args:
        text: a name of ``template_names``, or a path: a Jinja file, or JSON with a field "chat_template"
            (tokenizer_config.json, chat_template.json).

    Raises:
        DataError: neither a name nor a file, or a file without a template.
    """
    names, path = template_names(), Path(text)
    if text in names:
        return (TEMPLATES / f"{text}.jinja").read_text(encoding="utf-8")
    if not path.is_file():
        nearest = get_close_matches(text.lower(), names, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        what = "is a folder; name the file in it" if path.is_dir() else "no such file and no such name" + hint
        raise DataError(f"--chat_template {text}: {what}. The names are {', '.join(names)}")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat_template {text}: cannot be read as text: {error}") from error
    if path.suffix == ".json":
        source = _template_in_json(text, source)
    if not source.strip():
        raise DataError(f"--chat_template {text}: the file is empty")
    return source


def _template_in_json(text: str, source: str) -> str:
    try:
        found = json.loads(source)
    except json.JSONDecodeError as error:
        raise DataError(f"--chat_template {text}: not valid JSON: {error}") from error
    template = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(template, list):  # several templates with names of their own, as older files have them
        named = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise DataError(f'--chat_template {text}: has no field "chat_template" that holds a template')
    return template


_CONTROL = re.compile(r"<\|[^<>|\s]+\|>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]")  # how control tokens are spelled


def missing_tokens(template: str, tokenizer) -> list[str]:
    """Control tokens that a template writes and a tokenizer does not have, in the order of a conversation.

    None are missing where all of them are plain characters and turns end with the tokenizer's EOS, as Zephyr's do.
    """
    special, vocabulary = tokenizer.special_tokens_map, tokenizer.get_vocab()
    writer, turns = _Writer(template, special), [_question(), _answer()]
    whole = writer.text_or_none([_system(), *turns]) or writer.text_or_none(turns) or ""
    spelled = dict.fromkeys(_CONTROL.findall(whole + (writer.text_or_none(turns[:1], prompt=True) or "")))
    missing = [token for token in spelled if token not in vocabulary]
    behind, eos = whole.partition(_answer()["content"])[2].lstrip(), str(special.get("eos_token") or "")
    return [] if eos and behind.startswith(eos) and len(missing) == len(spelled) else missing
