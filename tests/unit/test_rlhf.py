"""PPO with real engines in this process: ratios, masks, invariances, EMA, ptx, fast generation."""

import argparse
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import add_end_token, flags, make_model, make_reward_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from training.step3_rlhf_finetuning.experience import Experience
from training.step3_rlhf_finetuning.ppo_math import answer_mask
from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer, DeepSpeedPPOTrainerUnsupervised, MicroBatch
from training.step3_rlhf_finetuning.rlhf_engine import DeepSpeedRLHFEngine
from utils import arguments
from utils.data.batching import DataCollatorSFT, pad_rows
from utils.engine.steps import moving_average
from utils.generation.hybrid_engine import HybridEngine
from utils.generation.sampling import Rollout
from utils.model.saving import gathered_layers, plan_saving
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.lora import lora_layers
from utils.process.errors import UserError
from utils.process.launch import init_distributed
from utils.process.seeds import set_random_seed
from utils.run.results import save_hf_format


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folders(request, tmp_path_factory):
    """An actor and a reward model with a trained-looking head, of one family."""
    base = tmp_path_factory.mktemp(request.param)
    actor = make_model(base / "actor", request.param)
    return actor, make_reward_model(base / "reward", actor)


def _whole_weights(module) -> dict[str, torch.Tensor]:
    """Gathered, with LoRA folded in, as they would be saved."""
    layers = gathered_layers(module, plan_saving(module).renamed)
    return {name: value.to("cpu", copy=True) for layer in layers for name, value in layer.items()}


def _trainer(folders, *more: str, trainer_class=DeepSpeedPPOTrainer):
    actor, reward = folders
    text = f"""
        --dtype fp32 --max_answer_seq_len 12 --max_prompt_seq_len 16 --per_device_generation_batch_size 4
        --per_device_training_batch_size 4 --num_warmup_steps 0 {" ".join(more)}
    """
    buckets = actor.parent / "buckets.json"  # DeepSpeed's own reserve gigabytes for each ZeRO-3 engine
    buckets.write_text('{"zero_optimization": {"reduce_bucket_size": 1000000}}')
    models = dict(actor_model_name_or_path=actor, critic_model_name_or_path=reward)
    args = arguments.build_parser(3).parse_args(flags(text, deepspeed_config_overrides=buckets, **models))
    init_distributed(args)
    args = argparse.Namespace(**vars(arguments.settle(args, 3)))  # tests change some
    set_random_seed(3)
    engine = DeepSpeedRLHFEngine(str(actor), str(reward), load_hf_tokenizer(actor), args, num_total_iters=10)
    return trainer_class(engine, args)


PROMPTS = [[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]]


def _experience(trainer, seed=0, rows=PROMPTS):
    ids, mask = pad_rows(rows, trainer.tokenizer.pad_token_id, side="left")
    set_random_seed(seed)
    experience = trainer.generate_experience(ids, mask)
    trainer.compute_rewards(experience)
    return trainer.get_advantages_and_returns(experience)


def _rollout(prompts, answers):
    return Rollout(torch.cat([prompts, answers], dim=1), None, answers.shape[1])


def _window(experience, size=4):
    return [MicroBatch(experience[i : i + size]) for i in range(0, len(experience), size)]


def test_the_first_pass_has_ratio_one(folders):
    trainer = _trainer(folders, "--actor_dropout 0")
    experience = _experience(trainer)
    metrics = trainer.train_rlhf(_window(experience))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["approx_kl"]) < 1e-6
    assert metrics["clip_fraction"] == 0
    assert metrics["actor_step_applied"]
    # The policy has moved: the same rollouts seen again have another ratio.
    assert abs(trainer.train_rlhf(_window(experience))["approx_kl"]) > 1e-9


