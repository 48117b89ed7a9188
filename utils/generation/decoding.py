"""Two ways of choosing tokens that transformers no longer has: diverse beam search and contrastive search.

Both take left-padded batches and give ids up to and with the first stop id, as ``saved_model.generate_ids`` does.
"""

import torch
from torch.nn.functional import normalize
from transformers import DynamicCache

from utils.generation.sampling import CachedRows
from utils.generation.saved_model import LanguageModel, left_padded, up_to_stop
from utils.model.soft_prompt import SoftPromptModel
from utils.process.errors import UserError

UNREACHABLE = -1e9  # the log-prob of a beam that is not there


# ---------------------------------------------------------------- pure functions


def hamming_penalty(tokens_of_groups: list[torch.Tensor], vocabulary: int) -> torch.Tensor:
    """How many beams of the groups before have just chosen each token.

    Args:
        tokens_of_groups: a tensor [b, beams of the group] for each group before; -1 for a beam that chose none.

    Returns:
        [b, vocabulary] counts: the dissimilarity term of Vijayakumar et al. 2016, https://arxiv.org/abs/1610.02424.
    """
    tokens = torch.cat(tokens_of_groups, dim=1)
    counts = torch.zeros(len(tokens), vocabulary + 1, device=tokens.device)
    counts.scatter_add_(1, tokens + 1, torch.ones_like(tokens, dtype=counts.dtype))
    return counts[:, 1:]


def contrastive_scores(
    probs: torch.Tensor, candidates: torch.Tensor, context: torch.Tensor, mask: torch.Tensor, alpha: float
) -> torch.Tensor:
    """(1 - alpha) p(v) - alpha max_j cos(h_v, h_j): a likely token that repeats nothing of the context scores high.

    Su et al. 2022, https://arxiv.org/abs/2202.06417, equation 5.

    Args:
        probs: [b, k] of the candidates; candidates: [b, k, d], their hidden states; context: [b, t, d], those of the
            tokens before; mask: [b, t], 0 for padding.

    Returns:
        [b, k] scores.
    """
    similarity = normalize(candidates.float(), dim=-1) @ normalize(context.float(), dim=-1).transpose(1, 2)
    similarity = similarity.masked_fill(mask[:, None, :] == 0, -torch.inf)
    return (1 - alpha) * probs - alpha * similarity.max(dim=-1).values


