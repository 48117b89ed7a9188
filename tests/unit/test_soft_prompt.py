"""Soft prompts: what trains, what is saved, and that padding and virtual tokens change no number of a real token."""

import importlib.util
import io
import json
import sys

import pytest
import torch
from helpers import flags, make_model, make_tokenizer, read_metrics
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_scripts import prompt_eval, rw_eval
from inference import chatbot
from utils.data import preparation
from utils.generation.saved_model import generate_ids, load_language_model
from utils.model.inputs import model_inputs
from utils.model.losses import LabelLogProbs, causal_lm_loss_sum, label_count
from utils.model.soft_prompt import SoftPromptModel
from utils.process.errors import UserError

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="training needs the package peft")
FAMILIES = ["llama", "gpt2", "opt", "bloom"]
N = 5


def soft_prompt_model(folder, family="llama", scale=0.5):
    """A tiny model behind random vectors, and the vectors; [N, width]."""
    base = AutoModelForCausalLM.from_pretrained(make_model(folder, family)).eval()
    torch.manual_seed(1)
    vectors = scale * torch.randn(N, base.get_input_embeddings().weight.shape[1])
    return SoftPromptModel(base, torch.nn.Embedding.from_pretrained(vectors), N), vectors


def slow_logits(model, vectors, ids):
    """Logits [length, vocabulary] of one row without padding, from the base model alone."""
    embedded = model.base_model.get_input_embeddings()(torch.tensor([ids]))
    output = model.base_model(inputs_embeds=torch.cat([vectors[None], embedded], dim=1))
    return output.logits[0, len(vectors) :]


def padded(rows, side):
    longest = max(map(len, rows)) + 3
    ids, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), None)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


ROWS = [[9, 20, 31, 7, 15, 40, 22], [30, 12, 99]]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logit_of_a_real_token(tmp_path, family, side):
    model, vectors = soft_prompt_model(tmp_path, family)
    ids, mask = padded(ROWS, side)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape[:2] == ids.shape
    for row, got, real in zip(ROWS, logits, mask.bool(), strict=True):
        torch.testing.assert_close(got[real], slow_logits(model, vectors, row), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_loss_counts_the_real_tokens_only_each_from_the_position_before_it(tmp_path):
    model, vectors = soft_prompt_model(tmp_path)
    ids, mask = padded(ROWS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    got = causal_lm_loss_sum(LabelLogProbs(model), model_inputs(model, ids, mask), labels)
    slow, terms = 0.0, 0
    for row in ROWS:
        log_probs = slow_logits(model, vectors, row).log_softmax(-1)
        for place in range(1, len(row)):
            slow -= log_probs[place - 1, row[place]].item()
            terms += 1
    assert label_count(labels) == terms == len(ROWS[0]) + len(ROWS[1]) - 2
    assert got.item() == pytest.approx(slow, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_of_a_left_padded_batch_are_those_of_a_slow_loop(tmp_path, family):
    model, vectors = soft_prompt_model(tmp_path, family)
    ids, mask = padded(ROWS, "left")
    settings = dict(do_sample=False, max_new_tokens=6, pad_token_id=2, eos_token_id=0)
    answers = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(answers[:, : ids.shape[1]], ids)
    for row, answer in zip(ROWS, answers[:, ids.shape[1] :].tolist(), strict=True):
        slow = list(row)
        while len(slow) < len(row) + 6 and slow[-1] != 0:
            slow.append(slow_logits(model, vectors, slow)[-1].argmax().item())
        assert answer[: len(slow) - len(row)] == slow[len(row) :]


@pytest.fixture
def arguments(model_folder, pairs_folder, cache_folder, tmp_path):
    """arguments(flags, places) of a small run of step 1."""
    text = f"--data_split 1,0,0 --max_seq_len 64 --dtype fp32 --per_device_train_batch_size 8 --num_virtual_tokens {N}"
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, output_dir=tmp_path)
    places |= dict(model_name_or_path=model_folder)
    return lambda more, **changes: flags(f"{text} {more}", **places | changes)


def loading_args(**changes):
    words = [f"--{name}={value}" for name, value in changes.items()]
    return chatbot.parse_args(["--path", "unused", "--dtype", "fp32", "--device", "cpu", *words])


@pytest.fixture
def trained_models(monkeypatch):
    """The SoftPromptModels that a test makes, in their order."""
    made, original = [], SoftPromptModel.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(SoftPromptModel, "__init__", remember)
    return made


@needs_peft
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_a_trained_prompt_lowers_the_loss_and_loads_in_peft_and_here_as_it_was(
    tmp_path, model_folder, arguments, run_step, kind, trained_models
):
    text = {"soft_prompt_init_text": "say please"} if kind == "prompt_tuning" else {}
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    (tmp_path / "config.json").write_text("{}")  # of a whole model saved here earlier
    run_step(1, arguments(f"--soft_prompt {kind} --gradient_checkpointing --soft_prompt_learning_rate 0.05", **text))
    [first, last] = [row["eval/loss"] for row in read_metrics(tmp_path, "eval")]
    assert last < first - 0.03
    [model] = trained_models
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    assert not (tmp_path / "config.json").exists()
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_folder)

    ids, mask = padded(ROWS, "right")
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        lm = load_language_model(str(tmp_path), loading_args())
        torch.testing.assert_close(lm.model(input_ids=ids, attention_mask=mask).logits, want)
        import peft

        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path).eval()
        logits = theirs(input_ids=ids, attention_mask=mask).logits[:, N:]
        torch.testing.assert_close(logits[mask.bool()], want[mask.bool()])
    assert lm.max_positions == 512 - N
    alone = [generate_ids(lm, [row], max_new_tokens=5, do_sample=False)[0] for row in ROWS]
    assert generate_ids(lm, ROWS, max_new_tokens=5, do_sample=False) == alone