def test_scoring_log_probs_equal_those_of_generation_on_left_padded_prompts(folders):
    trainer = _trainer(folders)
    ids, mask = pad_rows(PROMPTS, trainer.tokenizer.pad_token_id, side="left")
    set_random_seed(1)
    model = trainer.actor_model.module.eval()
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=10,
        output_logits=True,
        suppress_tokens=list(range(len(trainer.tokenizer), model.config.vocab_size)),
        return_dict_in_generate=True,
        eos_token_id=trainer.tokenizer.eos_token_id,
        pad_token_id=trainer.tokenizer.pad_token_id,
    )
    answers = output.sequences[:, ids.shape[1] :]
    generated = (
        torch.stack(output.logits, 1)[:, :, : len(trainer.tokenizer)]
        .float()
        .log_softmax(-1)
        .gather(-1, answers.unsqueeze(-1))
        .squeeze(-1)
    )
    real = answer_mask(answers, trainer.tokenizer.eos_token_id)
    with torch.no_grad():
        scored, _ = trainer._answer_log_probs(
            trainer.actor_label_log_probs, output.sequences, torch.cat([mask, real], 1), answers.shape[1]
        )
    torch.testing.assert_close(scored * real, generated * real, atol=1e-5, rtol=1e-5)


def test_left_pads_change_no_log_prob_and_no_value(folders):
    trainer = _trainer(folders)
    row, width = [10, 11, 12, 13, 14, 15], 3
    seen = []
    for length in (6, 13):
        ids, mask = pad_rows([row], trainer.tokenizer.pad_token_id, side="left", to_length=length)
        with torch.no_grad():
            log_probs, _ = trainer._answer_log_probs(trainer.actor_label_log_probs, ids, mask, width)
            seen.append((log_probs, trainer._answer_values(ids, mask, width)))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-5)


def test_a_seed_fixes_the_rollouts_and_temperature_zero_is_greedy(folders):
    trainer = _trainer(folders)
    first, same, other = (_experience(trainer, seed).input_ids for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert first.shape != other.shape or not torch.equal(first, other)
    trainer.args.temperature = 0.0
    greedy, again = (_experience(trainer, seed).input_ids for seed in (1, 2))
    assert torch.equal(greedy, again)


@pytest.mark.parametrize("more", ["", "--ppo_epochs 2"])
def test_the_update_does_not_depend_on_how_the_rows_are_cut(folders, more):
    weights = []
    for size in (4, 1, 2):
        cut = f"--per_device_training_batch_size {size} --gradient_accumulation_steps {4 // size}"
        trainer = _trainer(folders, f"{cut} --actor_learning_rate 1e-3 {more}")
        experience = _experience(trainer)
        for _ in range(trainer.args.ppo_epochs):
            trainer.train_rlhf(_window(experience, size))
        weights.append([_whole_weights(e.module) for e in (trainer.actor_model, trainer.critic_model)])
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_an_empty_answer_weighs_nothing_and_a_batch_of_them_is_skipped(folders, monkeypatch):
    trainer = _trainer(folders)
    eos, pad = trainer.tokenizer.eos_token_id, trainer.tokenizer.pad_token_id
    answers = torch.tensor([[eos, pad, pad], [9, 8, eos], [eos, pad, pad], [9, 9, 9]])
    monkeypatch.setattr(trainer, "_generate_sequence", lambda prompts, *_: _rollout(prompts, answers))
    experience = _experience(trainer)
    assert experience.answer_mask.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]]
    assert experience.attention_mask[:, -3:].tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert trainer.experience_metrics(experience)["unused_answers"] == 2
    assert trainer.experience_metrics(experience)["eos_rate"] == 0.5
    before = _whole_weights(trainer.actor_model.module)
    answers[:, 0] = eos
    answers[:, 1:] = pad
    experience = _experience(trainer)
    metrics = trainer.experience_metrics(experience)
    assert metrics["used_answers"] == 0
    assert all(math.isnan(metrics[name]) for name in ("score", "score_std", "reward", "kl", "score/reward_model"))
    assert trainer.train_rlhf(_window(experience)) is None
    assert trainer.skipped_updates == 1
    after = _whole_weights(trainer.actor_model.module)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("engine", ["", "--enable_hybrid_engine"], ids=["generate", "hybrid engine"])
