"""The one place of the prompt format: training, chat and evaluation build their prompts here.

A conversation is a list of turns {"role": "user" | "assistant", "content": str}. Three styles write it as text:

    plain          " Human: q Assistant: a Human: q2 Assistant:"
    hh             "\\n\\nHuman: q\\n\\nAssistant: a\\n\\nHuman: q2\\n\\nAssistant:"   (as in Dahoas/rm-static)
    chat_template  whatever the tokenizer's own chat template makes of it

A model that was trained on text without a template of its own is saved with one that writes that text (the end of this
file), for servers that know nothing else. No style here ever uses that one.
"""

import json
import re
from functools import lru_cache
from itertools import pairwise

from utils.data.chat_templates import marks_answers, render_template
from utils.data.special_tokens import mark_spellings
from utils.data.text_encoder import TextEncoder

PLAIN, HH, CHAT_TEMPLATE = "plain", "hh", "chat_template"
STYLES = (PLAIN, HH, CHAT_TEMPLATE)

# What stands before a turn's content; the content itself follows after one blank.
_MARKS = {
    PLAIN: {"user": " Human:", "assistant": " Assistant:"},
    HH: {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"},
}
_ANY_MARK = re.compile(r"(?:^|\s+)(Human|Assistant):")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}


def format_prompt(turns, style=PLAIN, tokenizer=None):
    """Text of a conversation that ends where the assistant's next answer begins.

    Raises ValueError if the turns do not alternate or do not end in a user turn, if the style is unknown, or if
    "chat_template" is asked of a tokenizer without one, or of one that refuses these turns.
    """
    _check_style(style)
    _check_turns(turns)
    if style == CHAT_TEMPLATE:
        return render(turns, tokenizer, add_generation_prompt=True)[0]
    marks = _MARKS[style]
    text = "".join(f"{marks[turn['role']]} {turn['content'].strip()}" for turn in turns)
    return text + marks["assistant"]


def format_answer(text, style=PLAIN, tokenizer=None):
    """An answer as it follows its prompt: after exactly one blank, or with none in a chat template, where special
    tokens spelled in it are marked if its tokenizer is given."""
    _check_style(style)
    if style != CHAT_TEMPLATE:
        return " " + text.strip()
    return text.strip() if tokenizer is None else mark_spellings(text.strip(), tokenizer, "assistant")


def render(messages, tokenizer, add_generation_prompt=False):
    """A conversation as the tokenizer's chat template writes it.

    Returns:
        (text, [start, end) of what stands between its generation markers, in characters of the text). Special tokens
        that contents spell are marked in the text (special_tokens.py); ``unmarked`` takes the marks out for reading.

    Raises:
        ValueError: no template, or one that refuses these messages, fails at them or does not end.
    """
    _check_has_template(tokenizer)
    contents = [turn | {"content": mark_spellings(turn["content"], tokenizer, turn["role"])} for turn in messages]
    template, special = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    return render_template(template, special, contents, add_generation_prompt=add_generation_prompt)


def has_generation_markers(tokenizer):
    """Whether the chat template says itself what the assistant writes, by {% generation %}."""
    return marks_answers(tokenizer.get_chat_template())


def is_formatted(text):
    """Whether a prompt already carries the marks: it begins with "Human:" and waits after "Assistant:"."""
    return text.lstrip().startswith(("Human:", "Assistant:")) and text.rstrip().endswith("Assistant:")


def parse_turns(text):
    """Turns of a prompt text: of " Human: … Assistant:" those it names, of any other text one user turn."""
    if not is_formatted(text):
        return [{"role": "user", "content": text.strip()}]
    turns = []
    marks = list(_ANY_MARK.finditer(text))
    # The last mark is the "Assistant:" that waits for its answer.
    for mark, following in pairwise(marks):
        role, content = _ROLE_OF[mark.group(1)], text[mark.end() : following.start()]
        if turns and turns[-1]["role"] == role:
            # Two turns of one role in a row: the second mark is part of what was said.
            turns[-1]["content"] += f" {mark.group(1)}:{content}"
        else:
            turns.append({"role": role, "content": content})
    return [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]


