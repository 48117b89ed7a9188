"""What ends an answer: which tokens of a model and its tokenizer, in its saved files, and where it is used again."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import add_end_token, flags, make_model, make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from evaluation_scripts import demo_report, prompt_eval
from utils.data import prompt_format
from utils.generation.saved_model import generate_answers, load_language_model
from utils.model.adapters import save_lora_adapter
from utils.model.merging import read_adapter, save_merged_model
from utils.model.model_utils import create_hf_model
from utils.model.saving import save_pretrained_model
from utils.model.tokenizer import describe_end_tokens, end_token_ids, load_hf_tokenizer, vocabulary_size
from utils.module.lora import convert_linear_layer_to_lora
from utils.process.errors import UserError

CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def _tokenizer(folder, *special: str, template: str | None = None):
    """With special tokens that have no role, as <|eot_id|> and <|im_end|> in the tokenizers of base models."""
    tokenizer = make_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.chat_template = template
    return tokenizer


def _model(named):
    return SimpleNamespace(generation_config=GenerationConfig(eos_token_id=named))


# ---------------------------------------------------------------- which tokens


def test_end_tokens_are_eos_the_turns_end_and_the_special_ones_that_the_model_names(tmp_path):
    tokenizer = _tokenizer(tmp_path, "<|im_start|>", "<|im_end|>", "<|eom|>", template=CHATML)
    eos = tokenizer.eos_token_id
    start, turn, eom = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|eom|>"])
    assert turn not in tokenizer.all_special_ids
    assert end_token_ids(_model(eos), tokenizer) == [eos, turn]
    assert end_token_ids(_model(None), tokenizer) == [eos, turn]
    assert end_token_ids(_model([eom, turn]), tokenizer) == [eos, turn, eom]
    assert end_token_ids(SimpleNamespace(generation_config=None), tokenizer) == [eos, turn]
    # 2 is what many configuration classes say of themselves; here 40 is a word.
    assert end_token_ids(_model(40), tokenizer) == end_token_ids(_model([eos, 40, 10**6]), tokenizer) == [eos, turn]
    assert start not in end_token_ids(_model([eos, turn]), tokenizer)
    tokenizer.chat_template = None
    assert end_token_ids(_model(eos), tokenizer) == [eos]
    assert end_token_ids(_model([eom, turn]), tokenizer) == [eos, turn, eom]


def test_a_template_that_training_wrote_down_adds_no_end_token(tmp_path):
    tokenizer = _tokenizer(tmp_path)
    prompt_format.remember(tokenizer, prompt_format.HH)
    assert end_token_ids(_model(None), tokenizer) == [tokenizer.eos_token_id]


def test_end_tokens_are_named_with_eos_first(tmp_path):
    tokenizer = _tokenizer(tmp_path, "<|im_end|>")
    tokenizer.eos_token, turn = "<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert describe_end_tokens([0, turn], tokenizer) == f"'<|im_end|>' ({turn}), '</s>' (0)"


def test_a_chat_template_that_cannot_be_used_stops_a_run_before_it_trains(tmp_path):
    folder = make_model(tmp_path)
    tokenizer = load_hf_tokenizer(folder)
    tokenizer.chat_template = "{{ raise_exception('no such turns') }}"
    with pytest.raises(UserError, match=r"what ends an answer cannot be told.*no such turns"):
        create_hf_model(AutoModelForCausalLM, folder, tokenizer)
    create_hf_model(AutoModel, folder, tokenizer)  # a decoder alone ends no answers


# ---------------------------------------------------------------- saved


def _forced(token: int, position: int, prompt_width: int, never: list[int]):
    def rewrite(ids, logits):
        logits = logits.clone()
        logits[:, never] = -torch.inf
        if ids.shape[1] - prompt_width == position:
            logits[:, token] = 1e4
        return logits

    return LogitsProcessorList([rewrite])


def _assert_generate_ends_at(folder, ends: list[int]) -> None:
    """generate() of plain transformers, with the saved settings alone, stops at each of the ids."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[10, 11, 12]])
    for token in ends:
        processor = _forced(token, 4, 3, ends)
        answer = model.generate(prompt, max_new_tokens=9, do_sample=False, logits_processor=processor)[0, 3:]
        assert len(answer) == 5 and answer[-1] == token


def test_a_saved_model_ends_its_answers_at_each_end_token_in_plain_transformers(tmp_path):
    folder = make_model(tmp_path / "base")
    turn = add_end_token(folder)
    tokenizer = load_hf_tokenizer(folder)
    for step in ("first", "second"):  # a saved model is trained on
        model = create_hf_model(AutoModelForCausalLM, folder, tokenizer)
        assert model.generation_config.eos_token_id == [0, turn] and model.config.eos_token_id == 0
        folder = tmp_path / step
        save_pretrained_model(model, tokenizer, folder)
        _assert_generate_ends_at(folder, [0, turn])
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0
        tokenizer = load_hf_tokenizer(folder)