@needs_peft
def test_the_first_loss_is_that_of_the_text_it_starts_from(model_folder, arguments, run_step, trained_models):
    """Before any step a soft prompt made of a text is that text, over and over, in front of each row."""
    run_step(1, arguments("--soft_prompt prompt_tuning --soft_prompt_learning_rate 0", soft_prompt_init_text=" red"))
    [model] = trained_models
    of_text = AutoTokenizer.from_pretrained(model_folder)(" red", add_special_tokens=False)["input_ids"]
    front = (of_text * N)[:N]
    with torch.no_grad():
        whole = model.base_model(torch.tensor([front + ROWS[0]])).logits[0, N:]
        ids = torch.tensor(ROWS[:1])
        torch.testing.assert_close(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0], whole)


@needs_peft
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("--lora_dim 4", "freezes the whole model"),
        ("--packing", "a block holds many"),
        ("--num_virtual_tokens 500", "512 positions"),
        ("--soft_prompt_init_text=", "holds no token"),
        ("--add_eot_token --eot_token <|new|>", "is new to"),
        ("--soft_prompt_hidden_size 8", "no network"),
    ],
)
def test_what_a_soft_prompt_cannot_do_is_refused_before_data_are_prepared(
    arguments, run_step, monkeypatch, more, reason
):
    monkeypatch.setattr(preparation, "datasets_of_step", lambda *_, **__: pytest.fail("data were prepared"))
    with pytest.raises(UserError, match=reason):
        run_step(1, arguments(f"--soft_prompt prompt_tuning {more}"))


def test_without_peft_the_message_says_how_to_get_it(tmp_path, arguments, run_step, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    (tmp_path / "pairs").mkdir()
    with pytest.raises(UserError, match="pip install peft"):
        run_step(1, arguments("--soft_prompt p_tuning", data_path=tmp_path / "pairs"))


def saved_prompt(folder, model_folder, width=32, **changes):
    folder.mkdir()
    make_tokenizer(folder)
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": str(model_folder)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": torch.randn(N, width)}, folder / "adapter_model.safetensors")
    return str(folder)


def test_a_base_model_that_moved_is_named_by_a_flag(tmp_path, model_folder):
    path = saved_prompt(tmp_path / "prompt", tmp_path / "gone")
    with pytest.raises(UserError, match="gone, which is not there; give --base_model"):
        load_language_model(path, loading_args())
    assert load_language_model(path, loading_args(base_model=model_folder)).model.num_virtual_tokens == N


def test_a_prompt_of_another_width_or_another_kind_is_refused(tmp_path, model_folder):
    with pytest.raises(UserError, match=r"vectors of \(5, 16\); the base model's embedding is 32 wide"):
        load_language_model(saved_prompt(tmp_path / "narrow", model_folder, width=16), loading_args())
    with pytest.raises(UserError, match="of the kind PREFIX_TUNING"):
        load_language_model(saved_prompt(tmp_path / "prefix", model_folder, peft_type="PREFIX_TUNING"), loading_args())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_soft_prompt_is_no_model_to_train(tmp_path, model_folder, run_step, step):
    path = saved_prompt(tmp_path / "prompt", model_folder)
    models = dict(model_name_or_path=path)
    if step == 3:
        models = dict(actor_model_name_or_path=path, critic_model_name_or_path=model_folder)
    with pytest.raises(UserError, match=r"model_name_or_path .*holds a soft prompt.* cannot be folded"):
        run_step(step, flags("--dtype fp32", data_path=tmp_path / "none", **models))


def test_chat_answers_from_a_soft_prompt(tmp_path, model_folder, monkeypatch, capsys):
    path = saved_prompt(tmp_path / "prompt", model_folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nquit\n")))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **kwargs: None, raising=False)
    chatbot.main(flags("--greedy --device cpu --max_new_tokens 4", path=path))
    assert "Assistant:" in capsys.readouterr().out


def test_prompt_eval_compares_a_soft_prompt_with_its_base_and_rw_eval_refuses_it(tmp_path, model_folder, capsys):
    path = saved_prompt(tmp_path / "prompt", model_folder)
    models = dict(model_name_or_path_baseline=model_folder, model_name_or_path_finetune=path)
    (tmp_path / "prompts.txt").write_text("hello\nsay red\n")
    answers = tmp_path / "answers.jsonl"
    places = dict(prompts_file=tmp_path / "prompts.txt", jsonl=answers)
    prompt_eval.main(flags("--max_new_tokens 4", **models, **places))
    assert len(answers.read_text().splitlines()) == 4
    with pytest.raises(UserError, match="holds a soft prompt only"):
        rw_eval.main(["--model_name_or_path", path])
