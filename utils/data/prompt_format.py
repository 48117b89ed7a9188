"""The one place of the prompt format: training, chat and evaluation build their prompts here.

A conversation is a list of turns {"role": "user" | "assistant", "content": str}, perhaps behind one of the system's.
Four formats write it as text:

    human_assistant  " Human: q Assistant: a Human: q2 Assistant:"
    hh               "\\n\\nHuman: q\\n\\nAssistant: a\\n\\nHuman: q2\\n\\nAssistant:"   (as in Dahoas/rm-static)
    bare             "q": the user's words as they stand, of one turn
    chat_template    whatever the tokenizer's own chat template makes of it

The format goes with the model: the tokenizer of a trained model names it (``remember``), and what reads the model later
follows it. A model that was trained without a template of its own is also saved with one that writes its format (the
end of this file), for servers that know nothing else. No format here ever uses that one.
"""

import json
import re
from functools import lru_cache
from itertools import pairwise

from utils.data.chat_templates import render_template
from utils.data.special_tokens import mark_spellings, special_token_ids
from utils.data.text_encoder import TextEncoder

HUMAN_ASSISTANT, HH, BARE, CHAT_TEMPLATE = "human_assistant", "hh", "bare", "chat_template"
FORMATS = (HUMAN_ASSISTANT, HH, BARE, CHAT_TEMPLATE)