def prompt_from_text(text, style=PLAIN, tokenizer=None):
    """Formatted prompt of a line of text.

    Text that already carries the marks (a row of rm-static, say) stays as it was written, since a model was trained on
    exactly that; only a chat template takes it apart and writes it anew.
    """
    _check_style(style)
    if is_formatted(text) and style != CHAT_TEMPLATE:
        return text
    return format_prompt(parse_turns(text), style, tokenizer)


def encode_prompt(text, tokenizer, style=PLAIN, allow_special_tokens=False):
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


def stop_strings(style=PLAIN):
    """Strings that begin the next human turn; none for a chat template, whose turns end with a token of their own."""
    _check_style(style)
    # A model trained on one of the two text formats has often seen the other one too.
    return () if style == CHAT_TEMPLATE else ("\n\nHuman:", "\nHuman:", " Human:")


def cut_at_next_human(text, style=PLAIN):
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
    return next((i for i in ids if i in tokenizer.all_special_ids), None)


def _check_style(style):
    if style not in STYLES:
        raise ValueError(f"unknown prompt style {style!r}: choose one of {', '.join(STYLES)}")


def _check_turns(turns):
    roles = [turn["role"] for turn in turns]
    if not roles or roles[-1] != "user":
        raise ValueError("a prompt must end in a user turn")
    for role, following in pairwise(roles):
        if role == following:
            raise ValueError(f"turns must alternate, but two {role} turns follow each other")
    unknown = set(roles) - {"user", "assistant"}
    if unknown:
        raise ValueError(f"unknown role {min(unknown)!r}: a turn is of the user or of the assistant")


def _check_has_template(tokenizer):
    if tokenizer is None or not has_own_template(tokenizer):
        raise ValueError("the tokenizer has no chat template of its own: use the prompt style plain or hh")


# ---------------------------------------------------------------- the template that a trained model carries

# How the rows were written that a model was trained on, beside PLAIN and HH.
BARE = "bare"  # the user's words as they stand, of one turn
TURNS = "turns"  # BOS words EOS for each turn

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
# As in data of conversations: before the first question, after one blank.
_SYSTEM_FIRST = (
    "{%- set turns = messages -%}{%- if messages[0]['role'] == 'system' -%}{%- set turns = messages[1:] -%}"
    "{{- ' ' + messages[0]['content'] | trim -}}{%- endif -%}"
)
_ONE_TURN = "{%- if messages | length > 1 -%}" + _REFUSE % "trained on single prompts" + "{%- endif -%}"


def has_own_template(tokenizer):
    """Whether the tokenizer has a chat template that training did not write down for it."""
    return bool(tokenizer.chat_template) and not str(tokenizer.chat_template).startswith(_CARRIED)


def written_style(text):
    """How the text of a training row was written: PLAIN, HH or BARE."""
    for style in (HH, PLAIN):
        if all(mark in text for mark in _MARKS[style].values()):
            return style
    return BARE


def carry_template(tokenizer, style):
    """Give a tokenizer without a chat template of its own one that writes the text its model is trained on.

    Its ids are those of ``encode_prompt(format_prompt(...))``, with BOS if the tokenizer puts one before a text.

    Args:
        style: PLAIN, HH, BARE or TURNS.
    """
    if has_own_template(tokenizer):
        return
    begins_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = "{{- bos_token -}}" if begins_with_bos else ""
    if style == TURNS:
        bos = "" if tokenizer.bos_token_id is None else "{{- bos_token -}}"
        turn = bos + "{{- turn['content'] -}}{{- eos_token -}}"
        body = "{%- for turn in messages -%}" + turn + "{%- endfor -%}{%- if add_generation_prompt -%}" + bos
        body += "{%- endif -%}"
    elif style == BARE:
        body = _NO_SYSTEM + _ONE_TURN + bos + "{{- messages[0]['content'] -}}"
    else:
        marks = {role: json.dumps(mark) for role, mark in _MARKS[style].items()}
        body = bos + (_SYSTEM_FIRST if style == PLAIN else _NO_SYSTEM + "{%- set turns = messages -%}")
        body += _ONLY_ALTERNATING + "{%- for turn in turns -%}{{- "
        body += f"({marks['user']} if turn['role'] == 'user' else {marks['assistant']}) + ' ' + turn['content'] | trim"
        body += " -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- " + marks["assistant"] + " -}}{%- endif -%}"
    tokenizer.chat_template = _CARRIED + body