def test_prompts_and_answers_may_fill_every_position_of_the_models(folders, engine):
    limit = 512 - 16  # of the models' positions, less those of the answer
    trainer = _trainer(folders, f"--max_prompt_seq_len {limit} --max_answer_seq_len 16 {engine}")
    rows = [[10 + i % 30 for i in range(width)] for width in (limit, 3, limit, 1)]
    experience = _experience(trainer, rows=rows)
    assert experience.prompt_width == limit and experience.answer_mask.any(dim=1).all()
    metrics = trainer.train_rlhf(_window(experience))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)


def test_a_missing_eos_costs_the_penalty(folders, monkeypatch):
    trainer = _trainer(folders, "--missing_eos_penalty 2.5 --kl_ctl 0")
    answers = torch.tensor([[9, 8, trainer.tokenizer.eos_token_id], [9, 9, 9]]).repeat(2, 1)
    monkeypatch.setattr(trainer, "_generate_sequence", lambda prompts, *_: _rollout(prompts, answers))
    with_penalty = _experience(trainer).scores
    trainer.args.missing_eos_penalty = 0.0
    assert (_experience(trainer).scores - with_penalty).tolist() == pytest.approx([0, 2.5, 0, 2.5])


@pytest.mark.parametrize(
    ("penalty", "scale", "want"),
    [
        (1.0, (2.0, 0.5), [2, -1, -2, -3]),  # without an end at most the mean, which is 0, less the penalty
        (0.0, (2.0, 0.5), [2, 2, -2, -2]),
        (1.0, None, [3, 2, 1, 0]),
    ],
)
def test_an_answer_without_an_end_does_not_pay(folders, penalty, scale, want):
    trainer = _trainer(folders, f"--missing_eos_penalty {penalty}")
    trainer.reward_scale = scale
    scores = torch.tensor([[3.0], [3.0], [1.0], [1.0]]), torch.tensor([True, False, True, False])
    assert trainer._final_scores(*scores).tolist() == want


def test_a_negative_weight_turns_the_bound_of_answers_without_an_end_too(folders):
    trainer = _trainer(folders, "--missing_eos_penalty 1 --reward_model_weight -1")
    trainer.reward_scale = 2.0, 0.5
    scores = torch.tensor([[3.0], [3.0], [1.0], [1.0]]), torch.tensor([True, False, True, False])
    assert trainer._final_scores(*scores).tolist() == [-2, -3, 2, -1]


@pytest.fixture(scope="module")
def folders_with_two_ends(tmp_path_factory):
    """As ``folders``, where <|turn|> ends answers beside EOS, for the generation settings alone."""
    base = tmp_path_factory.mktemp("two ends")
    actor = make_model(base / "actor", "llama")
    turn = add_end_token(actor)
    return turn, (actor, make_reward_model(base / "reward", actor))


def _tokens_at(places: dict[tuple[int, int], int], never: list[int]):
    """Logits that choose a token at (row, position of the answer), and never one of ``never`` elsewhere."""

    def rewrite(logits, rows, position):
        logits = logits.clone()
        logits[:, never] = -torch.inf
        for i, row in enumerate(rows.tolist()):
            if (row, position) in places:
                logits[i, places[row, position]] = 1e4
        return logits

    return rewrite