# What stands before a turn's content; the content itself follows after one blank.
_MARKS = {
    HUMAN_ASSISTANT: {"user": " Human:", "assistant": " Assistant:"},
    HH: {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"},
}
# The ways in which texts set their marks apart, the strictest first: what is set apart otherwise is part of a turn.
_MARK_PATTERNS = [re.compile(rf"(?:^|{gap})(Human|Assistant):") for gap in ("\\n\\n", " ", r"\s+")]
_TRANSCRIPT_MARKS = {gap: re.compile(rf"{gap}(Human|Assistant):") for gap in ("\n\n", " ")}
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_SYSTEM_ROLES = ("system", "developer")


def format_prompt(turns, style=HUMAN_ASSISTANT, tokenizer=None):
    """Text of a conversation that ends where the assistant's next answer begins.

    Raises ValueError if the turns do not alternate or do not end in a user turn, if the format is unknown or cannot
    write them, or if "chat_template" is asked of a tokenizer without one, or of one that refuses these turns.
    """
    _check_style(style)
    _check_turns(turns)
    if style == CHAT_TEMPLATE:
        return render(turns, tokenizer, add_generation_prompt=True)[0]
    return write_turns(turns, style, waits=True)[0]


def write_turns(turns, style, waits=False):
    """Turns in one of the formats that need no template.

    Args:
        waits: the text ends with the mark after which the next answer comes.

    Returns:
        (text, [start, end) of each turn in its characters, from behind its mark on)

    Raises:
        ValueError: a format without a place for some of the turns.
    """
    if style == BARE:
        return _write_bare(turns)
    marks, text, places = _MARKS[style], "", []
    for turn in turns:
        content = turn["content"].strip()
        mark = marks.get(turn["role"])
        if mark is None:
            if turn["role"] not in _SYSTEM_ROLES or text:
                raise ValueError(f"the format {style} has no place for a turn of the role {turn['role']}")
            mark = "" if style == HUMAN_ASSISTANT else "\n\n"
        start = len(text) + len(mark)
        text += mark + (" " if mark != "\n\n" else "") + content
        places.append((start, len(text)))
    return text + (marks["assistant"] if waits else ""), places


def _write_bare(turns):
    if [turn["role"] for turn in turns[:2]] != ["user", "assistant"][: len(turns)] or len(turns) > 2:
        raise ValueError("the format bare holds one question and its answer, nothing else")
    text = turns[0]["content"].rstrip()
    places = [(0, len(text))]
    if len(turns) == 2:
        text += " " + turns[1]["content"].strip()
        places.append((places[0][1], len(text)))
    return text, places


def format_answer(text, style=HUMAN_ASSISTANT, tokenizer=None):
    """An answer as it follows its prompt: after exactly one blank, or with none in a chat template, where special
    tokens spelled in it are marked if its tokenizer is given."""
    _check_style(style)
    if style != CHAT_TEMPLATE:
        return " " + text.strip()
    return text.strip() if tokenizer is None else mark_spellings(text.strip(), tokenizer, "assistant")


def render(messages, tokenizer, add_generation_prompt=False, template=None, tools=None):
    """A conversation as the tokenizer's chat template writes it.

    Args:
        template: to use instead of the tokenizer's own.
        tools: schemas of functions that the assistant may call.

    Returns:
        (text, [start, end) of what stands between its generation markers, in characters of the text). Special tokens
        that contents spell are marked in the text (special_tokens.py); ``unmarked`` takes the marks out for reading.

    Raises:
        ValueError: no template, or one that refuses these messages, fails at them or does not end.
    """
    _check_has_template(tokenizer)
    template, tools = template or tokenizer.get_chat_template(), marked_tools(tools, tokenizer)
    return render_template(
        template, tokenizer.special_tokens_map, marked_turns(messages, tokenizer), tools, add_generation_prompt
    )


def marked_turns(messages, tokenizer):
    """Messages as a template gets them: special tokens that they spell are marked, weights of training are gone."""
    return [
        {
            key: value if key == "role" else _marked(value, tokenizer, turn["role"])
            for key, value in turn.items()
            if key != "weight"
        }
        for turn in messages
    ]


def marked_tools(tools, tokenizer):
    return _marked(tools, tokenizer, "system")


def _marked(value, tokenizer, role):
    """A value of a message, or of a tool's schema, with the special tokens marked that its strings spell."""
    if isinstance(value, str):
        return mark_spellings(value, tokenizer, role)
    if isinstance(value, list):
        return [_marked(part, tokenizer, role) for part in value]
    if isinstance(value, dict):
        return {key: _marked(part, tokenizer, role) for key, part in value.items()}
    return value


# ---------------------------------------------------------------- texts that carry the marks


def is_formatted(text):
    """Whether a prompt already carries the marks: it begins with "Human:" and waits after "Assistant:"."""
    return text.lstrip().startswith(("Human:", "Assistant:")) and text.rstrip().endswith("Assistant:")


def _marks_of(text):
    """The marks that part a text into turns, by the strictest pattern that finds the first and the last of them."""
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    for pattern in _MARK_PATTERNS:
        marks = [mark for mark in pattern.finditer(text) if mark.end() > begin]
        if marks and marks[0].start() <= begin and marks[-1].end() == end:
            return marks
        at_start = re.compile(r"(Human|Assistant):").match(text, begin)
        if marks and at_start and marks[-1].end() == end:
            return [at_start, *(mark for mark in marks if mark.start() > begin)]
    return []


def parse_turns(text):
    """Turns of a prompt text: of " Human: … Assistant:" those it names, of any other text one user turn."""
    if not is_formatted(text):
        return [{"role": "user", "content": text.strip()}]
    turns = []
    # The last mark is the "Assistant:" that waits for its answer.
    for mark, following in pairwise(_marks_of(text)):
        role, content = _ROLE_OF[mark.group(1)], text[mark.end() : following.start()]
        if turns and turns[-1]["role"] == role:
            # Two turns of one role in a row: the second mark is part of what was said.
            turns[-1]["content"] += f" {mark.group(1)}:{content}"
        else:
            turns.append({"role": role, "content": content})
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]


def transcript_parts(prompt, rest):
    """What follows a prompt that waits for an answer, as (role, start, end) of each turn in its characters.

    The first is the answer; behind it there may be more turns. Their marks are set apart as those of the prompt are.
    """
    marks = _TRANSCRIPT_MARKS["\n\n" if "\n\nAssistant:" in prompt else " "].finditer(rest)
    parts = [("assistant", 0, len(rest))]
    for mark in marks:
        role, start, _ = parts[-1]
        following = _ROLE_OF[mark.group(1)]
        if following != role:  # else the mark is part of what is said
            parts[-1] = (role, start, mark.start())
            parts.append((following, mark.end(), len(rest)))
    return parts


def parse_transcript(prompt, rest):
    """Turns of what follows a prompt that waits for an answer, up to the assistant's last."""
    turns = [{"role": role, "content": rest[start:end].strip()} for role, start, end in transcript_parts(prompt, rest)]
    return turns[: len(turns) - (turns[-1]["role"] == "user")]


