"""Log-probabilities and losses of tokens, always in fp32 whatever the model's dtype.

Logits are the largest tensor of training: [batch, length, vocabulary]. Here they never exist whole, in any dtype: only
positions with a label are scored, chunk by chunk, and the backward pass recomputes a chunk instead of storing it.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.data.batching import IGNORE_INDEX
from utils.model.inputs import embedding_rows, model_inputs, unwrap
from utils.module.hooks import forward_replaced, outputs_recorded
from utils.process.console import print_rank_0

# Of fp32 logits at a time; a backward pass holds about three times that. Every chunk adds to the gradient of the whole
# head; a GPU, faster at products than at that, wants larger ones for a big vocabulary.
CHUNK_BYTES = 2**27
GPU_CHUNK_BYTES = 2**28

DIVERGED = 20.0  # nats per token: a guess among a million tokens costs 14

Logits = Callable[[torch.Tensor], torch.Tensor]  # [positions, hidden] -> [positions, vocabulary]


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where no number could hold it or nobody could read it."""
    return math.exp(loss) if loss < DIVERGED else math.inf


def warn_diverged(loss: float) -> None:
    """Say so where an evaluation's loss, in nats per token, is far above that of any guess."""
    if loss >= DIVERGED:
        print_rank_0(
            f"WARNING: loss {loss:.1f} per token: the model has diverged, as guessing among a million tokens costs 14; "
            "lower the learning rate"
        )


def _score(hidden, labels, to_logits: Logits, temperature: float, with_entropy: bool) -> torch.Tensor:
    """[positions, hidden] and [positions] labels -> [positions, 1 or 2] fp32: log p(label), and the entropy."""
    logits = to_logits(hidden).float()
    logits = logits if temperature == 1 else logits / temperature  # a copy of the largest tensor there is
    all_log_probs = logits.log_softmax(dim=-1)
    log_probs = -F.nll_loss(all_log_probs, labels, reduction="none")
    if not with_entropy:
        return log_probs.unsqueeze(1)
    with torch.no_grad():
        entropy = -all_log_probs.exp().mul_(all_log_probs).sum(-1)
    return torch.stack([log_probs, entropy], dim=1)


