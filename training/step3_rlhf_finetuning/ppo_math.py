"""The mathematics of PPO from human feedback, as free functions of tensors.

Shapes: B rows, A answer positions (all answers of a batch begin in one column), V vocabulary. ``mask`` [B, A] is 1 at
real answer tokens, the first end token (EOS) included, and 0 after it. All in fp32.

Sources: PPO, Schulman et al. 2017, https://arxiv.org/abs/1707.06347. GAE, Schulman et al. 2015, https://arxiv.org/abs/1506.02438.
RLHF, Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155.
RLOO, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740. GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300.
Dr. GRPO, Liu et al. 2025, https://arxiv.org/abs/2503.20783. DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476.
REINFORCE++, Hu et al. 2025, https://arxiv.org/abs/2501.03262.
KL estimators, http://joschu.net/blog/kl-approx.html. Details, Huang et al. 2024, https://arxiv.org/abs/2403.17031.
Truncated importance sampling (TIS), Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from utils.model.losses import gather_log_probs as gather_log_probs  # the published place of the name

Reduce = Callable[[torch.Tensor], torch.Tensor]  # a sum over ranks; the identity for one process


def _this_process_only(values: torch.Tensor) -> torch.Tensor:
    return values


def is_end_token(answer_ids: torch.Tensor, eos_token_id: int | Sequence[int]) -> torch.Tensor:
    """Which tokens end an answer, by one id or any of several: a bool for each."""
    return torch.isin(answer_ids, torch.as_tensor(eos_token_id, dtype=answer_ids.dtype, device=answer_ids.device))


def answer_mask(answer_ids: torch.Tensor, eos_token_id: int | Sequence[int]) -> torch.Tensor:
    """Real answer tokens: up to and with the first EOS, of whichever id, and whatever id pads have.

    [B, A] ids -> [B, A] of 0 and 1.
    """
    is_eos = is_end_token(answer_ids, eos_token_id).long()
    return (is_eos.cumsum(1) - is_eos == 0).long()


def masked_mean(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _this_process_only) -> torch.Tensor:
    """The mean over real tokens of all ranks; 0 where there are none."""
    total, count = reduce(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return total / count.clamp(min=1)


def masked_whiten(
    values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _this_process_only, eps: float = 1e-8
) -> torch.Tensor:
    """Mean 0 and (unbiased) variance 1 over the real tokens of all ranks; 0 elsewhere. [B, A] -> [B, A]."""
    mean = masked_mean(values, mask, reduce)
    centred = (values - mean) * mask
    squares, count = reduce(torch.stack([(centred**2).sum(), mask.sum().to(values.dtype)]))
    return centred * torch.rsqrt(squares / (count - 1).clamp(min=1) + eps)


def kl_per_token(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Estimates of KL(policy || reference) at sampled tokens, [B, A].

    k1 = log p - log q: unbiased, may be negative. k3 = q/p - 1 - log(q/p): unbiased, never negative, less variance.
    """
    log_ratio = ref_log_probs - log_probs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}: k1 or k3")


