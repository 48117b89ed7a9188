"""Rewards beyond the reward model, advantages without a critic, the reference without a copy, aligned overflow."""

import json
import math
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import flags, read_metrics
from test_rlhf import PROMPTS, _experience, _trainer, _window, folders  # noqa: F401
from transformers import AutoModelForSequenceClassification

from training.step3_rlhf_finetuning import ppo_math
from training.step3_rlhf_finetuning.main import update_models
from training.step3_rlhf_finetuning.reporting import sample_rows, sample_table
from utils.arguments import RLHFBatchSizes
from utils.engine.nonfinite import refuse_nonfinite
from utils.engine.update import align_overflow
from utils.model.reward_functions import load_reward_functions
from utils.process.errors import UserError

# ---------------------------------------------------------------- advantages of a group, by hand


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    advantages = ppo_math.group_advantages(rewards, torch.ones(6, dtype=torch.bool), 3, "rloo")
    torch.testing.assert_close(advantages, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0]))


def test_grpo_is_the_reward_less_the_mean_over_the_unbiased_std():
    rewards = [1.0, 2.0, 6.0, 5.0, 5.0, 5.0]
    advantages = ppo_math.group_advantages(torch.tensor(rewards), torch.ones(6, dtype=torch.bool), 3, "grpo")
    std = statistics.stdev(rewards[:3]) + 1e-4
    torch.testing.assert_close(advantages, torch.tensor([-2 / std, -1 / std, 3 / std, 0, 0, 0]))


def test_grpo_without_scaling_is_the_reward_less_the_mean_and_whitened_it_is_reinforce_plus_plus_with_a_baseline():
    rewards, usable = torch.tensor([1.0, 2.0, 6.0, 5.0, 4.5, 5.5]), torch.ones(6, dtype=torch.bool)
    advantages = ppo_math.group_advantages(rewards, usable, 3, "grpo", scale=False)
    expected = [-2.0, -1.0, 3.0, 0.0, -0.5, 0.5]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    # One token an answer: the mean is 0, the (unbiased) std that of the six.
    whitened = ppo_math.masked_whiten(advantages.unsqueeze(1), torch.ones(6, 1)).flatten()
    assert whitened.tolist() == pytest.approx([value / statistics.stdev(expected) for value in expected], rel=1e-5)


def test_a_group_has_spread_where_its_usable_answers_differ_in_score():
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 9.0, 1.0, 3.0, 7.0, 8.0, 5.0, 6.0, 7.0])
    usable = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]).bool()
    assert ppo_math.groups_with_spread(scores, usable, 3).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_rows_that_do_not_count_are_no_part_of_their_group_and_one_alone_learns_nothing(kind):
    rewards = torch.tensor([1.0, 100.0, 3.0, 7.0, 100.0, 100.0])
    usable = torch.tensor([True, False, True, True, False, False])
    advantages = ppo_math.group_advantages(rewards, usable, 3, kind)
    alone = ppo_math.group_advantages(torch.tensor([1.0, 3.0]), torch.ones(2, dtype=torch.bool), 2, kind)
    torch.testing.assert_close(advantages, torch.tensor([alone[0], 0, alone[1], 0, 0, 0]))


# ---------------------------------------------------------------- in the trainer

GROUPS = "--num_generations_per_prompt 2"
REPEATED = [row for row in PROMPTS[:2] for _ in range(2)]


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_without_a_critic_every_token_of_an_answer_has_its_answers_advantage(folders, kind):  # noqa: F811
    trainer = _trainer(folders, f"{GROUPS} --advantage_estimator {kind}")
    assert trainer.critic_model is None and list(trainer.rlhf_engine.trained_engines()) == ["actor"]
    experience = _experience(trainer, rows=REPEATED)
    assert experience.values is None and experience.returns is None
    kl = (experience.log_probs - experience.ref_log_probs) * experience.answer_mask
    rewards = experience.scores.clamp(-5, 5) - (0.1 * kl.sum(1) if kind == "rloo" else 0)
    for first, second in ((0, 1), (2, 3)):
        gap = (rewards[first] - rewards[second]).item()
        expected = gap if kind == "rloo" else gap / 2 / (abs(gap) / 2**0.5 + 1e-4)
        for row, sign in ((first, 1), (second, -1)):
            told = experience.advantages[row][experience.answer_mask[row].bool()]
            torch.testing.assert_close(told, torch.full_like(told, sign * expected), rtol=1e-4, atol=1e-6)
    metrics = trainer.train_rlhf(_window(experience))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert not [name for name in metrics if "critic" in name or "value" in name]
    assert "explained_variance" not in trainer.experience_metrics(experience)