def test_a_saved_model_keeps_the_end_token_of_the_run_and_that_of_its_template(tmp_path):
    folder = make_model(tmp_path / "base")
    turn = add_end_token(folder)
    tokenizer = load_hf_tokenizer(folder, add_special_tokens="<|done|>")  # as --add_eot_token
    model = create_hf_model(AutoModelForCausalLM, folder, tokenizer)
    assert end_token_ids(model, tokenizer) == [0, turn, tokenizer.eos_token_id]
    save_pretrained_model(model, tokenizer, tmp_path / "new end token")
    _assert_generate_ends_at(tmp_path / "new end token", [0, turn, tokenizer.eos_token_id])
    tokenizer = load_hf_tokenizer(make_model(tmp_path / "plain base"))
    tokenizer.add_tokens(AddedToken("<|im_end|>", special=True, normalized=False))
    tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain base")  # as other people's code loads it
    save_pretrained_model(model, tokenizer, tmp_path / "template")
    _assert_generate_ends_at(tmp_path / "template", [0, tokenizer.convert_tokens_to_ids("<|im_end|>")])


def test_a_model_with_one_end_token_is_saved_with_one_id(tmp_path):
    folder = make_model(tmp_path / "base")
    GenerationConfig(eos_token_id=40).save_pretrained(folder)  # an ordinary word
    model = create_hf_model(AutoModelForCausalLM, folder, load_hf_tokenizer(folder))
    save_pretrained_model(model, load_hf_tokenizer(folder), tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("new", [None, "<|done|>"], ids=["end tokens of the base", "and one of the run"])
def test_a_merged_adapter_ends_its_answers_where_the_base_does(tmp_path, new):
    folder = make_model(tmp_path / "base")
    ends = {0, add_end_token(folder)}
    tokenizer = load_hf_tokenizer(folder, add_special_tokens=new)
    model = create_hf_model(AutoModelForCausalLM, folder, tokenizer)
    convert_linear_layer_to_lora(model, "auto", 2)
    save_lora_adapter(model, tokenizer, str(folder), tmp_path / "adapter")
    save_merged_model(str(folder), read_adapter(tmp_path / "adapter"), tmp_path / "merged", "5GB")
    _assert_generate_ends_at(tmp_path / "merged", sorted(ends | {tokenizer.eos_token_id}))


# ---------------------------------------------------------------- chat and evaluation


def _always(model, token: int) -> None:
    """The model answers with this token, whatever it is asked."""
    with torch.no_grad():
        head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
        head.weight.zero_()
        head.bias.zero_()
        head.bias[token] = 50.0
    model.set_output_embeddings(head)


def test_chat_and_the_demos_report_end_answers_at_each_end_token(tmp_path):
    folder = make_model(tmp_path)
    turn = add_end_token(folder)
    models = flags(model_name_or_path_baseline=folder, model_name_or_path_finetune=folder)
    args = prompt_eval.parse_args([*models, "--device", "cpu"])
    lm = load_language_model(str(folder), args)
    assert lm.stop_ids == [0, turn]
    for token, ended in ((turn, True), (0, True), (40, False)):
        _always(lm.model, token)
        [[answer]] = generate_answers(lm, [[10, 11]], 1, do_sample=False, max_new_tokens=3)
        assert (answer.ended, answer.num_tokens) == (ended, 1 if ended else 3)
        cases = [demo_report.held_out_prompts(1)[0]] * 2
        batches = demo_report.sample_answers(lm.model, lm.tokenizer, cases, 3, 2, lm.stop_ids)
        rates, _ = demo_report.judge_answers(lm.tokenizer, cases, batches, lm.stop_ids)
        assert rates["ended"] == ended


# ---------------------------------------------------------------- vocabularies with missing ids


def _words(folder, vocabulary: dict[str, int], **roles):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama", vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(folder)
    return folder


def test_an_end_token_above_missing_ids_can_be_sampled(tmp_path):
    folder = _words(tmp_path, {"a": 0, "b": 1, "</s>": 40}, eos_token="</s>", pad_token="b")
    tokenizer = load_hf_tokenizer(folder)
    assert len(tokenizer) == 3 and vocabulary_size(tokenizer) == 41
    assert end_token_ids(_model(2), tokenizer) == [40]


def test_a_pad_token_never_takes_the_id_of_a_word(tmp_path):
    folder = _words(tmp_path / "free", {"a": 0, "</s>": 1, "b": 40}, eos_token="</s>")
    tokenizer = load_hf_tokenizer(folder)
    assert tokenizer.pad_token_id not in (0, 1, 40)
    folder = _words(tmp_path / "taken", {"a": 0, "</s>": 1, "b": 3}, eos_token="</s>")
    with pytest.raises(UserError, match=r"no free id for the pad_token '\[PAD\]'.* 3 is that of 'b'"):
        load_hf_tokenizer(folder)
    with pytest.raises(UserError, match=r"no free id for the eos_token '<new>'"):
        load_hf_tokenizer(folder, add_special_tokens="<new>")
    assert AutoTokenizer.from_pretrained(folder).get_vocab()["b"] == 3
