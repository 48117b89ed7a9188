"""The chat template that a model trained on plain text is saved with: what servers send is what it was trained on."""

import json
from itertools import product

import pytest
from helpers import flags, make_tokenizer
from transformers import AutoTokenizer

from utils.data import prompt_format as pf
from utils.data.encoding import SFT, TokenRules, make_row_maker
from utils.data.own_files import get_raw_dataset
from utils.process.errors import UserError

TURNS = [
    {"role": "user", "content": " say 'red' \n"},
    {"role": "assistant", "content": "red\n\n {{ 7 }}"},
    {"role": "user", "content": "thanks"},
]
FORMATS = (pf.HUMAN_ASSISTANT, pf.HH, pf.BARE)  # those that no template of the tokenizer's own writes


def served_ids(tokenizer, turns):
    """What a server makes of a conversation."""
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize(("style", "bos"), product((pf.HUMAN_ASSISTANT, pf.HH), ("<s>", None)))
def test_a_server_sends_the_ids_of_the_prompt_format(tmp_path, style, bos):
    tokenizer = make_tokenizer(tmp_path, bos=bos)
    pf.remember(tokenizer, style)
    for turns in (TURNS[:1], TURNS):
        expected = pf.encode_prompt(pf.format_prompt(turns, style), tokenizer, style)
        assert served_ids(tokenizer, turns) == expected
        assert (expected[0] == tokenizer.bos_token_id) == bool(bos)


MARKED = {"prompt": " Human: say red Assistant:", "chosen": " red"}
PARAGRAPHS = {"prompt": "\n\nHuman: say red\n\nAssistant:", "chosen": " red"}
UNMARKED = {"prompt": "\n Say red.", "chosen": " red"}
CONVERSATION = {"messages": [{"role": "user", "content": "Say red. "}, {"role": "assistant", "content": "red"}]}
BARE_CONVERSATION = {"messages": [CONVERSATION["messages"][0] | {"content": "Say red."}, CONVERSATION["messages"][1]]}


def trained_ids(tmp_path, tokenizer, row, prompt_format=None):
    """The ids of a row of step 1."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row))
    dataset = get_raw_dataset(str(file), str(tmp_path), 1, -1)
    maker = make_row_maker(dataset, tokenizer, TokenRules(SFT, 100, prompt_format=prompt_format))
    [(remembered, texts)] = maker.samples(row)
    return maker.row(remembered, maker.encoder.encode(texts))[0]


@pytest.mark.parametrize(
    ("row", "prompt_format", "question"),
    [
        (MARKED, None, "say red"),
        (PARAGRAPHS, None, "say red"),
        (UNMARKED, None, "\n Say red."),
        (CONVERSATION, pf.HUMAN_ASSISTANT, "Say red. "),
        (CONVERSATION, pf.HH, "Say red. "),
        (BARE_CONVERSATION, pf.BARE, "Say red."),
    ],
)
def test_the_template_writes_the_rows_of_the_training_data(tmp_path, row, prompt_format, question):
    tokenizer = make_tokenizer(tmp_path)
    trained_on = trained_ids(tmp_path, tokenizer, row, prompt_format)
    pf.remember(tokenizer, prompt_format or pf.written_style(tokenizer.decode(trained_on)))
    tokenizer.save_pretrained(tmp_path / "saved")
    served = served_ids(AutoTokenizer.from_pretrained(tmp_path / "saved"), [{"role": "user", "content": question}])
    assert trained_on[: len(served)] == served
    assert tokenizer.decode(trained_on[len(served) :]).strip() == "red</s>"


def test_what_the_training_data_never_held_is_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    system = [{"role": "system", "content": "Be kind."}, TURNS[0]]
    two = [TURNS[0], TURNS[2]]
    for style, turns in ((pf.HH, two), (pf.BARE, TURNS), (pf.HUMAN_ASSISTANT, two), (pf.BARE, system)):
        pf.remember(tokenizer, style)
        with pytest.raises(Exception, match=r"trained (without|on single)|take turns"):
            served_ids(tokenizer, turns)
    for style in (pf.HUMAN_ASSISTANT, pf.HH):  # as conversations with a system message are written
        pf.remember(tokenizer, style)
        text = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
        assert text == "<s>" + pf.format_prompt(system, style)


@pytest.mark.parametrize("style", FORMATS)
def test_nothing_takes_it_for_a_template_of_the_tokenizers_own(tmp_path, style):
    tokenizer = make_tokenizer(tmp_path)
    pf.remember(tokenizer, style)
    assert not pf.has_own_template(tokenizer) and pf.end_of_turn_id(tokenizer) is None
    with pytest.raises(ValueError, match="no chat template of its own"):
        pf.format_prompt(TURNS, "chat_template", tokenizer)
    assert pf.format_prompt(TURNS, "human_assistant", tokenizer) == pf.format_prompt(TURNS)
    pf.remember(tokenizer, pf.HUMAN_ASSISTANT)  # a later step with other data
    assert " Human:" in tokenizer.chat_template and pf.remembered(tokenizer) == pf.HUMAN_ASSISTANT


@pytest.mark.parametrize("style", FORMATS)
def test_a_template_of_the_tokenizers_own_is_set_aside_and_found_after_saving(tmp_path, style):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = own = "{{ messages[0]['content'] }}"
    pf.remember(tokenizer, style)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (pf.remembered(saved), pf.own_template(saved)) == (style, own) and not pf.has_own_template(saved)
    pf.remember(saved, pf.HH)
    assert pf.own_template(saved) == own
    saved.chat_template = own
    pf.remember(saved, pf.CHAT_TEMPLATE)
    saved.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (pf.remembered(again), again.chat_template) == (pf.CHAT_TEMPLATE, own) and pf.has_own_template(again)


def test_a_trained_model_is_saved_with_it_and_a_later_step_does_not_use_it(
    model_folder, pairs_folder, cache_folder, tmp_path, run_step
):
    data = flags("--dtype fp32 --max_train_samples 8", data_path=pairs_folder, data_output_path=cache_folder)
    run_step(1, [*data, *flags(model_name_or_path=model_folder, output_dir=tmp_path / "sft")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sft")
    assert pf.remembered(tokenizer) == pf.HUMAN_ASSISTANT
    expected = tokenizer(" Human: say red Assistant:")["input_ids"]
    assert served_ids(tokenizer, [{"role": "user", "content": "say red"}]) == expected
    with pytest.raises(UserError, match="none of its own"):
        run_step(2, [*data, *flags("--chat_template", model_name_or_path=tmp_path / "sft")])
