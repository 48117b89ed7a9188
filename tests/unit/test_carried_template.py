"""The chat template that a model trained on plain text is saved with: what servers send is what it was trained on."""

import json
from itertools import product

import pytest
from helpers import flags, make_tokenizer
from transformers import AutoTokenizer

from utils.data import prompt_format as pf
from utils.data.encoding import SFT
from utils.data.preparation import create_prompt_dataset, style_of_rows
from utils.process.errors import UserError

TURNS = [
    {"role": "user", "content": " say 'red' \n"},
    {"role": "assistant", "content": "red\n\n {{ 7 }}"},
    {"role": "user", "content": "thanks"},
]
STYLES = (pf.PLAIN, pf.HH, pf.BARE, pf.TURNS)


def served_ids(tokenizer, turns):
    """What a server makes of a conversation."""
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize(("style", "bos"), product((pf.PLAIN, pf.HH), ("<s>", None)))
def test_a_server_sends_the_ids_of_the_prompt_format(tmp_path, style, bos):
    tokenizer = make_tokenizer(tmp_path, bos=bos)
    pf.carry_template(tokenizer, style)
    for turns in (TURNS[:1], TURNS):
        expected = pf.encode_prompt(pf.format_prompt(turns, style), tokenizer, style)
        assert served_ids(tokenizer, turns) == expected
        assert (expected[0] == tokenizer.bos_token_id) == bool(bos)


def _rows(tmp_path, tokenizer, rows):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return create_prompt_dataset(-1, [str(file)], "1,0,0", str(tmp_path / "cache"), SFT, 1, tokenizer, 100)[0]


MARKED = {"prompt": " Human: say red Assistant:", "chosen": " red"}
PARAGRAPHS = {"prompt": "\n\nHuman: say red\n\nAssistant:", "chosen": " red"}
UNMARKED = {"prompt": "\n Say red.", "chosen": " red"}
CONVERSATION = {"messages": [{"role": "user", "content": "Say red. "}, {"role": "assistant", "content": "red"}]}


@pytest.mark.parametrize(
    ("row", "style", "question"),
    [
        (MARKED, pf.PLAIN, "say red"),
        (PARAGRAPHS, pf.HH, "say red"),
        (UNMARKED, pf.BARE, "\n Say red."),
        (CONVERSATION, pf.TURNS, "Say red. "),
    ],
)
def test_the_template_writes_the_rows_of_the_training_data(tmp_path, row, style, question):
    tokenizer = make_tokenizer(tmp_path)
    rows = _rows(tmp_path, tokenizer, [row] * 8)
    assert style_of_rows(rows, tokenizer) == style
    pf.carry_template(tokenizer, style)
    tokenizer.save_pretrained(tmp_path / "saved")
    served = served_ids(AutoTokenizer.from_pretrained(tmp_path / "saved"), [{"role": "user", "content": question}])
    trained_on = rows[0]["input_ids"]
    assert trained_on[: len(served)] == served
    assert tokenizer.decode(trained_on[len(served) :]).strip() == "red</s>"


def test_most_rows_of_a_blend_decide(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    mixed = [MARKED | {"chosen": f" {n}"} for n in range(6)] + [UNMARKED | {"chosen": f" {n}"} for n in range(10)]
    assert style_of_rows(_rows(tmp_path, tokenizer, mixed), tokenizer) == pf.BARE


def test_what_the_training_data_never_held_is_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    system = [{"role": "system", "content": "Be kind."}, TURNS[0]]
    for style, turns in ((pf.HH, system), (pf.BARE, TURNS), (pf.PLAIN, [TURNS[0], TURNS[2]]), (pf.BARE, system)):
        pf.carry_template(tokenizer, style)
        with pytest.raises(Exception, match=r"trained (without|on single)|take turns"):
            served_ids(tokenizer, turns)
    pf.carry_template(tokenizer, pf.PLAIN)
    text = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
    assert text == "<s> Be kind. Human: say 'red' Assistant:"  # as conversations with a system message are written


@pytest.mark.parametrize("style", STYLES)
def test_no_prompt_style_and_no_flag_takes_it_for_a_template_of_the_tokenizers_own(tmp_path, style):
    tokenizer = make_tokenizer(tmp_path)
    pf.carry_template(tokenizer, style)
    assert not pf.has_own_template(tokenizer) and pf.end_of_turn_id(tokenizer) is None
    with pytest.raises(ValueError, match="no chat template of its own"):
        pf.format_prompt(TURNS, "chat_template", tokenizer)
    assert pf.format_prompt(TURNS, "plain", tokenizer) == pf.format_prompt(TURNS)
    pf.carry_template(tokenizer, pf.PLAIN)  # a later step with other data
    assert " Human:" in tokenizer.chat_template
    tokenizer.chat_template = own = "{{ messages[0]['content'] }}"
    pf.carry_template(tokenizer, style)
    assert tokenizer.chat_template == own


def test_a_trained_model_is_saved_with_it_and_a_later_step_does_not_use_it(
    model_folder, pairs_folder, cache_folder, tmp_path, run_step
):
    data = flags("--dtype fp32 --max_train_samples 8", data_path=pairs_folder, data_output_path=cache_folder)
    run_step(1, [*data, *flags(model_name_or_path=model_folder, output_dir=tmp_path / "sft")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    expected = tokenizer(" Human: say red Assistant:")["input_ids"]
    assert served_ids(tokenizer, [{"role": "user", "content": "say red"}]) == expected
    with pytest.raises(UserError, match="none of its own"):
        run_step(2, [*data, *flags("--chat_template", model_name_or_path=tmp_path / "sft")])
