"""The mathematics of PPO against hand-computed values and independent forms."""

import math

import pytest
import torch

from training.step3_rlhf_finetuning import ppo_math


def test_log_probs_equal_a_hand_value_and_follow_the_temperature():
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    label = torch.tensor([[1]])
    assert ppo_math.gather_log_probs(logits, label).item() == pytest.approx(math.log(3 / 4))
    # At temperature 2 the odds are sqrt(3) to 1.
    expected = math.log(math.sqrt(3) / (1 + math.sqrt(3)))
    assert ppo_math.gather_log_probs(logits, label, temperature=2.0).item() == pytest.approx(expected)


def test_log_probs_of_bf16_logits_are_taken_in_fp32_across_chunks():
    torch.manual_seed(0)
    logits = torch.randn(3, 700, 11).bfloat16()
    labels = torch.randint(0, 11, (3, 700))
    got = ppo_math.gather_log_probs(logits, labels)
    want = logits.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


def test_the_first_eos_is_an_action_and_what_follows_is_not():
    eos, pad = 2, 0
    answers = torch.tensor([[5, 6, eos, pad], [5, 6, 7, 8], [eos, pad, pad, pad], [5, pad, 6, eos]])
    mask = ppo_math.answer_mask(answers, eos)
    # A sampled pad id before the EOS is a real token: masks do not look at pads.
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_the_first_end_token_of_whichever_kind_is_the_last_action():
    eos, turn, pad = 2, 30, 0
    answers = torch.tensor([[5, turn, 6, eos], [5, eos, turn, pad], [turn, pad, pad, pad], [5, pad, 6, 7]])
    ends = (eos, turn)
    assert ppo_math.answer_mask(answers, ends).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert ppo_math.is_end_token(answers, ends).any(dim=1).tolist() == [True, True, True, False]
    # Where padding is an end token too, what fills a row behind its end changes nothing.
    assert ppo_math.answer_mask(answers[1:3], (*ends, pad)).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    for ids in (eos, [eos], torch.tensor(eos), torch.tensor([eos])):  # one id is as good as a list of it
        assert ppo_math.answer_mask(answers, ids).sum(1).tolist() == [4, 2, 4, 4]