def log_prob_gap(
    log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    mask: torch.Tensor,
    reduce: Reduce = _this_process_only,
    reduce_max: Reduce = _this_process_only,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the log-probs of the sampler lie from those of a scoring pass, over the real tokens of all ranks.

    Args:
        log_probs, rollout_log_probs, mask: [B, A].
        reduce_max: the maximum over ranks.

    Returns:
        mean and maximum of the absolute difference in nats; 0 where there is no token.
    """
    gap = (log_probs - rollout_log_probs).abs().masked_fill(mask == 0, 0.0)
    largest = gap.amax() if gap.numel() else gap.new_zeros(())  # a rank may have no row of an evaluation
    return masked_mean(gap, mask, reduce), reduce_max(largest)


def truncated_importance_weights(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor, limit: float
) -> torch.Tensor:
    """min(p / q, limit) of each token, q the probability it was sampled with, p that of the policy that is trained.

    A sampler with kernels or a precision of its own draws from q, not from p; as constant factors of the policy loss
    these weights take that back, but for the truncation, which bounds their variance (TIS, Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training", equation of the truncated importance sampling).

    Args:
        log_probs: of a scoring pass, before the update; rollout_log_probs: of the sampler; both, and mask, [B, A].

    Returns:
        [B, A]; 1 outside the mask.
    """
    log_ratio = (log_probs - rollout_log_probs).masked_fill(mask == 0, 0.0)
    return log_ratio.exp().clamp(max=limit)


def place_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_ctl: float, clip_reward_value: float
) -> torch.Tensor:
    """Reward of each action: -kl_ctl * KL everywhere, and the clipped score on the last real answer token.

    Args:
        scores: [B], of whole answers; kl, mask: [B, A].

    Returns:
        [B, A]; 0 outside the mask. A row without real tokens has no reward.
    """
    rewards = -kl_ctl * kl * mask
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(dim=1, keepdim=True)
    placed = scores.clamp(-clip_reward_value, clip_reward_value).unsqueeze(1) * mask.gather(1, last)
    return rewards.scatter_add(1, last, placed.to(rewards.dtype))


def get_advantages_and_returns(
    values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation; nothing flows past an answer's end.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t, with V and A zero
    after the end.

    Args:
        values: [B, A], V of the state before each action; rewards, mask: [B, A].

    Returns:
        advantages [B, A], returns [B, A]; 0 outside the mask.
    """
    values = values * mask
    advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    length = values.shape[1]
    for t in reversed(range(length)):
        next_value = values[:, t + 1] if t + 1 < length else torch.zeros_like(advantage)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


def group_advantages(
    rewards: torch.Tensor, usable: torch.Tensor, group_size: int, kind: str, scale: bool = True, eps: float = 1e-4
) -> torch.Tensor:
    """How much better an answer is than the other answers to its prompt; no critic is needed.

    ``rloo``: the reward minus the mean reward of the others (Ahmadian et al. 2024, eq. 8).
    ``grpo``: the reward minus the group's mean, over its standard deviation (Shao et al. 2024, section 4.1.2); without
    ``scale`` not divided, so that prompts on which answers hardly differ do not weigh as much as those on which they
    do (Dr. GRPO, Liu et al. 2025, section 3.2). That, whitened over the batch, is the advantage of REINFORCE++ with
    a group baseline (Hu et al. 2025).

    Args:
        rewards: [B], of whole answers; each ``group_size`` rows in a row answer one prompt.
        usable: [B] bool; the other rows are no part of their group.
        scale: of grpo alone.

    Returns:
        [B]; 0 for rows that are not usable or have no other to be compared with.
    """
    value, counted = rewards.view(-1, group_size), usable.view(-1, group_size).to(rewards.dtype)
    n = counted.sum(1, keepdim=True)
    total = (value * counted).sum(1, keepdim=True)
    if kind == "rloo":
        advantage = value - (total - value) / (n - 1).clamp(min=1)
    elif kind == "grpo":
        advantage = (value - total / n.clamp(min=1)) * counted
        if scale:
            std = ((advantage**2).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
            advantage = advantage / (std + eps)
    else:
        raise ValueError(f"unknown group advantage {kind!r}: rloo or grpo")
    return (advantage * counted * (n > 1)).flatten()


def groups_with_spread(scores: torch.Tensor, usable: torch.Tensor, group_size: int) -> torch.Tensor:
    """Which groups hold usable answers of different scores; the others' answers all have the advantage 0.

    A group that is right (or wrong) throughout teaches nothing: DAPO (Yu et al. 2025, eq. 11) leaves it out.

    Args:
        scores: [B], of whole answers; each ``group_size`` rows in a row answer one prompt. usable: [B] bool.

    Returns:
        [B / group_size] bool.
    """
    value, counted = scores.view(-1, group_size), usable.view(-1, group_size)
    highest = value.masked_fill(~counted, -math.inf).amax(1)
    lowest = value.masked_fill(~counted, math.inf).amin(1)
    return highest > lowest


def loss_weights(mask: torch.Tensor, mean: str) -> torch.Tensor:
    """What each token weighs in a sum whose division by ``loss_units`` makes the mean of a loss.

    ``token``: each token alike (DAPO, Yu et al. 2025, eq. 12; so do the PPO of Ziegler et al. and Dr. GRPO, whose
    constant divisor is a matter of the learning rate). ``answer``: each answer alike, whatever its length: 1 / length
    (GRPO, Shao et al. 2024, eq. 3).

    Args:
        mask: [B, A].

    Returns:
        [B, A]; 0 outside the mask.
    """
    if mean == "token":
        return mask.float()
    if mean == "answer":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    raise ValueError(f"unknown mean of a loss {mean!r}: token or answer")


def loss_units(mask: torch.Tensor, mean: str) -> torch.Tensor:
    """How many tokens, or answers, the mean of a loss is taken over: a scalar, of the rows of ``mask`` [B, A]."""
    return mask.sum() if mean == "token" else mask.any(dim=1).sum()


@dataclass
class PolicyLoss:
    """Sums over real tokens, to be divided by the count of the whole mini-batch: the loss by that of what it is a mean
    over (``loss_units``), the others by that of tokens."""

    loss: torch.Tensor  # scalar with gradient
    clipped: torch.Tensor  # tokens whose gradient the clip stopped
    approx_kl: torch.Tensor  # KL(old || new), k3
    ratio: torch.Tensor  # new over old probability


def policy_loss_sum(
    log_probs, old_log_probs, advantages, mask, cliprange: float, weights=None, cliprange_high: float | None = None
) -> PolicyLoss:
    """PPO's clipped surrogate, a sum over real tokens: max(-A r, -A clip(r, 1-c, 1+c)), r = new / old. All [B, A].

    ``weights``: factors of the tokens' terms, without gradient (``truncated_importance_weights``, ``loss_weights``);
    None for 1. ``cliprange_high``: c of the upper bound where it is another: DAPO's clip-higher (Yu et al. 2025,
    section 3.1) lets unlikely tokens gain more before they are held.
    """
    log_ratio = (log_probs - old_log_probs) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    highest = 1 + (cliprange if cliprange_high is None else cliprange_high)
    clipped = -advantages * ratio.clamp(1 - cliprange, highest)
    with torch.no_grad():
        stopped = ((clipped > unclipped) * mask).sum()
        approx_kl = ((torch.expm1(log_ratio) - log_ratio) * mask).sum()
        ratio_sum = (ratio * mask).sum()
    terms = torch.maximum(unclipped, clipped) * (mask if weights is None else weights * mask)
    return PolicyLoss(terms.sum(), stopped, approx_kl, ratio_sum)


@dataclass
class ValueLoss:
    """Sums over real tokens, to be divided by the count of the whole mini-batch, as those of PolicyLoss."""

    loss: torch.Tensor  # scalar with gradient
    clipped: torch.Tensor  # tokens whose gradient the clip stopped
    value: torch.Tensor  # the values themselves


def value_loss_sum(values, old_values, returns, mask, cliprange_value: float, weights=None) -> ValueLoss:
    """Half the squared error of the value, clipped around the old value, summed over real tokens. All [B, A].

    ``weights``: factors of the tokens' terms (``loss_weights``); None for 1.
    """
    clipped_values = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    stopped = ((clipped > unclipped) * mask).sum().detach()
    terms = torch.maximum(unclipped, clipped) * (mask if weights is None else weights * mask)
    return ValueLoss(0.5 * terms.sum(), stopped, (values * mask).sum().detach())


def explained_variance(values, returns, mask, reduce: Reduce = _this_process_only) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns) over the real tokens of all ranks; 1 is perfect, 0 is a constant."""
    sums = [mask.sum().to(values.dtype)]
    for x in (returns, returns - values):
        sums += [(x * mask).sum(), (x**2 * mask).sum()]
    count, r, rr, e, ee = reduce(torch.stack(sums).double())
    count = count.clamp(min=1)
    variance, error = rr / count - (r / count) ** 2, ee / count - (e / count) ** 2
    return 1 - error / variance.clamp(min=1e-12)


class AdaptiveKLController:
    """Moves the KL coefficient towards a target, in proportion to the error (Ziegler et al. 2019, section 2.2).

    Args:
        target: nats per answer; None keeps the coefficient fixed.
        horizon: answers over which the coefficient can change by about its own size times the clipped error.
    """

    def __init__(self, value: float, target: float | None, horizon: int):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, answers: int) -> None:
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * answers / self.horizon
