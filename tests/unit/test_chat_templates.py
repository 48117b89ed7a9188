"""What chat templates can write, forms to train with, templates by name; over stand-ins of the published ones."""

import json

import pytest
from chat_template_samples import SAMPLES, SPECIAL_TOKENS, sample
from helpers import make_tokenizer

from utils.data.chat_templates import (
    abilities,
    marks_answers,
    missing_tokens,
    named_template,
    render_template,
    rewrites_turns,
    template_names,
    training_form,
)
from utils.data.errors import DataError
from utils.data.text_encoder import TextEncoder

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION, OTHER_QUESTION = {"role": "user", "content": "Why?"}, {"role": "user", "content": "And then?"}
ANSWER, OTHER_ANSWER = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "Nothing."}
THOUGHT, OTHER_THOUGHT = ANSWER | {"reasoning_content": "hm"}, OTHER_ANSWER | {"reasoning_content": "well"}
FUNCTION = {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLS = [{"id": "call00001", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}
RESULT = {"role": "tool", "content": "12:00", "tool_call_id": "call00001", "name": "clock"}

# What each template writes besides questions and answers.
ABLE = {
    "smollm2": "system developer tool",
    "qwen2.5": "system tool tools tool_calls calls_with_text",
    "qwen3": "system tool tools tool_calls calls_with_text reasoning",
    "qwen3_instruct_2507": "system tool tools tool_calls calls_with_text",
    "qwen3_thinking_2507": "system tool tools tool_calls calls_with_text reasoning",
    "phi3_mini": "system",
    "phi3_small": "system developer tool",
    "phi3.5": "system",
    "mistral_v0.2": "",
    "mistral_v0.2_system": "system",
    "mistral_v0.3": "system tool tools tool_calls call_ids",
    "mistral_nemo": "system tool tools tool_calls call_ids",
    "gemma2": "",
    "gemma3": "system parts",
    "llama2": "system",
    "llama3": "system developer tool",
    "llama3.1": "system developer tool tools tool_calls",
    "zephyr": "system",
}
REWRITING = ("qwen3", "qwen3_thinking_2507", "mistral_v0.3", "mistral_nemo")
WITH_FORM = (*REWRITING, "phi3_mini", "phi3_small", "phi3.5")


@pytest.fixture(autouse=True)
def known_to_end(monkeypatch, request):
    """The stand-ins come to an end; a child process to try each of them takes a second."""
    if "without_an_end" not in request.node.name:
        monkeypatch.setattr("utils.data.chat_templates.check_template_ends", lambda *_: None)


def write(name, messages, tools=None, prompt=False):
    return render_template(sample(name), SPECIAL_TOKENS[name], messages, tools, prompt)[0]


def write_form(name, messages, tools=None, prompt=False):
    form = training_form(sample(name), SPECIAL_TOKENS[name])
    return render_template(form, SPECIAL_TOKENS[name], messages, tools, prompt)


def answers(name, messages, tools=None):
    text, spans = write_form(name, messages, tools)
    return [text[start:end] for start, end in spans]


# ---------------------------------------------------------------- abilities


@pytest.mark.parametrize("name", SAMPLES)
def test_abilities(name):
    able = abilities(sample(name), SPECIAL_TOKENS[name])
    found = [ability for ability in vars(able) if getattr(able, ability) is True]
    assert sorted(found) == sorted(ABLE[name].split())
    assert set(able.refusals) == set(vars(able)) - {"refusals", *found}  # a reason for each that is missing


def test_reasons_tell_refused_from_left_out():
    gemma, phi = (abilities(sample(name), SPECIAL_TOKENS[name]).refusals for name in ("gemma2", "phi3_mini"))
    assert "System role not supported" in gemma["system"] and "leaves them out" in phi["tool"]


def test_null_content_is_no_text():
    template = "{% for m in messages %}{{ m.content }} {{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    able = abilities(template, {})
    assert not able.tool_calls and "None" in able.refusals["tool_calls"]
    assert able.calls_with_text
    assert not able.parts and "list itself" in able.refusals["parts"]


# ---------------------------------------------------------------- rewritten turns


@pytest.mark.parametrize("name", SAMPLES)
def test_which_templates_rewrite_turns_and_which_have_a_form(name):
    assert rewrites_turns(sample(name), SPECIAL_TOKENS[name]) == (name in REWRITING)
    form = training_form(sample(name), SPECIAL_TOKENS[name])
    assert (form is not None) == (name in WITH_FORM)
    assert form is None or marks_answers(form)


def test_an_answer_that_does_not_follow_its_prompt_is_rewritten():
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}(think){% endif %}"
    assert rewrites_turns(template, {}) and training_form(template, {}) is None


def test_a_template_with_markers_is_left_as_it_is():
    marked = sample("qwen3").replace("{{- calls_of(", "{% generation %}{% endgeneration %}{{- calls_of(")
    assert rewrites_turns(marked, SPECIAL_TOKENS["qwen3"]) and training_form(marked, SPECIAL_TOKENS["qwen3"]) is None


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("qwen3", "\\n</think>\\n\\n", "\\n</think>\\n"),
        ("qwen3", "has_system = messages[0].role == 'system'", "has_system = false"),
        ("phi3_mini", "<|end|>\\n'", "<|end|>'"),
        ("mistral_nemo", "messages[0].content ~ '\\n\\n'", "messages[0].content ~ '\\n'"),
        ("mistral_v0.3", "[TOOL_RESULTS] ", "[TOOL_RESULTS]"),
    ],
)
def test_a_template_that_differs_a_little_gets_no_form(name, old, new):
    changed = sample(name).replace(old, new)
    assert changed != sample(name) and training_form(changed, SPECIAL_TOKENS[name]) is None


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("name", WITH_FORM)
@pytest.mark.parametrize("answer", [ANSWER, THOUGHT, CALL, ANSWER | {"content": " <think>\na\n</think>\n\nb\n"}])
def test_a_form_writes_one_answer_as_the_model_does(name, answer):
    tools = TOOLS if "tools" in ABLE[name].split() else None
    if answer is CALL and tools is None:
        return
    for before in ([QUESTION], [SYSTEM, QUESTION]):
        prompt = write(name, before, tools, prompt=True)
        assert write_form(name, before, tools, prompt=True)[0] == prompt
        text = write_form(name, [*before, answer], tools)[0]
        assert text.startswith(prompt)
        if not (name.startswith("mistral") and before[0] is SYSTEM):  # those drop the system prompt once answered
            own = write(name, [*before, answer], tools)
            assert text.rstrip() == own.rstrip().removesuffix("<|endoftext|>" * name.startswith("phi3")).rstrip()