def test_kl_estimators_equal_hand_values_and_k3_is_never_negative():
    log_p, log_q = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert ppo_math.kl_per_token(log_p, log_q, "k1").item() == pytest.approx(math.log(2))
    assert ppo_math.kl_per_token(log_p, log_q, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    noise = torch.randn(1000)
    assert (ppo_math.kl_per_token(noise, noise + torch.randn(1000), "k3") >= 0).all()
    with pytest.raises(ValueError, match="k9"):
        ppo_math.kl_per_token(log_p, log_q, "k9")


def test_the_score_lands_on_the_last_real_token_clipped_and_kl_on_every_real_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    kl = torch.tensor([[1.0, 2.0, 9.0], [0.5, 0.5, 0.5], [3.0, 3.0, 3.0]])
    rewards = ppo_math.place_rewards(torch.tensor([2.0, -7.0, 4.0]), kl, mask, kl_ctl=0.1, clip_reward_value=5)
    expected = torch.tensor([[-0.1, -0.2 + 2.0, 0.0], [-0.05, -0.05, -0.05 - 5.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def _gae_matrix(values, rewards, length, gamma, lam):
    """The closed form: A_t = sum over k of (gamma lam)^k delta_{t+k}."""
    v = torch.cat([values[:length], torch.zeros(1, dtype=values.dtype)])
    deltas = rewards[:length] + gamma * v[1:] - v[:-1]
    powers = torch.arange(length).unsqueeze(0) - torch.arange(length).unsqueeze(1)
    weights = torch.where(
        powers >= 0, (gamma * lam) ** powers.clamp(min=0).double(), torch.zeros((), dtype=torch.double)
    )
    return weights @ deltas.double()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_its_closed_form_and_stops_at_the_answers_end(gamma, lam):
    torch.manual_seed(1)
    lengths = [5, 1, 8, 3]
    mask = torch.tensor([[1] * n + [0] * (8 - n) for n in lengths])
    values, rewards = torch.randn(4, 8), torch.randn(4, 8)
    advantages, returns = ppo_math.get_advantages_and_returns(values, rewards * mask, mask, gamma, lam)
    for row, n in enumerate(lengths):
        want = _gae_matrix(values[row].double(), rewards[row].double(), n, gamma, lam)
        torch.testing.assert_close(advantages[row, :n].double(), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(returns[row, :n], advantages[row, :n] + values[row, :n])
        assert (advantages[row, n:] == 0).all()
        assert (returns[row, n:] == 0).all()


def test_gae_by_hand():
    advantages, returns = ppo_math.get_advantages_and_returns(
        torch.tensor([[0.5, 1.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1, 1]]), gamma=1.0, lam=0.5
    )
    # delta_1 = 2 - 1 = 1; delta_0 = 0 + 1 - 0.5 = 0.5; A_0 = 0.5 + 0.5 * 1
    assert advantages.tolist() == [[1.0, 1.0]]
    assert returns.tolist() == [[1.5, 2.0]]


def test_whitening_has_mean_zero_and_variance_one_over_real_tokens_only():
    torch.manual_seed(2)
    mask = (torch.rand(6, 9) > 0.4).long()
    values = torch.randn(6, 9) * 3 + 5
    values[mask == 0] = 1e6
    whitened = ppo_math.masked_whiten(values, mask)
    real = whitened[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-5)
    assert real.var().item() == pytest.approx(1, abs=1e-4)
    assert (whitened[mask == 0] == 0).all()


def test_whitening_split_over_ranks_equals_one_batch():
    torch.manual_seed(3)
    mask = (torch.rand(6, 5) > 0.3).long()
    values = torch.randn(6, 5)
    whole = ppo_math.masked_whiten(values, mask)
    # Each "rank" sums with what the other ranks would have sent at the same point.
    halves = [slice(0, 2), slice(2, 6)]
    mean = (values * mask).sum() / mask.sum()
    contributions = [
        torch.stack([(values * mask).sum(), mask.sum().float()]),
        torch.stack([(((values - mean) * mask) ** 2).sum(), mask.sum().float()]),
    ]
    for half in halves:
        answers = iter(contributions)
        part = ppo_math.masked_whiten(values[half], mask[half], reduce=lambda _, answers=answers: next(answers))
        torch.testing.assert_close(part, whole[half])


def test_policy_loss_by_hand_and_no_gradient_where_clipped():
    ratios = torch.tensor([[1.0, 1.5, 0.5, 1.5]])
    log_probs = ratios.log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    mask = torch.tensor([[1, 1, 1, 1]])
    result = ppo_math.policy_loss_sum(log_probs, torch.zeros(1, 4), advantages, mask, cliprange=0.2)
    # -1*1, clipped -1.2, unclipped -0.5 (the pessimistic one), unclipped +1.5
    assert result.loss.item() == pytest.approx(-1.0 - 1.2 - 0.5 + 1.5)
    assert result.clipped.item() == 1
    result.loss.backward()
    assert log_probs.grad[0].tolist() == pytest.approx([-1.0, 0.0, -0.5, 1.5])


def test_cliprange_high_moves_the_upper_bound_alone():
    log_probs = torch.tensor([[1.25, 1.5, 0.5, 1.5]]).log().requires_grad_()
    advantages, mask = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4)
    result = ppo_math.policy_loss_sum(log_probs, torch.zeros(1, 4), advantages, mask, 0.2, cliprange_high=0.28)
    # 1.25 lies within 1.28, 1.5 is clipped to it; 0.5 to 0.8 as ever; a rising ratio of a bad token is never clipped
    assert result.loss.item() == pytest.approx(-1.25 - 1.28 + 0.8 + 1.5)
    assert result.clipped.item() == 2
    result.loss.backward()
    assert log_probs.grad[0].tolist() == pytest.approx([-1.25, 0.0, 0.0, 1.5])


def test_the_mean_of_a_loss_is_over_tokens_or_over_answers_of_the_mean_over_theirs():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0], [10.0, 50.0, 50.0, 50.0], [50.0] * 4])
    for mean, expected in (("token", (12 + 10) / 5), ("answer", (3 + 10) / 2)):
        weighted = (ppo_math.loss_weights(mask, mean) * values).sum()
        assert (weighted / ppo_math.loss_units(mask, mean)).item() == pytest.approx(expected)
        # Rows of two ranks or micro-batches: sums and counts add up.
        parts = [mask[:1], mask[1:]], [values[:1], values[1:]]
        sums = sum((ppo_math.loss_weights(m, mean) * v).sum() for m, v in zip(*parts, strict=True))
        units = sum(ppo_math.loss_units(m, mean) for m in parts[0])
        assert (sums / units).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="row"):
        ppo_math.loss_weights(mask, "row")


def test_weights_multiply_each_tokens_policy_loss_and_its_gradient():
    log_probs = torch.tensor([[1.0, 1.5, 0.5, 1.5]]).log().requires_grad_()
    advantages, mask = torch.tensor([[1.0, 1.0, 1.0, -1.0]]), torch.tensor([[1, 1, 1, 0]])
    weights = torch.tensor([[2.0, 3.0, 0.5, 7.0]])
    result = ppo_math.policy_loss_sum(log_probs, torch.zeros(1, 4), advantages, mask, 0.2, weights)
    assert result.loss.item() == pytest.approx(-1.0 * 2 - 1.2 * 3 - 0.5 * 0.5)
    result.loss.backward()
    assert log_probs.grad[0].tolist() == pytest.approx([-2.0, 0.0, -0.25, 0.0])