def end_of_last_mark(text):
    """Where the last "Assistant:" of a transcript ends, in characters; None where there is none.

    Marks are set apart by an empty line where the transcript begins with one, or else has any.
    """
    for gap, pattern in _TRANSCRIPT_MARKS.items():
        ends = [mark.end() for mark in pattern.finditer(text) if mark.group(1) == "Assistant"]
        if ends or text.startswith(gap):
            return ends[-1] if ends else None
    return None


def prompt_from_text(text, style=HUMAN_ASSISTANT, tokenizer=None):
    """Formatted prompt of a line of text.

    Text that already carries the marks (a row of rm-static, say) stays as it was written, since a model was trained on
    exactly that; only a chat template takes it apart and writes it anew.
    """
    _check_style(style)
    if style == BARE or (is_formatted(text) and style != CHAT_TEMPLATE):
        return text
    return format_prompt(parse_turns(text), style, tokenizer)


def encode_prompt(text, tokenizer, style=HUMAN_ASSISTANT, allow_special_tokens=False):
    """Token ids of a formatted prompt, with the tokenizer's BOS once and without an EOS at its end.

    Args:
        allow_special_tokens: special tokens spelled in what users wrote become these tokens; else they are text.
    """
    encoder = _prompt_encoder(tokenizer, len(tokenizer), style == CHAT_TEMPLATE, allow_special_tokens)
    return encoder.encode([text])[0].ids


@lru_cache(maxsize=8)
def _prompt_encoder(tokenizer, size, template, allow_special_tokens):
    """``size`` is part of the key because tokens may be added to a tokenizer."""
    return TextEncoder(tokenizer, template=template, allow_special_tokens=allow_special_tokens)


def truncate_left(ids, max_tokens, bos_token_id=None):
    """The last max_tokens ids; a BOS at the beginning keeps its place."""
    if len(ids) <= max_tokens:
        return ids
    if max_tokens > 1 and bos_token_id is not None and ids[0] == bos_token_id:
        return [bos_token_id, *ids[len(ids) - max_tokens + 1 :]]
    return ids[len(ids) - max_tokens :]


def stop_strings(style=HUMAN_ASSISTANT):
    """Strings that begin the next human turn; none for a chat template, whose turns end with a token of their own."""
    _check_style(style)
    # A model trained on one of the two formats with marks has often seen the other one too.
    return () if style in (BARE, CHAT_TEMPLATE) else ("\n\nHuman:", "\nHuman:", " Human:")


def cut_at_next_human(text, style=HUMAN_ASSISTANT):
    """The text up to where the next human turn begins; all of it if none begins."""
    starts = [start for start in map(text.find, stop_strings(style)) if start >= 0]
    return text[: min(starts)] if starts else text


def end_of_turn_id(tokenizer):
    """Id of the special token with which the tokenizer's chat template closes an assistant turn, or None."""
    if not has_own_template(tokenizer):
        return None
    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    closing = render(turns, tokenizer)[0].rpartition(answer)[2]
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    special = special_token_ids(tokenizer)
    return next((i for i in ids if i in special), None)


def end_ids(tokenizer, by_template):
    """Ids of the tokens that end an answer in training: EOS, and what closes a turn of the chat template."""
    return {tokenizer.eos_token_id, end_of_turn_id(tokenizer) if by_template else None} - {None}


def _check_style(style):
    if style not in FORMATS:
        raise ValueError(f"unknown prompt format {style!r}: choose one of {', '.join(FORMATS)}")


def _check_turns(turns):
    roles = [turn["role"] for turn in turns]
    if not roles or roles[-1] not in ("user", "tool"):
        raise ValueError("a prompt must end in a user turn")
    for role, following in pairwise(roles):
        if role == following != "tool":
            raise ValueError(f"turns must alternate, but two {role} turns follow each other")
    unknown = set(roles) - {"user", "assistant", "tool", *_SYSTEM_ROLES}
    if unknown:
        raise ValueError(f"unknown role {min(unknown)!r}: a turn is of the user or of the assistant")


def _check_has_template(tokenizer):
    if tokenizer is None or not has_own_template(tokenizer):
        raise ValueError(
            "the tokenizer has no chat template of its own: use the prompt format human_assistant or hh, or name a "
            "template, as in --chat_template chatml"
        )


# ---------------------------------------------------------------- the format that goes with a model

# Entries of tokenizer_config.json.
_KEY, _OWN_TEMPLATE, _SINGLE = "prompt_format", "own_chat_template", "single_questions"