def test_grpos_kl_penalty_is_a_term_of_the_loss(folders):  # noqa: F811
    trainer = _trainer(folders, f"{GROUPS} --advantage_estimator grpo --kl_ctl 2.0")
    experience = _experience(trainer, rows=REPEATED)
    experience.ref_log_probs -= 0.3 * experience.answer_mask  # a reference that the policy has left
    metrics = trainer.train_rlhf(_window(experience, 2))
    tokens = experience.answer_mask.sum().item()
    k3 = torch.expm1(torch.tensor(-0.3)).item() + 0.3
    assert metrics["kl_loss"] == pytest.approx(2.0 * k3, rel=1e-4)
    policy = -(experience.advantages * experience.answer_mask).sum().item() / tokens
    assert metrics["actor_loss"] == pytest.approx(policy + 2.0 * k3, rel=1e-4)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_updates_without_a_critic_do_not_depend_on_how_the_rows_are_cut(folders, kind):  # noqa: F811
    weights = []
    for size in (4, 1):
        trainer = _trainer(folders, f"{GROUPS} --advantage_estimator {kind} --actor_learning_rate 1e-3")
        trainer.train_rlhf(_window(_experience(trainer, rows=REPEATED), size))
        weights.append([p.detach().clone() for p in trainer.actor_model.module.parameters()])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-5)


def _slow_loss(experience, advantages, loss_mean: str, low: float, high: float, kl_ctl: float) -> float:
    """Token by token: PPO's clip with two bounds, and k3 of the reference beside it."""
    per_answer = []
    for i in range(len(experience)):
        terms = []
        for t in range(experience.answer_width):
            if experience.answer_mask[i, t]:
                new, old = experience.scored_log_probs[i, t].item(), experience.log_probs[i, t].item()
                gap, ratio = experience.ref_log_probs[i, t].item() - new, math.exp(new - old)
                gain = min(ratio * advantages[i], min(max(ratio, 1 - low), 1 + high) * advantages[i])
                terms.append(-gain + kl_ctl * (math.exp(gap) - gap - 1))
        per_answer.append(terms)
    if loss_mean == "token":
        return statistics.mean(term for terms in per_answer for term in terms)
    return statistics.mean(statistics.mean(terms) for terms in per_answer if terms)


