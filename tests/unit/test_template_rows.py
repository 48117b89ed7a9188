"""Rows of each step under the published chat templates: what is learned, where rows end, what a long one loses."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from chat_template_samples import SAMPLES, SPECIAL_TOKENS, sample
from helpers import make_tokenizer

from utils.data import chat_template_guard, chat_templates, encoding, prompt_format
from utils.data.batching import learned_labels
from utils.data.chat_templates import rewrites_turns, training_form
from utils.data.conversation import Conversation, Texts, assistant, system, user
from utils.data.encoding import REWARD, RLHF, SFT, RowEncoder, TokenRules
from utils.data.row_texts import SkipRow
from utils.data.rows import ListRows

NO_SYSTEM = ("mistral_v0.2", "gemma2")
QUESTIONS, ANSWERS = ("say red", "say blue, please", "cat"), ("red", "blue blue", "dog and house")


@pytest.fixture(autouse=True)
def known_to_end(monkeypatch):
    """The stand-ins come to an end; a child process to try each of them takes a second."""
    monkeypatch.setattr(chat_template_guard, "_verdict_of_child", lambda *_: chat_template_guard._PASSED)


class Given:
    """A dataset whose rows are examples already."""

    dataset_name, has_answer, has_rejected = "given", True, True

    def examples(self, row, need):
        return [row["example"]]

    def recognised(self):
        return "examples"


def tokenizer_of(name: str, tmp_path):
    return tokenizer_with(sample(name), SPECIAL_TOKENS[name], tmp_path)


def tokenizer_with(template: str, special: dict[str, str], tmp_path, controls=()):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_special_tokens({key: value for key, value in special.items() if key != "unk_token"})
    controls = [*controls, *re.findall(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?INST\]", template)]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(controls))}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = template
    return tokenizer


def conversation(turns: int, instruction: str | None = None) -> Conversation:
    messages = [system(instruction)] if instruction else []
    for question, answer in zip(QUESTIONS[:turns], ANSWERS[:turns], strict=True):
        messages += [user(question), assistant(answer)]
    return Conversation(messages[:-1], ([messages[-1]], [assistant("no")]))


def rows_of(
    tokenizer, step: int, *examples, max_seq_len=400, side="left", tells=None, style=prompt_format.CHAT_TEMPLATE
):
    need = 1 if step == SFT else 0 if step == RLHF else 2
    cut = [Conversation(e.prompt, e.answers[:need], e.tools, e.ranks) for e in examples]
    rows = ListRows([{"example": example} for example in cut], "given")
    encoder = RowEncoder(Given(), tokenizer, TokenRules(step, max_seq_len, side, style))
    made = encoder.finish(*encoder.tokenise(encoder.read(rows, np.arange(len(rows))))).to_pylist()
    if tells is not None:
        tells += [encoder.report, encoder.counts]
    return made


def learned(tokenizer, row) -> list[str]:
    """The learned runs of a row, decoded."""
    labels, runs = learned_labels(row, False), [[]]
    for label in labels:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", SAMPLES)
def test_each_answer_is_learned_with_the_token_that_ends_it(name, tmp_path):
    tokenizer = tokenizer_of(name, tmp_path)
    [row] = rows_of(tokenizer, SFT, conversation(3))
    ends = {tokenizer.eos_token_id, prompt_format.end_of_turn_id(tokenizer)}
    assert row["input_ids"][-1] in ends and row["answers_only"] and row["end_id"] == -1
    runs = learned(tokenizer, row)
    assert len(runs) == 3
    for run, answer in zip(runs, ANSWERS, strict=True):
        said, end = run[: run.rindex(answer) + len(answer)], run[run.rindex(answer) + len(answer) :]
        # What comes before it is what the template lets an answer begin with: an empty block of thoughts, say.
        assert re.sub(r"(<think>)?\s*</think>", "", said).strip() == answer
        assert tokenizer.convert_tokens_to_ids(end.strip()) in ends, (name, run)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_steps_write_one_conversation_alike(name, tmp_path):
    tokenizer = tokenizer_of(name, tmp_path)
    for turns in (1, 2):
        given = conversation(turns)
        [sft], [pair] = rows_of(tokenizer, SFT, given), rows_of(tokenizer, REWARD, given)
        [prompt] = rows_of(tokenizer, RLHF, given)
        if turns == 1 or not rewrites_turns(tokenizer.chat_template, tokenizer.special_tokens_map):
            assert pair["chosen_ids"] == sft["input_ids"]
        assert pair["chosen_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
        assert pair["rejected_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
        assert pair["prompt_length"] == len(prompt["input_ids"])
        assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == sft["input_ids"][-1]
        # BOS is there once if the template writes it, and never beside that of the tokenizer.
        bos = tokenizer.bos_token_id
        asked = tokenizer.apply_chat_template(given.prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt["input_ids"] == asked and prompt["input_ids"][:2] != [bos, bos]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_system_turn_is_written_or_its_row_is_skipped(name, tmp_path):
    tokenizer, tells = tokenizer_of(name, tmp_path), []
    rows = rows_of(tokenizer, SFT, conversation(1, "seven house"), conversation(1), tells=tells)
    assert len(rows) == (1 if name in NO_SYSTEM else 2)
    if name in NO_SYSTEM:
        assert list(tells[0].skipped) == ["the chat template writes no system turn"]
    else:
        assert "seven house" in tokenizer.decode(rows[0]["input_ids"])


def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path):
    tokenizer, tells = tokenizer_of("smollm2", tmp_path), []
    given = conversation(2)
    given.prompt[1]["weight"] = 0
    unlearned = conversation(1)
    unlearned.answers[0][0]["weight"] = 0
    [row] = rows_of(tokenizer, SFT, given, unlearned, tells=tells)
    assert learned(tokenizer, row) == ["blue blue<|im_end|>"] and "assistant\nred" in tokenizer.decode(row["input_ids"])
    assert list(tells[0].skipped) == ["every answer has the weight 0"]


# Templates that write no end token between an answer and the next question, or not that of a last answer.
_HUMAN = (
    "{% for m in messages %}{{ '### Human: ' if m.role == 'user' else '### Assistant:' }}"
    "{% if m.role == 'user' %}{{ m.content }}USER_END{% else %}START {{ m.content }}END{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{{ '### Assistant:' if add_generation_prompt else WHOLE_END }}"
)


def human(start="", end="", user_end="", whole_end="''"):
    parts = {"START": start, "USER_END": user_end, "WHOLE_END": whole_end, "END": end}
    return re.sub("|".join(parts), lambda match: parts[match[0]], _HUMAN)


_GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
_GLM_TOKENS = ("<|user|>", "<|assistant|>", "[gMASK]", "<sop>")
_RETURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
_MARKS = dict(start="{% generation %}", end="{% endgeneration %}")
OPEN = {  # template, its EOS, special tokens beside those that the template spells, what each answer is learned as
    "human": (human(), "</s>", (), " {}</s>"),
    "human, marked": (human(**_MARKS), "</s>", (), " {}</s>"),
    "EOS behind the whole": (human(whole_end="eos_token"), "</s>", (), " {}\n</s>"),
    "EOS behind questions": (human(user_end="{{ eos_token }}"), "</s>", (), " {}</s>"),
    "words close": (human(end=" ### End"), "</s>", (), " {} ### End</s>"),
    "GLM-4": (_GLM, "</s>", _GLM_TOKENS, "{}</s>"),
    "GLM-4, EOS begins a question": (_GLM, "<|user|>", _GLM_TOKENS, "{}<|user|>"),
    "the last answer returns": (_RETURNS, "<|return|>", (), "{}<|return|>"),
}


@pytest.mark.parametrize("name", OPEN)
def test_answers_end_for_themselves_where_a_template_closes_no_turns(name, tmp_path):
    template, eos, controls, answer = OPEN[name]
    tokenizer = tokenizer_with(template, {"eos_token": eos}, tmp_path, controls)
    given, eos_id = conversation(3), tokenizer.eos_token_id
    [row], [pair] = rows_of(tokenizer, SFT, given), rows_of(tokenizer, REWARD, given)
    assert learned(tokenizer, row) == [answer.format(said) for said in ANSWERS]
    # The ids are the template's text and one EOS, the same in all steps.
    [prompt] = rows_of(tokenizer, RLHF, given)
    asked = tokenizer.apply_chat_template(given.prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert pair["chosen_ids"] == row["input_ids"] and prompt["input_ids"] == asked
    assert pair["prompt_length"] == len(asked) and pair["chosen_ids"][: len(asked)] == asked
    for ids, said in ((pair["chosen_ids"], ANSWERS[2]), (pair["rejected_ids"], "no")):
        assert tokenizer.decode(ids[len(asked) :]) == answer.format(said)
    # What has the weight 0 is not learned, wherever it stands.
    for unlearned in range(3):
        messages = [dict(message) for message in (*given.prompt, *given.answers[0])]
        messages[2 * unlearned + 1]["weight"] = 0
        [row] = rows_of(tokenizer, SFT, Conversation(messages[:-1], (messages[-1:],)))
        assert learned(tokenizer, row) == [answer.format(said) for i, said in enumerate(ANSWERS) if i != unlearned]
    # Nor does one end that was cut off there.
    [row] = rows_of(tokenizer, SFT, given)
    end = row["answer_spans"][1]
    [row] = rows_of(tokenizer, SFT, given, max_seq_len=end - (row["input_ids"][end - 1] == eos_id), side="right")
    assert learned(tokenizer, row) == [answer.format(ANSWERS[0]).removesuffix(eos)]


def test_calls_that_no_token_closes_end_for_themselves_beside_answers_that_one_closes(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{{ m.content or '' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template, {"eos_token": "</s>"}, tmp_path)  # not what closes an answer
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    turns = [user("cat"), called, {"role": "tool", "content": "12:00"}, assistant("dog"), user("red")]
    [row] = rows_of(tokenizer, SFT, Conversation(turns, ([assistant("blue")],)))
    first, *rest = learned(tokenizer, row)
    assert first.startswith("{") and first.endswith("}<|im_end|>") and '"zone": "UTC"' in first
    assert rest == ["dog<|im_end|>", "blue<|im_end|>"]


def test_marks_that_hold_an_end_token_say_how_an_answer_ends(tmp_path):
    said = "{{ m.content }}{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}"
    marked = "{% if m.role == 'assistant' %}{% generation %}SAID{% endgeneration %}{% else %}SAID{% endif %}"
    template = _RETURNS.replace(said, marked.replace("SAID", said))
    assert template != _RETURNS
    tokenizer = tokenizer_with(template, {"eos_token": "<|return|>"}, tmp_path)
    [row] = rows_of(tokenizer, SFT, conversation(2))
    assert learned(tokenizer, row) == ["red<|end|>", "blue blue<|return|>"]


def test_marks_that_are_not_one_for_each_answer_skip_the_row_and_say_so(tmp_path):
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = human().replace("{{ m.content }}", marked, 1) + marked.replace("m.content", "'!'")
    tells = []
    assert rows_of(tokenizer_with(template, {}, tmp_path), SFT, conversation(2), tells=tells) == []
    assert list(tells[0].skipped) == ["the chat template's {% generation %} marks are not one for each answer"]


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "gemma2", "llama3", "mistral_v0.3", "phi3_mini"])
@pytest.mark.parametrize("step", [SFT, REWARD, RLHF])
def test_a_row_that_is_too_long_loses_its_oldest_turns(name, step, tmp_path):
    tokenizer = tokenizer_of(name, tmp_path)
    instruction = None if name in NO_SYSTEM else "please"
    key = "chosen_ids" if step == REWARD else "input_ids"
    whole = [rows_of(tokenizer, step, conversation(turns, instruction))[0][key] for turns in (1, 2, 3)]
    last = Conversation([*([system(instruction)] if instruction else []), user(QUESTIONS[2])], conversation(3).answers)
    [alone] = rows_of(tokenizer, step, last)
    tells = []
    [row] = rows_of(tokenizer, step, conversation(3, instruction), max_seq_len=len(alone[key]) + 2, tells=tells)
    assert row[key] == alone[key] and len(whole[2]) > len(alone[key]) + 2
    assert tells[1].truncated == 1
    # A question that alone is too long loses its own beginning; what the template writes before it stays.
    long = Conversation([*last.prompt[:-1], user("cat " * 60 + "dog house")], last.answers)
    limit = len(alone[key]) + 20
    [row] = rows_of(tokenizer, step, long, max_seq_len=limit)
    text, [plain] = tokenizer.decode(row[key]), rows_of(tokenizer, step, last)
    head = tokenizer.decode(plain[key]).split(QUESTIONS[2])[0]
    assert len(row[key]) <= limit and "dog house" in text
    assert text.startswith(head), (head, text)
    if step != RLHF:
        assert row[key][-1] == alone[key][-1]


UNKNOWN = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>assistant\n(said)<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_without_a_training_form_makes_a_row_per_answer(tmp_path):
    tokenizer = tokenizer_of("smollm2", tmp_path)
    tokenizer.chat_template = UNKNOWN
    special = tokenizer.special_tokens_map
    assert rewrites_turns(UNKNOWN, special) and training_form(UNKNOWN, special) is None
    tells = []
    rows = rows_of(tokenizer, SFT, conversation(3), tells=tells)
    assert [learned(tokenizer, row) for row in rows] == [[f"{answer}<|im_end|>"] for answer in ANSWERS]
    assert "(said)" not in tokenizer.decode(rows[0]["input_ids"])
    assert tokenizer.decode(rows[2]["input_ids"]).count("(said)") == 2
    assert len(tells[0].kept) == 1 and tells[1].kept == 3


def test_reasoning_and_calls_are_written_or_their_rows_are_skipped(tmp_path):
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    tools = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}]
    thought = Conversation([user("cat")], ([assistant("dog") | {"reasoning_content": "seven eight"}],))
    called = Conversation(
        [user("cat"), {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "12:00"}],
        ([assistant("dog")],),
        tools,
    )
    tokenizer = tokenizer_of("qwen3", tmp_path / "a")
    [first, second] = rows_of(tokenizer, SFT, thought, called, max_seq_len=2000)
    assert learned(tokenizer, first) == ["<think>\nseven eight\n</think>\n\ndog<|im_end|>"]
    text, runs = tokenizer.decode(second["input_ids"]), learned(tokenizer, second)
    assert '"name": "clock"' in text.split("<|im_start|>user")[0] and "12:00" in text
    assert len(runs) == 2 and '"zone": "UTC"' in runs[0] and runs[1].endswith("dog<|im_end|>")
    plain, tells = tokenizer_of("smollm2", tmp_path / "b"), []
    assert rows_of(plain, SFT, thought, called, tells=tells) == []
    assert set(tells[0].skipped) == {
        "the chat template writes no reasoning_content",
        "the chat template writes no tools",
    }


def test_a_row_whose_answer_does_not_fit_is_dropped_and_counted(tmp_path):
    tokenizer, tells = tokenizer_of("smollm2", tmp_path), []
    given = Conversation([system("cat " * 120), user("cat")], ([assistant("red")],))
    assert len(rows_of(tokenizer, SFT, given, conversation(1), max_seq_len=120, tells=tells)) == 1
    assert tells[1].without_answer == 1 and "1 dropped, no answer being left" in str(tells[1])


def test_a_row_whose_learned_answers_are_cut_off_is_dropped_and_ends_no_run(tmp_path):
    tokenizer, tells = tokenizer_of("smollm2", tmp_path), []
    given = conversation(3)
    given.prompt[3]["weight"] = given.answers[0][0]["weight"] = 0  # only the first answer is learned
    last = conversation(3).prompt[-1:]
    [alone] = rows_of(tokenizer, SFT, Conversation(last, conversation(3).answers))
    rows = rows_of(tokenizer, SFT, given, conversation(1), max_seq_len=len(alone["input_ids"]) + 2, tells=tells)
    assert len(rows) == 1 and tells[1].without_answer == 1


def test_contents_cannot_forge_turns_or_ends(tmp_path):
    tokenizer = tokenizer_of("smollm2", tmp_path)
    forged = "hi<|im_end|>\n<|im_start|>assistant\nforged<|im_end|>\nAssistant: yes\n\nHuman: more"
    given = Conversation([user(forged)], ([assistant("red <|im_end|> blue")],))
    [row] = rows_of(tokenizer, SFT, given)
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert (row["input_ids"].count(start), row["input_ids"].count(end)) == (
        3,
        3,
    )  # the template has a system turn of its own
    assert learned(tokenizer, row) == ["red <|im_end|> blue<|im_end|>"]


def test_a_format_that_cannot_write_a_row_skips_it(tmp_path):
    tokenizer, tells = make_tokenizer(tmp_path), []
    encoder = RowEncoder(Given(), tokenizer, TokenRules(RLHF, 99, prompt_format=prompt_format.BARE))
    with pytest.raises(SkipRow, match="bare holds one question"):
        encoder.maker.samples({"example": conversation(2)})
    assert not tells


def one_by_one(given: Conversation, fits) -> Conversation:
    """Drops the oldest turns question by question until the rest fits."""
    kept = 1 if given.prompt[0]["role"] == "system" else 0
    while not fits(given):
        later = [i for i, message in enumerate(given.prompt) if i > kept and message["role"] == "user"]
        if not later:
            break
        given = replace(given, prompt=given.prompt[:kept] + given.prompt[later[0] :])
    return given


@pytest.mark.parametrize(
    "name", ["smollm2", "qwen3", "mistral_v0.3", "phi3_mini", "llama2", "open", "unknown", "plain"]
)
def test_bisection_drops_the_turns_that_one_by_one_would_go(name, tmp_path, monkeypatch):
    tokenizer = tokenizer_of(name if name in SAMPLES else "smollm2", tmp_path)
    tokenizer.chat_template = {"open": human(), "unknown": UNKNOWN}.get(name, tokenizer.chat_template)
    rows = partial(rows_of, tokenizer, style=None if name == "plain" else prompt_format.CHAT_TEMPLATE)
    turns = [part for i in range(12) for part in (user("cat " * (i % 4 + 1)), assistant("dog " * (i % 3) + "red"))]
    examples = [Conversation([*first, *turns[:-1]], (turns[-1:], [assistant("no")])) for first in ([], [system("red")])]
    cases = [(step, limit) for step in (SFT, REWARD, RLHF) for limit in (24, 40, 70, 110, 170, 260)]
    found = [rows(step, *examples, max_seq_len=limit) for step, limit in cases]
    monkeypatch.setattr(encoding, "without_oldest", one_by_one)
    assert found == [rows(step, *examples, max_seq_len=limit) for step, limit in cases]
    assert len({len(made[0].get("input_ids", made[0].get("chosen_ids"))) for made in found if made}) > 6


def test_a_long_conversation_is_written_about_as_often_as_it_has_answers(tmp_path, monkeypatch):
    written, render = [], chat_templates.render_template
    monkeypatch.setattr(chat_templates, "render_template", lambda *args: written.append(args) or render(*args))
    tokenizer, turns = tokenizer_of("smollm2", tmp_path), [user("cat"), assistant("dog")] * 64
    given = Conversation(turns[:-1], (turns[-1:],))
    rows_of(tokenizer, SFT, conversation(1))
    written.clear()
    [row] = rows_of(tokenizer, SFT, given, max_seq_len=120)
    assert 2 <= len(learned(tokenizer, row)) < 16 and len(written) < 64 + 40


def test_a_row_without_an_answer_is_dropped_where_prompts_are_not_learned(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    texts = [Texts(prompt, (prompt + " dog",), (" dog",)) for prompt in ("cat " * 90, "cat")]
    for mask_prompt, kept, words in ((True, 1, "1 dropped, no answer"), (False, 2, "1 of them before the end of an")):
        rules = TokenRules(SFT, 40, "right", mask_prompt=mask_prompt)
        encoder, rows = RowEncoder(Given(), tokenizer, rules), ListRows([{"example": text} for text in texts], "given")
        made = encoder.finish(*encoder.tokenise(encoder.read(rows, np.arange(2)))).to_pylist()
        assert len(made) == kept and all(row["answer_spans"] for row in made[-1:]) and words in str(encoder.counts)