@pytest.mark.parametrize("more", ["", "--enable_hybrid_engine"])
def test_an_answer_ends_at_each_end_token_of_the_model(folders_with_two_ends, more, capsys, tmp_path):
    turn, folders = folders_with_two_ends
    trainer = _trainer(folders, f"--missing_eos_penalty 2.5 --kl_ctl 0.1 {more}")
    assert f"answers end at '</s>' (0), '<|turn|>' ({turn})" in capsys.readouterr().out
    eos = trainer.tokenizer.eos_token_id
    generator = trainer.rlhf_engine.generator
    rewrite = _tokens_at({(0, 2): turn, (1, 4): eos, (3, 0): turn}, never=[turn, eos])
    generator.generate = partial(type(generator).generate, generator, rewrite_logits=rewrite)
    experience = _experience(trainer)
    ids, width = experience.input_ids, experience.prompt_width
    assert [ids[0, width + 2], ids[1, width + 4], ids[3, width]] == [turn, eos, turn]
    pad = trainer.tokenizer.pad_token_id
    assert all(
        (ids[row, width + length :] == pad).all() for row, length in ((0, 3), (1, 5), (3, 1))
    )  # it stopped there
    assert experience.attention_mask[:, width:].sum(1).tolist() == [3, 5, 12, 1]
    assert experience.answer_mask.sum(1).tolist() == [3, 5, 12, 0]  # the last one says nothing
    assert experience.ended.tolist() == [1, 1, 0, 1]
    assert trainer.experience_metrics(experience)["eos_rate"] == pytest.approx(2 / 3)
    # The end token is the last action: with a log-prob, an advantage, and the score of its answer on it.
    assert experience.advantages[0, 2] != 0 and experience.log_probs[0, 2] != 0
    kl = 0.1 * (experience.log_probs - experience.ref_log_probs)[0, 2]
    torch.testing.assert_close(experience.rewards[0, 2], experience.scores[0].clamp(-5, 5) - kl)
    assert (experience.rewards[0, 3:] == 0).all()
    torch.testing.assert_close(experience.score_parts[:, 0] - experience.scores, torch.tensor([0, 0, 2.5, 0]))
    # The reward model's score is its value at the end token, whichever it is, as for that answer alone.
    for row, length in ((0, 3), (1, 5)):
        alone = torch.tensor([[*PROMPTS[row], *ids[row, width : width + length].tolist()]])
        with torch.no_grad():
            value = trainer.reward_model(input_ids=alone, attention_mask=torch.ones_like(alone), values_only=True)
        torch.testing.assert_close(experience.score_parts[row, 0], value[0, -1], atol=1e-5, rtol=1e-5)
    assert trainer.train_rlhf(_window(experience))["actor_step_applied"]
    # What is saved ends its answers there too.
    save_hf_format(trainer.actor_model, trainer.tokenizer, SimpleNamespace(output_dir=tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.generation_config.eos_token_id == [eos, turn] and saved.config.eos_token_id == eos


def test_a_pad_token_that_is_the_unknown_token_may_be_sampled_and_ends_nothing(tmp_path):
    actor = make_model(tmp_path / "actor", "llama", pad=None)
    tokenizer = AutoTokenizer.from_pretrained(actor)
    tokenizer.add_special_tokens({"unk_token": "<s>", "pad_token": "<s>"})
    tokenizer.save_pretrained(actor)
    trainer = _trainer((actor, make_reward_model(tmp_path / "reward", actor)))
    unk, eos = trainer.tokenizer.unk_token_id, trainer.tokenizer.eos_token_id
    assert unk == trainer.tokenizer.pad_token_id != eos and trainer.end_token_ids == [eos]
    generator = trainer.rlhf_engine.generator
    places = {(0, 1): unk, (0, 4): eos, (1, 0): unk, (1, 2): eos}
    generator.generate = partial(type(generator).generate, generator, rewrite_logits=_tokens_at(places, [unk, eos]))
    experience = _experience(trainer)
    assert experience.answer_mask.sum(1).tolist() == [5, 3, 12, 12]
    assert experience.ended.tolist() == [1, 1, 0, 0]


def test_an_end_token_whose_id_lies_above_missing_ones_is_sampled_and_scored(tmp_path):
    actor = make_model(tmp_path / "actor", "llama")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<pad>": 2, "</s>": 320}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(actor)
    trainer = _trainer((actor, make_reward_model(tmp_path / "reward", actor)))
    assert len(trainer.tokenizer) < 320 and trainer.end_token_ids == [320]
    generator = trainer.rlhf_engine.generator
    rewrite = _tokens_at({(0, 3): 320, (2, 5): 320}, never=[320])
    generator.generate = partial(type(generator).generate, generator, rewrite_logits=rewrite)
    experience = _experience(trainer)
    assert experience.answer_mask.sum(1).tolist() == [4, 12, 6, 12]
    assert experience.log_probs.isfinite().all() and experience.log_probs[0, 3] < 0
    assert trainer.train_rlhf(_window(experience))["ratio"] == pytest.approx(1, abs=1e-5)


def test_ema_equals_its_closed_form_in_fp32(folders):
    trainer = _trainer(folders, "--enable_ema --actor_lora_dim 2 --actor_learning_rate 1e-2")
    engine, beta = trainer.rlhf_engine, 0.9
    history = [{n: p.detach().clone() for n, p in engine.actor.module.named_parameters()}]
    experience = _experience(trainer)
    for _ in range(3):
        trainer.train_rlhf(_window(experience))
        moving_average(engine.actor, engine.actor_ema, beta)
        history.append({n: p.detach().clone() for n, p in engine.actor.module.named_parameters()})
    weights = [beta**3] + [(1 - beta) * beta ** (3 - i) for i in (1, 2, 3)]
    moved = False
    for name, ema in engine.actor_ema.module.named_parameters():
        assert ema.dtype == torch.float32
        want = sum(w * step[name].double() for w, step in zip(weights, history, strict=True))
        torch.testing.assert_close(ema.double(), want, atol=1e-6, rtol=1e-5)
        moved = moved or not torch.equal(ema, history[0][name])
    assert moved


@pytest.mark.parametrize("more", ["", "--actor_lora_dim 4"])
def test_fast_generation_gives_the_tokens_of_plain_generation_before_and_after_an_update(folders, more):
    trainer = _trainer(folders, f"--enable_hybrid_engine --no-do_sample --actor_learning_rate 1e-2 {more}")
    ids, mask = pad_rows(PROMPTS, trainer.tokenizer.pad_token_id, side="left")
    module = trainer.actor_model.module
    for _, layer in lora_layers(module):
        torch.nn.init.normal_(layer.lora_left_weight, std=0.2)
    outputs = []
    for _ in range(2):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        fast = trainer._generate_sequence(ids, mask, 0).sequences
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
        was = module.training
        plain = module.eval().generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            suppress_tokens=list(range(len(trainer.tokenizer), module.config.vocab_size)),
            max_new_tokens=trainer.args.max_answer_seq_len,
            pad_token_id=trainer.tokenizer.pad_token_id,
            eos_token_id=trainer.tokenizer.eos_token_id,
        )
        module.train(was)
        assert torch.equal(fast, plain)
        outputs.append(fast)
        trainer.train_rlhf(_window(_experience(trainer)))


@pytest.mark.parametrize("more", ["", "--no-do_sample"])
def test_logits_that_are_not_finite_are_an_error_that_names_the_engine(folders, more):
    trainer = _trainer(folders, f"--enable_hybrid_engine {more}")
    ids, mask = pad_rows(PROMPTS, trainer.tokenizer.pad_token_id, side="left")
    with torch.no_grad():
        trainer.actor_model.module.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(UserError, match="the logits in generation of the engine 'actor' is nan"):
        trainer.generate_experience(ids, mask)


@pytest.mark.parametrize("more", ["", "--temperature 0.7", "--no-do_sample"])
def test_log_probs_of_the_sampling_loop_equal_those_of_the_scoring_pass(folders, more):
    trainer = _trainer(folders, f"--enable_hybrid_engine --actor_lora_dim 4 {more}")
    for _, layer in lora_layers(trainer.actor_model.module):
        torch.nn.init.normal_(layer.lora_left_weight, std=0.2)
    ids, mask = pad_rows(PROMPTS, trainer.tokenizer.pad_token_id, side="left")
    rollout = trainer.rlhf_engine.generator.generate(ids, mask, trainer.decoding())
    real = answer_mask(rollout.sequences[:, ids.shape[1] :], trainer.tokenizer.eos_token_id)
    with torch.no_grad():
        scored, _ = trainer._answer_log_probs(
            trainer.actor_label_log_probs, rollout.sequences, torch.cat([mask, real], 1), rollout.width
        )
    torch.testing.assert_close(rollout.log_probs, scored, atol=1e-5, rtol=1e-5)


def test_log_probs_of_the_sampler_serve_as_old_ones_and_are_compared_now_and_then(folders, monkeypatch):
    trainer = _trainer(folders, "--enable_hybrid_engine --rollout_log_probs --log_interval 3 --actor_dropout 0")
    ids, mask = pad_rows(PROMPTS, trainer.tokenizer.pad_token_id, side="left")
    scored, score = [], trainer._answer_log_probs

    def noting(label_log_probs, *rest, **more):
        scored.append(label_log_probs)
        return score(label_log_probs, *rest, **more)

    monkeypatch.setattr(trainer, "_answer_log_probs", noting)
    passes = []
    for step in (0, 1, 2, 3, None):
        set_random_seed(0)
        experience = trainer.generate_experience(ids, mask, step)
        passes.append(scored.count(trainer.actor_label_log_probs))
        scored.clear()
        assert torch.equal(experience.log_probs, experience.rollout_log_probs)
        trainer.get_advantages_and_returns(trainer.compute_rewards(experience))
        figures = trainer.experience_metrics(experience)
        assert ("rollout_log_prob_gap" in figures) == bool(passes[-1])
        assert figures.get("rollout_log_prob_gap_max", 0) < 1e-5
    assert passes == [1, 0, 0, 1, 1]
    assert trainer.train_rlhf(_window(experience))["ratio"] == pytest.approx(1, abs=1e-5)


def test_importance_weights_of_the_sampler_weigh_the_policy_loss(folders):
    trainer = _trainer(folders, "--enable_hybrid_engine --rollout_is_clip 2")
    experience = _experience(trainer)
    experience.rollout_log_probs = experience.scored_log_probs - 0.5  # sampled from less likely tokens: 1.65 each
    assert trainer.experience_metrics(experience)["rollout_log_prob_gap"] == pytest.approx(0.5, abs=1e-5)
    experience.advantages, losses = experience.answer_mask.float(), []
    for shift in (0.0, 0.5, 5.0):
        experience.rollout_log_probs = experience.scored_log_probs - shift
        trainer.actor_model.lr_scheduler = None  # one policy for all three
        for group in trainer.actor_model.optimizer.param_groups:
            group["lr"] = 0.0
        losses.append(trainer.train_rlhf(_window(experience))["actor_loss"])
    assert losses[1] == pytest.approx(losses[0] * 2.718281828**0.5, rel=1e-4)
    assert losses[2] == pytest.approx(losses[0] * 2, rel=1e-4)


@pytest.mark.parametrize("flag", ["--rollout_log_probs", "--rollout_is_clip 2"])
def test_flags_of_the_samplers_log_probs_need_a_sampler_that_notes_them(folders, flag, monkeypatch):
    for more in ("", "--enable_hybrid_engine --hybrid_engine_backend transformers"):
        with pytest.raises(UserError, match=f"{flag.split()[0]} needs the log-probs of the sampler"):
            _trainer(folders, f"{flag} {more}")
    with pytest.raises(UserError, match="--rollout_is_clip weighs by a scoring pass"):
        _trainer(folders, "--enable_hybrid_engine --rollout_is_clip 2 --rollout_log_probs")
    # The check at the start leads backend auto to generate().
    monkeypatch.setattr(HybridEngine, "_difference_from_generate", lambda _: "other tokens")
    with pytest.raises(UserError, match=f"{flag.split()[0]} needs .* generation by transformers notes none"):
        _trainer(folders, f"{flag} --enable_hybrid_engine")


def test_the_ptx_gradient_joins_the_same_step(folders):
    """One step from PPO and ptx together equals one step from the summed gradients, taken by hand with plain SGD."""
    more = "--unsupervised_dataset_name x --unsup_coef 3.0 --kl_ctl 0.3"
    trainer = _trainer(folders, more, trainer_class=DeepSpeedPPOTrainerUnsupervised)
    experience = _experience(trainer)
    text = DataCollatorSFT(trainer.tokenizer.pad_token_id, 16)(
        [{"input_ids": [5, 6, 7, 8, 9], "answer_spans": [0, 5], "answers_only": False}]
    )
    module = trainer.actor_model.module
    twin = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    width = experience.answer_width
    position_ids = (experience.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = twin(experience.input_ids, attention_mask=experience.attention_mask, position_ids=position_ids).logits[
        :, -width - 1 : -1, : len(trainer.tokenizer)
    ]
    log_probs = logits.log_softmax(-1).gather(-1, experience.input_ids[:, -width:, None]).squeeze(-1)
    ratio = (log_probs - experience.log_probs).exp()
    ppo = -(ratio * experience.advantages * experience.answer_mask).sum() / experience.answer_mask.sum()
    ptx = twin(text["input_ids"], attention_mask=text["attention_mask"], labels=text["labels"]).loss
    (ppo + 3.0 * ptx).backward()
    wanted_norm = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters() if p.grad is not None)).item()
    metrics = trainer.train_rlhf([MicroBatch(experience, text)])
    assert metrics["unsupervised_loss"] == pytest.approx(ptx.item(), rel=1e-4)
    assert metrics["actor_grad_norm"] == pytest.approx(wanted_norm, rel=1e-3)
    assert module.training