@pytest.mark.parametrize("loss_mean", ["token", "answer"])
def test_the_loss_equals_a_slow_computation_and_does_not_depend_on_how_rows_are_cut(folders, loss_mean):  # noqa: F811
    text = "--advantage_estimator grpo --no-scale_group_rewards --kl_ctl 0.5 --cliprange_high 0.4 --ppo_epochs 2"
    losses, gradients = [], []
    for size in (4, 1, 3):
        trainer = _trainer(folders, f"{GROUPS} {text} --loss_mean {loss_mean} --actor_learning_rate 0")
        experience = _experience(trainer, rows=REPEATED)
        experience.answer_mask[1, 2:] = 0  # answers of different lengths
        generator = torch.Generator().manual_seed(0)
        for name, scale in (("log_probs", 0.5), ("ref_log_probs", 0.3)):  # a policy that has moved
            noise = torch.randn(experience.answer_mask.shape, generator=generator) * scale
            setattr(experience, name, getattr(experience, name) + noise)
        metrics = trainer.train_rlhf(_window(experience, size))
        losses.append(metrics["actor_loss"])
        gradients.append(metrics["actor_grad_norm"])
        scores = experience.scores.tolist()
        advantages = [score - statistics.mean(scores[i // 2 * 2 : i // 2 * 2 + 2]) for i, score in enumerate(scores)]
        assert metrics["actor_loss"] == pytest.approx(
            _slow_loss(experience, advantages, loss_mean, 0.2, 0.4, 0.5), rel=1e-4
        )
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5) and gradients == pytest.approx(
        [gradients[0]] * 3, rel=1e-4
    )
    assert gradients[0] > 0


def test_the_critics_loss_is_a_mean_over_answers_too(folders):  # noqa: F811
    trainer = _trainer(folders, f"{GROUPS} --loss_mean answer --critic_learning_rate 0")
    experience = _experience(trainer, rows=REPEATED)
    experience.answer_mask[1, 2:] = 0
    error = 0.5 * (experience.values - experience.returns) ** 2 * experience.answer_mask
    expected = (error.sum(1) / experience.answer_mask.sum(1)).mean().item()
    assert trainer.train_rlhf(_window(experience, 2))["critic_loss"] == pytest.approx(expected, rel=1e-4)


def test_groups_without_spread_are_counted_and_left_out_of_the_update_alone(folders):  # noqa: F811
    text = f"{GROUPS} --advantage_estimator grpo --kl_ctl 0.5"
    trainer = _trainer(folders, f"{text} --drop_groups_without_spread")
    experience = _experience(trainer, rows=REPEATED)
    experience.scores[:] = torch.tensor([7.0, 9.0, 0.0, 2.0])  # 7 and 9 are both 5 once clipped
    trainer.get_advantages_and_returns(trainer.compute_rewards(experience))
    metrics = trainer.experience_metrics(experience)
    assert metrics["groups_without_spread"] == 1
    assert metrics["score"] == pytest.approx(4.5) and metrics["used_answers"] == 4, "of all answers"
    left = experience.of_groups_with_spread()
    assert left.answer_mask[:2].sum() == 0 and torch.equal(left.answer_mask[2:], experience.answer_mask[2:])
    batch = RLHFBatchSizes.of(trainer.args)
    found = update_models(trainer, trainer.args, refuse_nonfinite, experience, batch, np.random.default_rng(0), None)
    alone = _trainer(folders, text).train_rlhf(_window(experience[2:]))
    assert found[0]["actor_loss"] == pytest.approx(alone["actor_loss"], rel=1e-5)
    assert found[0]["actor_grad_norm"] == pytest.approx(alone["actor_grad_norm"], rel=1e-5)
    experience.scores[:] = 1.0
    trainer.get_advantages_and_returns(trainer.compute_rewards(experience))
    assert (
        update_models(trainer, trainer.args, refuse_nonfinite, experience, batch, np.random.default_rng(0), None) == []
    )
    assert trainer.skipped_updates == 1


# ---------------------------------------------------------------- reward functions

REWARDS = """
import math
def length(prompts, answers): return [len(answer) / 10 for answer in answers]
def asks(prompts, answers): return [float(len(prompt)) for prompt in prompts]
def half_nan(prompts, answers): return [math.nan if i % 2 else 1.0 for i in range(len(answers))]
def infinite(prompts, answers): return [math.inf] * len(answers)
def broken(prompts, answers): return answers[10_000]
def too_few(prompts, answers): return [1.0]
def words(prompts, answers): return ["good"] * len(answers)
number = 3
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(REWARDS)
    return file


def test_reward_functions_join_the_reward_models_score_with_their_weights(folders, rewards):  # noqa: F811
    trainer = _trainer(folders, "--reward_model_weight 0.5 --missing_eos_penalty 3")
    plain = _experience(trainer)
    trainer.reward_functions = load_reward_functions([f"{rewards}:length:2", f"{rewards}:asks:-0.1"])
    experience = _experience(trainer)
    assert torch.equal(experience.input_ids, plain.input_ids)
    model, length, asks = experience.score_parts.unbind(1)
    torch.testing.assert_close(model, plain.score_parts[:, 0])
    tokenizer = trainer.tokenizer
    answers = [row["answer"] for row in sample_rows(experience, tokenizer, 9)]
    assert length.tolist() == pytest.approx([len(answer) / 10 for answer in answers])
    prompts = [len(tokenizer.decode(row, skip_special_tokens=True)) for row in PROMPTS]
    assert asks.tolist() == pytest.approx(prompts)
    expected = 0.5 * model + 2 * length - 0.1 * asks - 3 * (1 - experience.ended)
    usable = experience.usable
    torch.testing.assert_close(experience.scores[usable], expected[usable])
    metrics = trainer.experience_metrics(experience)
    assert metrics["score/length"] == pytest.approx(length[usable].mean().item(), rel=1e-5)
    assert metrics["score/reward_model"] == pytest.approx(model[usable].mean().item(), rel=1e-5)


def test_normalize_reward_scales_the_reward_models_score_of_every_answer_and_nothing_else(
    folders,  # noqa: F811
    rewards,
    tmp_path,
):
    """(score - mean) / std from the reward model's config, up to the rewards; by hand, from plain transformers."""
    actor, mean, std = folders[0], 2.0, 0.25
    reward = Path(shutil.copytree(folders[1], tmp_path / "reward"))
    config = json.loads((reward / "config.json").read_text())
    (reward / "config.json").write_text(json.dumps(config | {"reward_score_mean": mean, "reward_score_std": std}))
    plain = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
    # Without a KL penalty and clipping the rewards of an answer are its score, at its last token.
    more = "--missing_eos_penalty 0 --kl_ctl 0 --clip_reward_value 1000"
    assert _trainer((actor, reward), f"--no-normalize_reward {more}").reward_scale is None
    trainer = _trainer((actor, reward), more)  # None takes the scale where it is saved
    for functions in ([], [f"{rewards}:length:2"]):
        trainer.reward_functions = load_reward_functions(functions)
        experience = _experience(trainer)
        assert len(experience) == len(PROMPTS) and experience.usable.all()
        model, *others = experience.score_parts.unbind(1)
        scaled = (model - mean) / std
        assert torch.equal(experience.scores, scaled + 2 * others[0] if functions else scaled)
        for i, row in enumerate(sample_rows(experience, trainer.tokenizer, 9)):
            ids = experience.input_ids[i][experience.attention_mask[i].bool()]
            with torch.no_grad():
                score = plain.score(plain.base_model(ids[None]).last_hidden_state[0, -1]).item()
            expected = (score - mean) / std + (2 * len(row["answer"]) / 10 if functions else 0)
            last = experience.answer_mask[i].nonzero()[-1]
            assert abs(expected - score) > 0.1, "scaling should be seen"
            assert experience.scores[i].item() == pytest.approx(expected, abs=1e-4)
            assert experience.rewards[i, last].item() == pytest.approx(expected, abs=1e-4)
            assert experience.rewards[i].sum().item() == pytest.approx(expected, abs=1e-4)


def test_scores_that_are_not_finite_take_their_answers_out_and_are_counted(folders, rewards):  # noqa: F811
    trainer = _trainer(folders)
    before = trainer.experience_metrics(_experience(trainer))
    trainer.reward_functions = load_reward_functions([f"{rewards}:half_nan"])
    experience = _experience(trainer)
    metrics = trainer.experience_metrics(experience)
    assert metrics["unused_answers"] == before["unused_answers"] + 2
    assert not experience.usable[1] and torch.isfinite(experience.advantages).all()
    assert trainer.train_rlhf(_window(experience))["actor_step_applied"]
    trainer.reward_functions = load_reward_functions([f"{rewards}:infinite"])
    assert trainer.train_rlhf(_window(_experience(trainer))) is None and trainer.skipped_updates == 1


def test_a_watched_function_changes_nothing_whatever_it_gives(folders, rewards):  # noqa: F811
    trainer = _trainer(folders)
    plain = _experience(trainer)
    unused = trainer.experience_metrics(plain)["unused_answers"]
    trainer.reward_functions = load_reward_functions([f"{rewards}:half_nan:0", f"{rewards}:infinite:0"])
    watched = _experience(trainer)
    assert torch.equal(watched.scores, plain.scores) and torch.equal(watched.usable, plain.usable)
    metrics = trainer.experience_metrics(watched)
    assert metrics["unused_answers"] == unused
    assert metrics["score/half_nan"] == 1.0, "a mean over the finite ones"
    assert math.isnan(metrics["score/infinite"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("broken", "broken raised IndexError"),
        ("too_few", "too_few gave 1 scores for 4 answers"),
        ("words", "words gave 'good'"),
    ],
)
def test_a_function_that_fails_is_named(folders, rewards, name, message):  # noqa: F811
    trainer = _trainer(folders)
    trainer.reward_functions = load_reward_functions([f"{rewards}:{name}"])
    with pytest.raises(UserError, match=message):
        _experience(trainer)


@pytest.mark.parametrize(
    "named, message",
    [
        ("rewards", "expected FILE.py:NAME"),
        ("{file}:", "expected FILE.py:NAME"),
        ("missing.py:f", "no file missing.py"),
        ("{file}:nothing", "no function nothing, only .*length"),
        ("{file}:number", "no function number"),
        ("{file}:length:much", "weight 'much' is no number"),
        ("{file}:length:nan", "weight 'nan' is no number"),
        ("{bad}:f", "cannot be run: SyntaxError"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_the_start(rewards, named, message, tmp_path):
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(UserError, match=message):
        load_reward_functions([named.format(file=rewards, bad=tmp_path / "bad.py")])


def test_two_functions_of_one_name_are_refused(rewards, tmp_path):
    with pytest.raises(UserError, match="one name"):
        load_reward_functions([f"{rewards}:length", f"{rewards}:length:2"])
    (tmp_path / "mine.py").write_text("def reward_model(prompts, answers): return []")
    with pytest.raises(UserError, match="one name"):
        load_reward_functions([f"{tmp_path}/mine.py:reward_model"])


def test_a_file_with_two_functions_runs_once_as_a_module_like_any_other(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
        "@dataclass\nclass State:\n    n: int = 0\n"
        "def one(prompts, answers): return []\ndef two(prompts, answers): return []\n"
    )
    load_reward_functions([f"{tmp_path}/mine.py:one", f"{tmp_path}/mine.py:two"])
    assert (tmp_path / "runs").read_text() == "x"


def test_whitening_is_over_the_rows_that_train(folders):  # noqa: F811
    text = f"{GROUPS} --advantage_estimator rloo --whiten_advantages --drop_groups_without_spread --kl_ctl 0"
    trainer = _trainer(folders, text)
    experience = _experience(trainer, rows=REPEATED)
    experience.scores[:] = torch.tensor([1.0, 1.0, 0.0, 2.0])
    trainer.get_advantages_and_returns(trainer.compute_rewards(experience))
    left = experience.of_groups_with_spread()
    values = left.advantages[left.answer_mask.bool()]
    assert values.mean().abs() < 1e-5 and values.var().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "more, message",
    [
        ("--advantage_estimator rloo", "--num_generations_per_prompt must be 2 or more"),
        ("--num_generations_per_prompt 3", "do not divide into --num_generations_per_prompt 3"),
        ("--reward_model_weight 0", "leaves nothing that scores"),
        ("--reward_model_weight 0 --reward_function x.py:f --normalize_reward", "--normalize_reward"),
        (f"{GROUPS} --advantage_estimator grpo --critic_lora_dim 2", "has no critic"),
        (f"{GROUPS} --advantage_estimator grpo --no-do_sample", "with --no-do_sample they are all the same"),
        (f"{GROUPS} --advantage_estimator rloo --temperature 0", "with --temperature 0 they are all the same"),
        (f"{GROUPS} --advantage_estimator rloo --top_k 1", "with --top_k 1 they are all the same"),
        (f"{GROUPS} --advantage_estimator rloo --gamma 0.5", "--gamma 0.5 discounts rewards .*; rloo compares whole"),
        (f"{GROUPS} --advantage_estimator grpo --lam 1", "--lam 1 weighs what the critic"),
        (f"{GROUPS} --advantage_estimator grpo --cliprange_value 0.1", "--cliprange_value 0.1 clips the critic's"),
        ("--no-do_sample --temperature 0.7", "--temperature 0.7 is of sampling"),
        ("--kl_target 6 --kl_ctl 0", "--kl_ctl 0 stays 0"),
        ("--kl_target 6 --kl_horizon 3 --per_device_generation_batch_size 16", "and this run's have 16, could make"),
        ("--only_optimize_lora --actor_lora_dim 2 --offload_reference_model", "add --separate_ref"),
        ("--no-scale_group_rewards", "gae divides by none"),
        (f"{GROUPS} --advantage_estimator rloo --scale_group_rewards", "rloo divides by none"),
        (f"{GROUPS} --drop_groups_without_spread", "gae compares an answer with what the critic expects"),
        ("--cliprange_high 0.3", "its ratio is 1, and nothing is clipped"),
        ("--align_overflow", "fp32 gradients do not overflow"),
        ("--align_overflow --dtype bf16 --critic_zero_stage 3", "ZeRO-3 looks for overflows in fp16 alone"),
        (f"{GROUPS} --advantage_estimator rloo --offload --critic_zero_stage 2", "trains the actor alone"),
    ],
)
def test_senseless_combinations_are_refused(folders, more, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        _trainer(folders, more)


# ---------------------------------------------------------------- the reference without a copy


def test_the_actor_without_its_adapters_is_the_reference_before_and_after_updates(folders):  # noqa: F811
    lora = "--only_optimize_lora --actor_lora_dim 4 --actor_lora_learning_rate 1e-2"
    shared, separate = _trainer(folders, lora), _trainer(folders, f"{lora} --separate_ref")
    assert shared.rlhf_engine.ref is None and separate.rlhf_engine.ref is not None
    for _ in range(2):
        ours, theirs = _experience(shared), _experience(separate)
        torch.testing.assert_close(ours.ref_log_probs, theirs.ref_log_probs, atol=1e-5, rtol=1e-5)
        for trainer, experience in ((shared, ours), (separate, theirs)):
            trainer.train_rlhf(_window(experience))
    assert (ours.log_probs - ours.ref_log_probs).abs().max() > 1e-4, "the adapters count again afterwards"


# ---------------------------------------------------------------- overflow


def test_align_overflow_asks_every_engine_even_when_the_first_says_yes():
    class Optimizer:
        asked = 0

        def has_overflow(self, *_):
            self.asked += 1
            return self.overflows

    engines = [type("Engine", (), {"optimizer": Optimizer()})() for _ in range(2)]
    engines[0].optimizer.overflows, engines[1].optimizer.overflows = True, False
    align_overflow(*engines)
    assert [engine.optimizer.asked for engine in engines] == [1, 1], "each question is a collective"
    assert [engine.optimizer.has_overflow() for engine in engines] == [True, True]
    assert [engine.optimizer.has_overflow() for engine in engines] == [True, False]


# ---------------------------------------------------------------- samples


def test_samples_are_a_table_for_a_person_and_whole_rows_in_a_file(folders):  # noqa: F811
    trainer = _trainer(folders)
    experience = _experience(trainer)
    rows = sample_rows(experience, trainer.tokenizer, 3)
    assert len(rows) == 3
    kl = ((experience.log_probs - experience.ref_log_probs) * experience.answer_mask).sum(1)
    assert [row["kl"] for row in rows] == pytest.approx(kl[:3].tolist())
    assert [row["prompt"] for row in rows] == trainer.tokenizer.batch_decode(PROMPTS[:3], skip_special_tokens=True)
    long = {
        "prompt": "p" * 300,
        "answer": "a\nb " * 90,
        "score": 1,
        "kl": 0.5,
        "tokens": 9,
        "ended": True,
        "trained": True,
    }
    lines = sample_table([*rows, long]).splitlines()
    assert len(lines) == 5 and all(len(line) <= 100 for line in lines)
    assert "…ppp" in lines[-1] and "a b a b" in lines[-1]


def test_gae_learns_from_several_answers_to_a_prompt_and_samples_say_which(run_step, folders, pairs_folder, tmp_path):  # noqa: F811
    text = f"""
        --dtype fp32 --per_device_generation_batch_size 4 --per_device_training_batch_size 2 --max_prompt_seq_len 24
        --max_answer_seq_len 8 {GROUPS} --sample_interval 1 --enable_test_mode --test_stop_step 2
    """
    models = dict(actor_model_name_or_path=folders[0], critic_model_name_or_path=folders[1])
    places = dict(data_path=pairs_folder, data_output_path=tmp_path / "cache", output_dir=tmp_path / "out")
    run_step(3, flags(text, **models, **places))
    rows = read_metrics(tmp_path / "out")
    assert len(rows) == 2 and all(
        "train/critic_loss" in row and "train/groups_without_spread" not in row for row in rows
    )
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [row["group"] for row in samples] == [0, 0, 1, 1] * 2
    prompts = [row["prompt"] for row in samples]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


def test_step_3_without_critic_or_reward_model(run_step, model_folder, pairs_folder, cache_folder, rewards, tmp_path):
    text = f"""
        --dtype fp32 --per_device_generation_batch_size 4 --per_device_training_batch_size 4 --max_prompt_seq_len 24
        --max_answer_seq_len 8 {GROUPS} --advantage_estimator rloo --reward_function {rewards}:length
        --reward_model_weight 0 --missing_eos_penalty 0 --sample_interval 1 --enable_test_mode --test_stop_step 2
    """
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, output_dir=tmp_path)
    run_step(3, flags(text, actor_model_name_or_path=model_folder, **places))
    rows = read_metrics(tmp_path)
    assert len(rows) == 2 and all(row["train/score"] == pytest.approx(row["train/score/length"]) for row in rows)
    assert (tmp_path / "actor/model.safetensors").exists() and not (tmp_path / "critic").exists()
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {row["step"] for row in rows} == {1, 2} and {
        "prompt",
        "answer",
        "score",
        "kl",
    } <= set(samples[0])
    assert samples[0]["prompt"] == samples[1]["prompt"] != samples[2]["prompt"], "two answers to each prompt"