@pytest.mark.parametrize("name", WITH_FORM)
def test_a_form_begins_with_each_of_its_parts(name):
    able = ABLE[name].split()
    conversations = [([SYSTEM, QUESTION, THOUGHT, OTHER_QUESTION, OTHER_ANSWER, QUESTION, OTHER_THOUGHT], None)]
    if "tools" in able:
        conversations.append(([SYSTEM, QUESTION, CALL, RESULT, ANSWER, OTHER_QUESTION, OTHER_THOUGHT], TOOLS))
    for messages, tools in conversations:
        whole, spans = write_form(name, messages, tools)
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(spans) == len(said)
        for i, (start, end) in zip(said, spans, strict=True):
            assert whole[:start] == write_form(name, messages[:i], tools, prompt=True)[0]
            assert whole[:end] == write_form(name, messages[: i + 1], tools)[0].rstrip()


def test_what_is_learned_of_qwen3():
    messages = [QUESTION, THOUGHT, OTHER_QUESTION, CALL, RESULT, OTHER_ANSWER]
    call = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
    learned = [
        "<think>\nhm\n</think>\n\nBecause.<|im_end|>",
        f"<think>\n\n</think>\n\n{call}<|im_end|>",
        "<think>\n\n</think>\n\nNothing.<|im_end|>",
    ]
    assert answers("qwen3", messages, TOOLS) == learned
    # There the prompt has opened the block.
    assert answers("qwen3_thinking_2507", messages, TOOLS) == [text.removeprefix("<think>\n") for text in learned]


def test_what_is_learned_of_phi3_and_mistral():
    messages = [SYSTEM, QUESTION, ANSWER, OTHER_QUESTION, OTHER_ANSWER]
    assert answers("phi3.5", messages) == ["Because.<|end|>", "Nothing.<|end|>"]
    assert answers("mistral_v0.3", messages) == [" Because.</s>", " Nothing.</s>"]
    assert answers("mistral_nemo", messages) == ["Because.</s>", "Nothing.</s>"]
    calls = '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "UTC"}, "id": "call00001"}]</s>'
    assert answers("mistral_v0.3", [QUESTION, CALL, RESULT, ANSWER], TOOLS) == [calls, " Because.</s>"]


def test_mistral_keeps_system_and_tools_in_the_first_question():
    text = write_form("mistral_nemo", [SYSTEM, QUESTION, ANSWER, OTHER_QUESTION, OTHER_ANSWER], TOOLS)[0]
    first, second = text.split("Because.")
    assert first.startswith("<s>[AVAILABLE_TOOLS][{") and first.endswith("[INST]Be brief.\n\nWhy?[/INST]")
    assert second == "</s>[INST]And then?[/INST]Nothing.</s>"