def score_in_chunks(hidden, labels, to_logits: Logits, vocabulary: int, temperature=1.0, with_entropy=False):
    """log p(label), and with ``with_entropy`` the entropy, over chunks that the backward pass recomputes.

    All but the last: its turn in the backward pass comes first, when its recomputed logits would take the same memory.

    Args:
        hidden, labels: [positions, width] and [positions]; to_logits: what makes logits of hidden states.
        vocabulary: entries of the logits, which the size of a chunk follows from.

    Returns:
        [positions, 1 or 2] fp32.
    """
    # By the machine's device, and not by that of the tensors: an estimate of memory passes here on the meta device.
    size = CHUNK_BYTES if get_accelerator().device_name() == "cpu" else GPU_CHUNK_BYTES
    positions = max(1, size // (4 * vocabulary))
    parts = []
    chunks = list(zip(hidden.split(positions), labels.split(positions), strict=True))
    for number, chunk in enumerate(chunks, start=1):
        arguments = *chunk, to_logits, temperature, with_entropy
        recomputed = torch.is_grad_enabled() and number < len(chunks)
        parts.append(checkpoint(_score, *arguments, use_reentrant=False) if recomputed else _score(*arguments))
    return torch.cat(parts)


def gather_log_probs(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p(label) under softmax(logits / temperature), for logits that are there already.

    Args:
        logits: [B, A, V] in any dtype, those that predict ``labels``; labels: [B, A].

    Returns:
        [B, A] fp32. Logits are upcast chunk by chunk, so no whole fp32 copy ever exists.
    """
    scores = score_in_chunks(logits.flatten(0, 1), labels.flatten(), nn.Identity(), logits.shape[-1], temperature)
    return scores.view(labels.shape)


@contextmanager
def _logits_replaced(model, replacement):
    """While open, ``model(...)`` returns ``replacement(logits)``; DeepSpeed's hooks, which come later, see that."""

    def replace(_model, _arguments, output):
        output.logits = replacement(output.logits)

    handle = model.register_forward_hook(replace, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _after_head(model, head) -> Logits | None:
    """What the family's forward does to the head's output: nothing, a factor (Cohere, Granite), a soft cap (Gemma 2).

    Found by letting the head return known numbers x and comparing them with the model's logits: x, s x, or
    c tanh(s x / c). None for any other function, and for a model that does not call its head.
    """
    if head is None:
        return None
    probe = torch.linspace(-200, 200, embedding_rows(model), device=model.device)
    probe[0], probe[1] = 1e-3, 1e6
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    was_training = model.training
    model.eval()
    with forward_replaced(head, lambda hidden: probe.expand(*hidden.shape[:-1], -1).clone()):
        logits = model(**model_inputs(model, ids, torch.ones_like(ids))).logits[0, -1].float()
    model.train(was_training)
    if logits.shape != probe.shape:
        return None
    scale, limit = (logits[0] / probe[0]).item(), logits[1].item()
    capped = abs(limit) < 0.5 * abs(scale * probe[1].item())

    def after(x):
        x = x if abs(scale - 1) < 1e-5 else x * scale
        return limit * torch.tanh(x / limit) if capped else x

    return after if torch.allclose(after(probe), logits, rtol=1e-3, atol=1e-6) else None


class LabelLogProbs:
    """log p(label) from a causal language model, at the positions that have a label.

    The model runs as its family wrote it, inside its engine; during a call its head returns scores of labels instead
    of logits. So ZeRO-3 gathers the head's weights once per pass as ever, and LoRA on the head counts. A family that
    does something unknown to its logits has them computed whole, and upcast in chunks.

    Args:
        engine: a DeepSpeed engine around a causal language model, or such a model. Under ZeRO-3 all ranks must make
            one together, because the model is run once.
    """

    def __init__(self, engine):
        self.engine, self.model = engine, unwrap(engine)
        # Read once: ZeRO-3 takes a weight that is touched inside the head's forward for one the head needs.
        self.rows = embedding_rows(self.model)
        self.head = self.model.get_output_embeddings()
        self.after_head = _after_head(self.model, self.head)

    def __call__(self, inputs: dict, labels, temperature: float = 1.0, vocabulary=None, with_entropy: bool = False):
        """Run the model and score the labels.

        Args:
            inputs: keyword arguments of the model's forward.
            labels: in the shape of input_ids; each is predicted from the position before, -100 stands for no label.
            vocabulary: how many entries, from the first on, have a probability; None for all.

        Returns:
            log-probs of the labels that are not -100, row by row, fp32; and as many entropies in nats of the
            distributions that gave them, or None.
        """
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        has_label = targets != IGNORE_INDEX

        def scores(states, to_logits):
            states = states[:, -targets.shape[1] :]  # a soft prompt stands in front of the tokens and has no labels
            return score_in_chunks(
                states[has_label],
                targets[has_label],
                lambda part: to_logits(part)[..., :vocabulary],
                self.rows,
                temperature,
                with_entropy,
            ).unsqueeze(0)

        if self.after_head is None:
            with _logits_replaced(self.model, lambda logits: scores(logits, nn.Identity())):
                output = self.engine(**inputs)
        else:
            head_forward, after_head = self.head.forward, self.after_head

            def scoring_head(states):
                return scores(states, lambda part: after_head(head_forward(part).float()))

            with (
                forward_replaced(self.head, scoring_head),
                outputs_recorded(self.head) as outputs,
                # The family has scaled the scores as if they were logits: take them as the head returned them.
                _logits_replaced(self.model, lambda _: outputs.pop()),
            ):
                output = self.engine(**inputs)
        result = output.logits[0]
        return result[:, 0], result[:, 1].detach() if with_entropy else None


def causal_lm_loss_sum(label_log_probs: LabelLogProbs, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """The sum of -log p(label) over all labels that are not -100, each predicted from the position before."""
    log_probs, _ = label_log_probs(inputs, labels.view_as(inputs["input_ids"]))
    return -log_probs.sum()


def label_count(labels: torch.Tensor) -> int:
    """How many terms ``causal_lm_loss_sum`` has."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