def _cached_rows(lm: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> CachedRows:
    if isinstance(lm.model, SoftPromptModel):
        raise UserError(f"{lm.name} is a soft prompt: it can be asked by greedy, sampling and beam search only")
    ids, mask = left_padded(lm, prompts)
    cache = DynamicCache(config=lm.model.config)
    return CachedRows(lm.model, ids, mask, cache, ids.shape[1] + max_new_tokens)


# ---------------------------------------------------------------- diverse beam search


class _BeamGroup:
    """The beams of one group for one prompt.

    Attributes:
        running: (ids, summed log-prob) of each beam, the best first.
        finished: (summed log-prob / length, ids), the best first.
    """

    def __init__(self, width: int):
        self.width = width
        self.running = [([], 0.0)] + [([], UNREACHABLE)] * (width - 1)
        self.finished: list[tuple[float, list[int]]] = []
        self.done = False

    def advance(self, candidates: list[tuple[int, int, float]], stop_ids: list[int], is_last: bool) -> list[int]:
        """Go on with the best of (beam, token, summed log-prob), ordered by it; the beams that were continued."""
        if self.done:
            return []
        running, parents = [], []
        for rank, (beam, token, total) in enumerate(candidates):
            ids = [*self.running[beam][0], token]
            if token not in stop_ids and not is_last:
                running.append((ids, total))
                parents.append(beam)
            elif rank < self.width:
                self.finished.append((total / len(ids), ids))
        self.finished = sorted(self.finished, key=lambda answer: -answer[0])[: self.width]
        if is_last:
            self.done = True
            return []
        self.running, parents = running[: self.width], parents[: self.width]
        # What runs now can end no better than as if it ended here.
        ids, total = self.running[0]
        self.done = len(self.finished) == self.width and total / len(ids) <= self.finished[-1][0]
        return parents


def _choose_in_groups(
    groups: list[list[_BeamGroup]],
    log_probs: torch.Tensor,
    diversity_penalty: float,
    stop_ids: list[int],
    is_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the groups of each prompt choose their next tokens, one group after another.

    Args:
        groups: of each prompt; log_probs: [batch, groups, width, vocabulary].

    Returns:
        tokens [batch, groups * width], -1 in a group that is done; and the beam of its prompt that each of them
        continues, in the same shape.
    """
    _, num_groups, width, vocabulary = log_probs.shape
    num_candidates = min(max(2, 1 + len(stop_ids)) * width, width * vocabulary)
    tokens, parents = [], []  # of each group: [batch, width]
    for number in range(num_groups):
        members = [groups_of_prompt[number] for groups_of_prompt in groups]
        totals = log_probs.new_tensor([[total for _, total in group.running] for group in members])
        totals = log_probs[:, number] + totals.unsqueeze(-1)
        if tokens:
            totals = totals - diversity_penalty * hamming_penalty(tokens, vocabulary).unsqueeze(1)
        best, places = totals.flatten(1).topk(num_candidates)
        beams_and_tokens = (places // vocabulary).tolist(), (places % vocabulary).tolist()
        group_tokens, group_parents = [], []
        for group, *candidates in zip(members, *beams_and_tokens, best.tolist(), strict=True):
            continued = group.advance(list(zip(*candidates, strict=True)), stop_ids, is_last)
            group_tokens.append([ids[-1] for ids, _ in group.running] if continued else [-1] * width)
            group_parents.append(continued or list(range(width)))
        tokens.append(torch.tensor(group_tokens, device=log_probs.device))
        parents.append(torch.tensor(group_parents, device=log_probs.device) + number * width)
    return torch.cat(tokens, dim=1), torch.cat(parents, dim=1)


@torch.no_grad()
def diverse_beam_ids(
    lm: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    num_return_sequences: int = 1,
) -> list[list[int]]:
    """Beam search in groups that choose one after another, a token costing what groups before have chosen it.

    Vijayakumar et al. 2016, https://arxiv.org/abs/1610.02424, with the Hamming term. A group of one is a beam search of
    its own; penalty 0 lets all groups find the same. Ends and lengths count as in transformers' beam search.

    Returns:
        num_return_sequences rows for each prompt, the best of all groups first.
    """
    width, batch = num_beams // num_beam_groups, len(prompts)
    groups = [[_BeamGroup(width) for _ in range(num_beam_groups)] for _ in prompts]
    rows = _cached_rows(lm, prompts, max_new_tokens)
    logits = rows.forward().logits[:, -1]
    copies = torch.arange(batch, device=logits.device).repeat_interleave(num_beams)
    logits = logits[copies]
    rows.select(copies)
    offsets = torch.arange(batch, device=logits.device).unsqueeze(1) * num_beams
    for step in range(max_new_tokens):
        log_probs = logits.float().log_softmax(dim=-1).view(batch, num_beam_groups, width, -1)
        is_last = step == max_new_tokens - 1
        tokens, parents = _choose_in_groups(groups, log_probs, diversity_penalty, lm.stop_ids, is_last)
        if all(group.done for groups_of_prompt in groups for group in groups_of_prompt):
            break
        rows.select((parents + offsets).flatten())
        rows.append(tokens.flatten().clamp(min=0))  # any token does in the rows of a group that is done
        logits = rows.forward().logits[:, -1]

    answers = []
    for groups_of_prompt in groups:
        finished = [answer for group in groups_of_prompt for answer in group.finished]
        finished.sort(key=lambda answer: -answer[0])
        answers += [up_to_stop(ids, lm.stop_ids) for _, ids in finished[:num_return_sequences]]
    return answers


# ---------------------------------------------------------------- contrastive search


@torch.no_grad()
def contrastive_ids(
    lm: LanguageModel, prompts: list[list[int]], max_new_tokens: int, top_k: int, penalty_alpha: float
) -> list[list[int]]:
    """The token of the top_k likeliest that scores best by ``contrastive_scores``, over and over; one row per prompt.

    Alpha 0 or k 1 is greedy. Hidden states are those of the last layer.
    """
    batch = len(prompts)
    rows = _cached_rows(lm, prompts, max_new_tokens)
    output = rows.forward(output_hidden_states=True)
    logits, context = output.logits[:, -1], output.hidden_states[-1]
    answers = torch.zeros(batch, 0, dtype=torch.long, device=logits.device)
    stop_ids = torch.tensor(lm.stop_ids, device=logits.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=logits.device)
    numbers = torch.arange(batch, device=logits.device)
    for _ in range(max_new_tokens):
        probs, candidates = logits.float().softmax(dim=-1).topk(min(top_k, logits.shape[-1]))
        k = probs.shape[1]
        mask = rows.mask
        rows.select(numbers.repeat_interleave(k))
        rows.append(candidates.flatten())
        output = rows.forward(output_hidden_states=True)
        hidden = output.hidden_states[-1].view(batch, k, -1)
        best = contrastive_scores(probs, hidden, context, mask, penalty_alpha).argmax(dim=1)
        chosen = numbers * k + best
        rows.select(chosen)
        logits, context = output.logits[chosen, -1], torch.cat([context, hidden[numbers, best].unsqueeze(1)], dim=1)
        token = candidates[numbers, best]
        answers = torch.cat([answers, token.unsqueeze(1)], dim=1)
        finished = finished | torch.isin(token, stop_ids)
        if finished.all():
            break
    return [up_to_stop(row, lm.stop_ids) for row in answers.tolist()]
