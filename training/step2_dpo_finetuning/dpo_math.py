"""The mathematics of DPO: log-probs of whole answers, losses of pairs, and what is reported of them.

With pi the policy, pi_ref the reference, x a prompt, y an answer and |y| its tokens, a log-ratio is
log pi(y|x) - log pi_ref(y|x), and beta times that is the reward that the policy implies for y (Rafailov et al., 2023,
https://arxiv.org/abs/2305.18290, eq. 5). All log-probs are natural, in nats, and sums over an answer are fp64: a
log-ratio is the small difference of two large sums.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.data.batching import IGNORE_INDEX
from utils.model.losses import LabelLogProbs
from utils.model.reward_model import pair_accuracy


def answer_log_probs(label_log_probs: LabelLogProbs, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """log pi(answer | prompt): the sum over its labels, each predicted from the position before.

    Args:
        inputs: of the model's forward, [answers, length]; labels: [answers, length], -100 outside the answers.

    Returns:
        [answers] fp64; 0 where an answer has no label.
    """
    has_label = labels[:, 1:] != IGNORE_INDEX
    log_probs, _ = label_log_probs(inputs, labels)
    # Put back into their rows, and not added up by index: on a GPU that would be in any order.
    table = torch.zeros(has_label.shape, dtype=torch.float64, device=labels.device)
    return table.masked_scatter(has_label, log_probs.double()).sum(1)


def answer_lengths(labels: torch.Tensor) -> torch.Tensor:
    """[answers, length] -> [answers]: the tokens that ``answer_log_probs`` adds up, 1 where there are none."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(1).clamp(min=1)


@dataclass(frozen=True)
class Side:
    """The chosen answers of some pairs, or the rejected ones.

    Args:
        log_probs: [pairs] fp64, of the policy. reference: [pairs] fp64, of the reference; zeros where there is none.
        lengths: [pairs], tokens.
    """

    log_probs: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor

    @property
    def log_ratios(self) -> torch.Tensor:
        return self.log_probs - self.reference

    @property
    def mean_log_ratios(self) -> torch.Tensor:
        """Per token."""
        return self.log_ratios / self.lengths

    @classmethod
    def of(cls, which: torch.Tensor, log_probs, reference, lengths) -> "Side":
        """The answers at the places ``which`` [pairs] of a batch."""
        return cls(log_probs[which], reference[which], lengths[which])


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a pair of answers, as the flags of DPO name it.

    Args:
        kind: what is made of the log-ratios c of the chosen and r of the rejected answer.
            sigmoid: -log sigmoid(beta (c - r)) (DPO, eq. 7). With label_smoothing e: (1 - e) of that and e of the same
                with the answers exchanged (conservative DPO: Mitchell, 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3).
            ipo: (c - r - 1 / (2 beta))^2 with log-ratios per token (Azar et al., 2023,
                https://arxiv.org/abs/2310.12036, eq. 17; sums would make the loss grow with the length squared, and TRL
                takes means, too).
            hinge: max(0, 1 - beta (c - r)) (SLiC-HF: Zhao et al., 2023, https://arxiv.org/abs/2305.10425, eq. 2, on
                log-ratios as Liu et al., 2023, https://arxiv.org/abs/2309.06657, eq. 10, have it).
            apo_zero: (1 - sigmoid(beta c)) + sigmoid(beta r) (D'Oosterlinck et al., 2024,
                https://arxiv.org/abs/2408.06266, eq. 7).
        rpo_alpha: adds so much of -log pi(chosen) / |chosen| (Pang et al., 2024, https://arxiv.org/abs/2404.19733,
            eq. 1).
        reference_free: log-ratios are mean log-probs per token, with no reference, and beta (c - r) is to exceed
            ``simpo_gamma`` (SimPO: Meng et al., 2024, https://arxiv.org/abs/2405.14734, eq. 6).
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    reference_free: bool = False
    simpo_gamma: float = 0.0

    @classmethod
    def of(cls, args) -> "PreferenceLoss":
        return cls(
            args.dpo_loss, args.beta, args.label_smoothing, args.rpo_alpha, args.reference_free, args.simpo_gamma
        )

    def __call__(self, chosen: Side, rejected: Side) -> torch.Tensor:
        """[pairs] fp64."""
        loss = self.comparison(chosen, rejected)
        if self.rpo_alpha:
            loss = loss - self.rpo_alpha * chosen.log_probs / chosen.lengths
        return loss

    def comparison(self, chosen: Side, rejected: Side) -> torch.Tensor:
        """The loss without its SFT term."""
        if self.kind == "ipo":
            return (chosen.mean_log_ratios - rejected.mean_log_ratios - 1 / (2 * self.beta)) ** 2
        chosen_reward, rejected_reward = self.rewards(chosen), self.rewards(rejected)
        if self.kind == "apo_zero":
            return torch.sigmoid(-chosen_reward) + torch.sigmoid(rejected_reward)
        margin = chosen_reward - rejected_reward - self.simpo_gamma
        if self.kind == "hinge":
            return torch.relu(1 - margin)
        smoothing = self.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)

    def rewards(self, side: Side) -> torch.Tensor:
        """[pairs]: the rewards that the policy implies; per token without a reference."""
        return self.beta * (side.mean_log_ratios if self.reference_free else side.log_ratios)

    def figures(self, chosen: Side, rejected: Side) -> dict[str, torch.Tensor]:
        """What is reported of each pair, by name: [pairs], without gradients.

        ``kl``, in nats per answer: the mean of -log-ratio over both answers. Were the data's answers samples of the
        reference, it would estimate KL(reference || policy); it says how far the policy has moved on them.
        """
        with torch.no_grad():
            chosen_reward, rejected_reward = self.rewards(chosen), self.rewards(rejected)
            figures = {
                "accuracy": pair_accuracy(chosen_reward, rejected_reward),
                "margin": chosen_reward - rejected_reward,
                "rewards/chosen": chosen_reward,
                "rewards/rejected": rejected_reward,
                "log_probs/chosen": chosen.log_probs.detach(),
                "log_probs/rejected": rejected.log_probs.detach(),
            }
            if not self.reference_free:
                figures["kl"] = -(chosen.log_ratios + rejected.log_ratios) / 2
        return figures