def remembered(tokenizer):
    """The format that a tokenizer's model was trained on, or None where its tokenizer does not say."""
    found = tokenizer.init_kwargs.get(_KEY)
    return found if found in FORMATS else None


def asks_alone(tokenizer):
    """Whether a tokenizer's model was trained on single questions, so that it is to see no earlier turns."""
    return remembered(tokenizer) == BARE or bool(tokenizer.init_kwargs.get(_SINGLE))


def remember(tokenizer, style, single_questions=False):
    """Note the format with which a model is trained, so that it is saved with it, and the template that servers use.

    Args:
        single_questions: its rows hold one question each, whatever the format could write.

    A template of the model's own that is not the format of its training is set aside in the tokenizer's configuration;
    ``own_template`` brings it back.
    """
    _check_style(style)
    tokenizer.init_kwargs[_KEY] = style
    tokenizer.init_kwargs.pop(_SINGLE, None)
    if single_questions:
        tokenizer.init_kwargs[_SINGLE] = True
    if style == CHAT_TEMPLATE:
        tokenizer.init_kwargs.pop(_OWN_TEMPLATE, None)
        return
    if has_own_template(tokenizer):
        tokenizer.init_kwargs[_OWN_TEMPLATE] = tokenizer.get_chat_template()
    tokenizer.chat_template = _carried(tokenizer, style)


def noted(tokenizer):
    """What ``remember`` was told, as {"style", "single_questions"}; None before."""
    style = remembered(tokenizer)
    return style and {"style": style, "single_questions": bool(tokenizer.init_kwargs.get(_SINGLE))}


def own_template(tokenizer):
    """The chat template that a tokenizer's model came with: in use, or set aside by ``remember``; None for none."""
    return tokenizer.get_chat_template() if has_own_template(tokenizer) else tokenizer.init_kwargs.get(_OWN_TEMPLATE)


def has_own_template(tokenizer):
    """Whether the tokenizer has a chat template that training did not write down for it."""
    return bool(tokenizer.chat_template) and not str(tokenizer.chat_template).startswith(_CARRIED)


def written_style(text):
    """How the text of a training row was written: HUMAN_ASSISTANT, HH or BARE."""
    for style in (HH, HUMAN_ASSISTANT):
        if all(mark in text for mark in _MARKS[style].values()):
            return style
    return BARE


# A template that writes one of the formats with marks, for servers.
_CARRIED = "{#- The text that the model was trained on, for servers. -#}"  # how such a template is known
_REFUSE = "{{- raise_exception('%s') -}}"
_ONLY_ALTERNATING = (
    "{%- for turn in turns -%}{%- if turn['role'] != ['user', 'assistant'][loop.index0 % 2] -%}"
    + _REFUSE % "user and assistant must take turns, the user first"
    + "{%- endif -%}{%- endfor -%}"
)
_NO_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}" + _REFUSE % "trained without system messages" + "{%- endif -%}"
)
# As in data of conversations: before the first question, after one blank or an empty line.
_SYSTEM_FIRST = (
    "{%%- set turns = messages -%%}{%%- if messages[0]['role'] == 'system' -%%}{%%- set turns = messages[1:] -%%}"
    "{{- %s + messages[0]['content'] | trim -}}{%%- endif -%%}"
)
_ONE_TURN = "{%- if messages | length > 1 -%}" + _REFUSE % "trained on single prompts" + "{%- endif -%}"


def _carried(tokenizer, style):
    """A chat template whose ids are those of ``encode_prompt(format_prompt(...))``, BOS included."""
    begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = "{{- bos_token -}}" if begins_with_bos else ""
    if style == BARE:
        return _CARRIED + _NO_SYSTEM + _ONE_TURN + bos + "{{- messages[0]['content'].rstrip() -}}"
    marks = {role: json.dumps(mark) for role, mark in _MARKS[style].items()}
    body = bos + _SYSTEM_FIRST % ("' '" if style == HUMAN_ASSISTANT else '"\\n\\n"')
    body += _ONLY_ALTERNATING + "{%- for turn in turns -%}{{- "
    body += f"({marks['user']} if turn['role'] == 'user' else {marks['assistant']}) + ' ' + turn['content'] | trim"
    body += " -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- " + marks["assistant"] + " -}}{%- endif -%}"
    return _CARRIED + body
