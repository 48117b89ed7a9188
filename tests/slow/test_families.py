"""Every family through all three steps, in this process: as actor, as reward model, as critic."""

from types import SimpleNamespace

import pytest
import torch
from helpers import FAMILIES, make_model
from test_rlhf import PROMPTS, _experience, _trainer, _window
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from utils.data.batching import DataCollatorSFT, pad_rows
from utils.ds_utils import get_train_ds_config, initialize, with_batch_sizes
from utils.engine.optimizer import get_optimizer_grouped_parameters, make_optimizer
from utils.model.inputs import model_inputs
from utils.model.losses import LabelLogProbs, causal_lm_loss_sum, label_count
from utils.model.model_utils import create_critic_model, create_hf_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError
from utils.process.launch import init_distributed
from utils.run.results import save_hf_format

ROWS = [[10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30, 31, 32, 33], [40, 41, 42, 43, 44, 45, 46]]
CLOSE = dict(atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """What the tests of one family share: its folders, and the reward model that step 3 starts from."""
    folder = tmp_path_factory.mktemp(request.param)
    init_distributed(SimpleNamespace(local_rank=-1, comm_timeout=60))
    base = make_model(folder / "base", request.param)
    return SimpleNamespace(name=request.param, base=base, tokenizer=load_hf_tokenizer(base), folder=folder)


def _engine(model):
    config = with_batch_sizes(get_train_ds_config(False, "fp32", 0), len(ROWS))
    return initialize(model, config, make_optimizer(get_optimizer_grouped_parameters(model, 0.0), 1e-3, False))


def _save(model, family, name):
    save_hf_format(model, family.tokenizer, SimpleNamespace(output_dir=str(family.folder / name)))
    return family.folder / name


def _every_padding(pad):
    """(ids, mask, rows) of the same rows alone, with neighbours, and with more pads on either side."""
    for row in range(len(ROWS)):
        yield (*pad_rows([ROWS[row]], pad), [row])
    for side in ("right", "left"):
        for length in (None, 24):
            yield (*pad_rows(ROWS, pad, side=side, to_length=length), range(len(ROWS)))


def _values_per_row(values, mask, rows):
    return {row: values[i][mask[i].bool()] for i, row in enumerate(rows)}


def _assert_same_for_every_padding(family, score):
    """``score``: (ids, mask) -> [batch, length]; what stands at pads is not looked at."""
    seen = {}
    for ids, mask, rows in _every_padding(family.tokenizer.pad_token_id):
        with torch.no_grad():
            found = _values_per_row(score(ids, mask), mask, rows)
        for row, values in found.items():
            torch.testing.assert_close(values, seen.setdefault(row, values), **CLOSE)


def test_an_actor_learns_is_saved_as_it_is_and_sees_no_padding(family):
    model = create_hf_model(AutoModelForCausalLM, family.base, family.tokenizer)
    engine = _engine(model)
    label_log_probs = LabelLogProbs(engine)
    batch = DataCollatorSFT(family.tokenizer.pad_token_id, 32)(
        [{"input_ids": row, "answer_spans": [], "answers_only": False} for row in ROWS]
    )
    inputs = model_inputs(model, batch["input_ids"], batch["attention_mask"])
    losses = []
    for _ in range(4):
        loss = causal_lm_loss_sum(label_log_probs, inputs, batch["labels"]) / label_count(batch["labels"])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.02

    engine.eval()

    def all_log_probs(ids, mask):
        return model(**model_inputs(model, ids, mask)).logits.log_softmax(-1).flatten(2)

    _assert_same_for_every_padding(family, all_log_probs)
    saved = _save(engine, family, "actor")
    plain, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids, mask = pad_rows(ROWS, family.tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = plain.eval()(input_ids=ids, attention_mask=mask).logits
        ours = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(theirs, ours)


def _skip_if_there_is_no_class_for_a_reward_model(family):
    if (
        AutoConfig.for_model(FAMILIES[family.name]["model_type"]).__class__
        not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    ):
        with pytest.raises(UserError, match="no sequence-classification model"):
            create_critic_model(family.base, family.tokenizer)
        pytest.skip("transformers has no sequence-classification model of this family; refused at start")


def test_a_reward_model_learns_sees_no_padding_and_scores_alike_in_plain_transformers(family):
    _skip_if_there_is_no_class_for_a_reward_model(family)
    model = create_critic_model(family.base, family.tokenizer)
    engine = _engine(model)
    ids, mask = pad_rows([ROWS[0], ROWS[1], ROWS[0][:6] + ROWS[2], ROWS[1] + ROWS[1]], family.tokenizer.pad_token_id)
    losses = []
    for _ in range(4):
        loss = engine(input_ids=ids, attention_mask=mask)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    engine.eval()
    _assert_same_for_every_padding(family, model.values)
    saved = _save(engine, family, "reward")
    plain, info = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        ours = model.forward_value(ids, mask)["chosen_end_scores"]
        again = create_critic_model(saved, family.tokenizer, rlhf_training=True).eval().forward_value(ids, mask)
        theirs = torch.cat([plain.eval()(ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0] for i in range(4)])
    torch.testing.assert_close(again["chosen_end_scores"], ours)
    torch.testing.assert_close(theirs, ours, **CLOSE)


def test_ppo_runs_and_fast_greedy_generation_is_plain_generation(family):
    _skip_if_there_is_no_class_for_a_reward_model(family)
    torch.manual_seed(5)
    reward = _save(create_critic_model(family.base, family.tokenizer), family, "critic")
    text = "--enable_hybrid_engine --actor_learning_rate 1e-3 --actor_dropout 0"
    trainer = _trainer((family.base, reward), text)
    experience = _experience(trainer)
    module = trainer.actor_model.module
    before = {name: value.clone() for name, value in module.named_parameters()}
    metrics = trainer.train_rlhf(_window(experience))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["actor_grad_norm"] > 0
    assert metrics["critic_grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in module.named_parameters())

    trainer.args.do_sample = False
    ids, mask = pad_rows(PROMPTS, family.tokenizer.pad_token_id, side="left")
    plain = module.eval().generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        suppress_tokens=list(range(len(family.tokenizer), module.config.vocab_size)),
        max_new_tokens=trainer.args.max_answer_seq_len,
        pad_token_id=family.tokenizer.pad_token_id,
        eos_token_id=family.tokenizer.eos_token_id,
    )
    assert torch.equal(trainer._generate_sequence(ids, mask, 0).sequences, plain)


@pytest.mark.parametrize(("installed", "dtype", "named"), [(False, "bf16", "flash-attn"), (True, "fp32", "fp32")])
@pytest.mark.parametrize("step", [1, 2])
def test_flash_attention_that_cannot_run_is_refused_before_anything_is_loaded(
    run_step, monkeypatch, installed, dtype, named, step
):
    monkeypatch.setattr("utils.arguments.run.is_flash_attn_2_available", lambda: installed)
    flags = ["--model_name_or_path", "nowhere", "--attn_implementation", "flash_attention_2", "--dtype", dtype]
    with pytest.raises(UserError, match=f"flash_attention_2.*{named}"):
        run_step(step, flags)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_flag_reaches_the_model_and_changes_no_number(model_folder, attention):
    tokenizer = load_hf_tokenizer(model_folder)
    ids, mask = pad_rows(ROWS, tokenizer.pad_token_id, side="left")
    scores = []
    for implementation in (None, attention):
        torch.manual_seed(0)
        model = create_critic_model(model_folder, tokenizer, attn_implementation=implementation).eval()
        assert implementation in (None, model.rwtransformer.config._attn_implementation)
        scores.append(model.forward_value(ids, mask)["chosen_end_scores"])
    torch.testing.assert_close(scores[0], scores[1], **CLOSE)