def test_importance_weights_are_the_ratio_of_probabilities_truncated_and_one_at_pads():
    trained, sampler = torch.tensor([[0.4, 0.2, 0.9, 1e-30]]).log(), torch.tensor([[0.2, 0.4, 0.1, 1.0]]).log()
    mask = torch.tensor([[1, 1, 1, 0]])
    weights = ppo_math.truncated_importance_weights(trained, sampler, mask, limit=3.0)
    assert weights[0].tolist() == pytest.approx([2.0, 0.5, 3.0, 1.0])


def test_the_gap_of_log_probs_is_a_mean_over_tokens_of_all_ranks_and_a_maximum():
    scored, noted = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.1, -1.7, 5.0]])
    mean, largest = ppo_math.log_prob_gap(scored, noted, torch.tensor([[1, 1, 0]]))
    assert (mean.item(), largest.item()) == pytest.approx((0.2, 0.3))
    other = torch.tensor([2.0, 2.0])  # another rank: a sum of 2 over 2 tokens, 1.5 the largest
    mean, largest = ppo_math.log_prob_gap(
        scored, noted, torch.tensor([[1, 1, 0]]), lambda x: x + other, lambda x: x.clamp(min=1.5)
    )
    assert (mean.item(), largest.item()) == pytest.approx((0.6, 1.5))
    assert ppo_math.log_prob_gap(scored, noted, torch.zeros(1, 3))[1].item() == 0
    no_row = torch.zeros(0, 3)  # of an evaluation with fewer prompts than ranks
    mean, largest = ppo_math.log_prob_gap(no_row, no_row, no_row, lambda x: x + other, lambda x: x.clamp(min=1.5))
    assert (mean.item(), largest.item()) == pytest.approx((1.0, 1.5))


def test_value_loss_by_hand_and_no_gradient_where_clipped():
    values = torch.tensor([[1.0, 3.0, 0.1]]).requires_grad_()
    result = ppo_math.value_loss_sum(
        values, torch.zeros(1, 3), torch.tensor([[2.0, 3.0, 0.0]]), torch.tensor([[1, 1, 1]]), cliprange_value=0.2
    )
    # max((1-2)^2, (0.2-2)^2), max(0, (0.2-3)^2), max(0.1^2, 0.1^2)
    assert result.loss.item() == pytest.approx(0.5 * (3.24 + 7.84 + 0.01))
    assert result.clipped.item() == 2
    result.loss.backward()
    assert values.grad[0].tolist() == pytest.approx([0.0, 0.0, 0.1])
    weighted = ppo_math.value_loss_sum(
        values, values.detach(), torch.zeros(1, 3), torch.ones(1, 3), 0.2, torch.tensor([[0.5, 0.0, 2.0]])
    )
    assert weighted.loss.item() == pytest.approx(0.5 * (0.5 * 1 + 2 * 0.01))


def test_pads_do_not_change_losses():
    torch.manual_seed(4)
    new, old, advantages = torch.randn(3, 2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    poisoned = [torch.where(mask.bool(), x, torch.full_like(x, 50.0)) for x in (new, old, advantages)]
    a = ppo_math.policy_loss_sum(new, old, advantages, mask, 0.2)
    b = ppo_math.policy_loss_sum(*poisoned, mask, 0.2)
    assert a.loss.item() == pytest.approx(b.loss.item())
    assert a.approx_kl.item() == pytest.approx(b.approx_kl.item())


def test_explained_variance_is_one_for_perfect_values_and_zero_for_a_constant():
    mask = torch.tensor([[1, 1, 1, 0]])
    returns = torch.tensor([[1.0, 2.0, 4.0, 99.0]])
    assert ppo_math.explained_variance(returns.clone(), returns, mask).item() == pytest.approx(1)
    assert ppo_math.explained_variance(torch.full((1, 4), 2.0), returns, mask).item() == pytest.approx(0, abs=1e-9)


def test_adaptive_kl_moves_towards_the_target_and_is_bounded():
    controller = ppo_math.AdaptiveKLController(0.1, target=6.0, horizon=100)
    controller.update(kl=60.0, answers=10)
    assert controller.value == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))  # error clipped at 0.2
    above = controller.value
    controller.update(kl=1.0, answers=10)
    assert controller.value < above
    fixed = ppo_math.AdaptiveKLController(0.1, None, 100)
    fixed.update(kl=60.0, answers=10)
    assert fixed.value == 0.1
