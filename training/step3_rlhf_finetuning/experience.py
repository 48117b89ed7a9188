"""What one round of generation leaves behind for training, and its micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from utils.arguments import RLHFBatchSizes


@dataclass
class Experience:
    """Rollouts of B prompts (P columns, left-padded) and their answers (A columns, right-padded).

    Rows whose answer is empty or whose score is not finite keep their place with a mask of zeros: they weigh nothing.
    """

    input_ids: torch.Tensor  # [B, P + A] prompt and answer
    attention_mask: torch.Tensor  # [B, P + A] real tokens, the end token included
    answer_mask: torch.Tensor  # [B, A] answer tokens that train: 1 up to and with the first end token
    log_probs: torch.Tensor  # [B, A] of the policy that sampled: what updates and the KL penalty go by
    ref_log_probs: torch.Tensor  # [B, A] of the reference
    scores: torch.Tensor  # [B] of whole answers: reward model and reward functions, after the missing-EOS penalty
    ended: torch.Tensor  # [B] 1 where an end token came
    score_parts: torch.Tensor  # [B, n] what the reward model and each reward function gave, unweighted
    values: torch.Tensor | None = None  # [B, A] of the state before each answer token; None without a critic
    rollout_log_probs: torch.Tensor | None = None  # [B, A] noted by the sampler; None where it notes none
    scored_log_probs: torch.Tensor | None = None  # [B, A] of a scoring pass over the answers; None without one
    rewards: torch.Tensor | None = None  # [B, A] KL penalty and score, filled in by compute_rewards
    advantages: torch.Tensor | None = None  # [B, A]
    returns: torch.Tensor | None = None  # [B, A]
    has_spread: torch.Tensor | None = None  # [B] bool: the answers to its prompt differ in score; None with gae

    @property
    def answer_width(self) -> int:
        return self.answer_mask.shape[1]

    @property
    def usable(self) -> torch.Tensor:
        """[B] bool: answers that train."""
        return self.answer_mask.any(dim=1)

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.answer_width

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows) -> "Experience":
        """Rows by slice, list or index tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Experience(**{name: None if value is None else value[rows] for name, value in values.items()})

    def of_groups_with_spread(self) -> "Experience":
        """The same rows, of which those that ``has_spread`` leaves out weigh nothing."""
        return replace(self, answer_mask=self.answer_mask * self.has_spread.unsqueeze(1))

    @staticmethod
    def concat(parts: list["Experience"], pad_token_id: int) -> "Experience":
        """All rows of several rounds: prompts padded further on the left, answers on the right."""
        if len(parts) == 1:
            return parts[0]
        prompt_width = max(part.prompt_width for part in parts)
        answer_width = max(part.answer_width for part in parts)

        def widen(part: Experience, name: str):
            value = getattr(part, name)
            if value is None or value.dim() == 1 or name == "score_parts":
                return value
            right = answer_width - part.answer_width
            left = prompt_width - part.prompt_width if name in ("input_ids", "attention_mask") else 0
            return F.pad(value, (left, right), value=pad_token_id if name == "input_ids" else 0)

        columns = {f.name: [widen(part, f.name) for part in parts] for f in fields(Experience)}
        return Experience(**{n: None if values[0] is None else torch.cat(values) for n, values in columns.items()})


@dataclass
class MicroBatch:
    """What one forward and backward pass of an update sees: rollouts, and text for the ptx loss if there is some."""

    experience: Experience
    unsupervised: dict | None = None


def micro_batch_windows(
    experience: Experience,
    batch: RLHFBatchSizes,
    generator: np.random.Generator,
    unsupervised: Iterator[dict] | None = None,
) -> Iterator[list[MicroBatch]]:
    """One pass over the experience in a fresh order: lists of the micro-batches of one optimizer step.

    Args:
        unsupervised: endless batches of text, one for each micro-batch.
    """
    order = torch.from_numpy(generator.permutation(len(experience))).to(experience.input_ids.device)
    for window in order.split(batch.micro_batch * batch.accumulation):
        yield [
            MicroBatch(experience[rows], next(unsupervised) if unsupervised else None)
            for rows in window.split(batch.micro_batch)
        ]