@pytest.mark.parametrize("name", ["qwen3", "phi3.5", "mistral_v0.3"])
def test_the_tokens_that_are_learned_are_the_answers(name, tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_special_tokens(SPECIAL_TOKENS[name])
    marks = ["<|im_start|>", "<think>", "</think>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]"]
    tokenizer.add_tokens(marks)
    messages = [QUESTION, THOUGHT if name == "qwen3" else ANSWER, OTHER_QUESTION, OTHER_ANSWER, QUESTION]
    text, spans = write_form(name, messages)
    encoded = TextEncoder(tokenizer, template=True).encode([text])[0]
    tokens = [encoded.ids[encoded.token_at(start) : encoded.token_at(end)] for start, end in spans]
    assert [tokenizer.decode(ids) for ids in tokens] == answers(name, messages)


# ---------------------------------------------------------------- by name

PUBLISHED = {"gemma": "gemma2", "llama3": "llama3", "phi3": "phi3_mini", "qwen3": "qwen3", "zephyr": "zephyr"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_writes_the_published_format(name):
    template, special = named_template(name), SPECIAL_TOKENS[PUBLISHED[name]]
    able = abilities(template, special)
    conversations = [[QUESTION], [QUESTION, ANSWER], [QUESTION, {"role": "assistant", "content": " b \n"}]]
    conversations += [[QUESTION, ANSWER, OTHER_QUESTION], [QUESTION, THOUGHT, OTHER_QUESTION, OTHER_THOUGHT]]
    if able.system:
        conversations += [[SYSTEM, *turns] for turns in conversations]
    if able.tools:
        conversations += [[QUESTION, CALL, RESULT, RESULT, THOUGHT, OTHER_QUESTION], [QUESTION, THOUGHT | CALL]]
    for turns in conversations:
        for tools in [None, TOOLS] if able.tools else [None]:
            for prompt in (False, True):
                want = write(PUBLISHED[name], turns, tools, prompt)
                assert render_template(template, special, turns, tools, prompt)[0] == want


def test_mistral_and_chatml_by_name():
    def text(name, messages, tools=None, prompt=False):
        return render_template(named_template(name), SPECIAL_TOKENS["mistral_v0.3"], messages, tools, prompt)[0]

    for turns in ([QUESTION], [SYSTEM, QUESTION]):
        assert text("mistral", turns, TOOLS, prompt=True) == write("mistral_v0.3", turns, TOOLS, prompt=True)
    for turns in ([QUESTION, CALL, RESULT, ANSWER], [QUESTION, ANSWER, OTHER_QUESTION, OTHER_ANSWER]):
        assert text("mistral", turns) == write("mistral_v0.3", turns)
    want = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
    assert text("chatml", [QUESTION, ANSWER]) == want
    assert text("chatml", [QUESTION, ANSWER], prompt=True) == want + "<|im_start|>assistant\n"
    for name in ("mistral", "chatml"):
        assert not rewrites_turns(named_template(name), SPECIAL_TOKENS["mistral_v0.3"])


def test_names_and_files(tmp_path):
    assert template_names() == ["chatml", "gemma", "llama3", "mistral", "phi3", "qwen3", "zephyr"]
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": several}))
    assert named_template(str(tmp_path / "own.jinja")) == "{{ messages }}"
    assert named_template(str(tmp_path / "tokenizer_config.json")) == "{{ 1 }}"
    assert named_template(str(tmp_path / "chat_template.json")) == "d"


def test_what_is_no_template(tmp_path):
    (tmp_path / "empty.jinja").write_text(" \n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "image.jinja").write_bytes(b"\xff\xfe\x00")
    wrong = {"lama3": "did you mean llama3", "nothing/like/it": "The names are chatml, gemma", str(tmp_path): "folder"}
    wrong |= {str(tmp_path / "empty.jinja"): "empty", str(tmp_path / "list.json"): '"chat_template"'}
    wrong |= {str(tmp_path / "broken.json"): "not valid JSON", str(tmp_path / "image.jinja"): "as text"}
    for text, message in wrong.items():
        with pytest.raises(DataError, match=message):
            named_template(text)


def test_tokens_that_a_tokenizer_lacks(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert missing_tokens(named_template("chatml"), tokenizer) == ["<|im_start|>", "<|im_end|>"]
    assert missing_tokens(named_template("gemma"), tokenizer) == ["<start_of_turn>", "<end_of_turn>"]
    # Plain characters around turns that end with EOS, as the model was published.
    assert (
        missing_tokens(named_template("zephyr"), tokenizer)
        == missing_tokens(named_template("mistral"), tokenizer)
        == []
    )
    tokenizer.add_tokens(["[INST]"])
    assert missing_tokens(named_template("mistral"), tokenizer) == ["[/INST]"]
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert missing_tokens(named_template("chatml"), tokenizer) == ["<|im_start|>"]


# ---------------------------------------------------------------- strangers' templates

_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        _LOOPS,
        "{% if tools %}" + _LOOPS + "{% endif %}",
        "{% for m in messages %}{% if m.reasoning_content %}" + _LOOPS + "{% endif %}{% endfor %}",
    ],
    ids=["always", "with tools", "with reasoning"],
)
def test_a_template_without_an_end_is_refused(template, monkeypatch):
    monkeypatch.setattr("utils.data.chat_template_guard.CPU_SECONDS", 1)
    for asked in (abilities, rewrites_turns, training_form):
        with pytest.raises(ValueError, match="does not come to an end"):
            asked(template, {})
    with pytest.raises(ValueError, match="does not come to an end"):
        render_template(template, {}, [QUESTION])


def test_a_template_that_refuses_everything():
    template = "{{ raise_exception('no') }}"
    able = abilities(template, {})
    assert set(able.refusals.values()) == {"the tokenizer's chat template refuses the conversation: no"}
    assert not rewrites_turns(template, {}) and training_form(template, {}) is None
    with pytest.raises(ValueError, match="refuses the conversation: no"):
        render_template(template, {}, [QUESTION])