def test_rounds_of_different_widths_become_one_experience(folders):
    trainer = _trainer(folders)
    first, second = _experience(trainer, 1), _experience(trainer, 2, rows=[[7] * 12, [8], [9], [10]])
    both = Experience.concat([first, second], trainer.tokenizer.pad_token_id)
    assert len(both) == 8
    part = both[0:4]
    with torch.no_grad():
        again, _ = trainer._answer_log_probs(
            trainer.actor_label_log_probs, part.input_ids, part.attention_mask, part.answer_width
        )
    torch.testing.assert_close(again * part.answer_mask, part.log_probs * part.answer_mask, atol=1e-5, rtol=1e-5)


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_sampled(folders):
    trainer = _trainer(folders)
    module, known = trainer.actor_model.module, len(trainer.tokenizer)
    assert module.config.vocab_size > known
    with torch.no_grad():
        # Make the nameless rows the likeliest of all.
        module.get_output_embeddings().weight[known:] = module.get_output_embeddings().weight[:known].mean(0) + 5.0
    experience = _experience(trainer)
    assert (experience.input_ids < known).all()
    assert trainer.train_rlhf(_window(experience))["ratio"] == pytest.approx(1, abs=1e-5)


def test_a_row_with_a_score_that_is_not_finite_weighs_nothing(folders, monkeypatch):
    trainer = _trainer(folders)
    original = trainer._final_scores

    def broken(scores, ended):
        scores = original(scores, ended).clone()
        scores[1] = float("nan")
        return scores

    monkeypatch.setattr(trainer, "_final_scores", broken)
    monkeypatch.setattr(
        trainer,
        "_answer_values",
        lambda ids, mask, width, f=trainer._answer_values: f(ids, mask, width).index_fill(
            0, torch.tensor([1]), float("nan")
        ),
    )
    experience = _experience(trainer)
    assert experience.answer_mask[1].sum() == 0
    for name in ("values", "advantages", "returns", "rewards", "scores"):
        assert torch.isfinite(getattr(experience, name)).all(), name
