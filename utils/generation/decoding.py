"""Two ways of choosing tokens that transformers no longer has: diverse beam search and contrastive search.

Both take left-padded batches and give ids up to and with the first stop id, as generation.generate_ids does.
"""

import torch
from torch.nn.functional import normalize
from transformers import DynamicCache

from utils.generation.saved_model import LanguageModel, left_padded, up_to_stop
from utils.model.inputs import forward_accepts, position_ids_from_mask
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


# ---------------------------------------------------------------- the model, token by token


class _Rows:
    """Rows that share a cache: a forward pass over new tokens, and a choice of the rows that go on."""

    def __init__(self, lm: LanguageModel, prompts: list[list[int]]):
        if isinstance(lm.model, SoftPromptModel):
            raise UserError(f"{lm.name} is a soft prompt: it can be asked by greedy, sampling and beam search only")
        self.model = lm.model
        self.tokens, self.mask = left_padded(lm, prompts)
        self.cache = DynamicCache(config=lm.model.config)

    def forward(self, **options):
        """The model's output for the tokens that are not in the cache yet."""
        if forward_accepts(self.model, "position_ids"):
            options["position_ids"] = position_ids_from_mask(self.mask)[:, -self.tokens.shape[1] :]
        return self.model(
            input_ids=self.tokens, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **options
        )

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows, of which any may come several times."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def append(self, tokens: torch.Tensor) -> None:
        """A token [rows] for each row, which the next forward pass reads."""
        self.tokens = tokens.unsqueeze(1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)


# ---------------------------------------------------------------- diverse beam search


class _Group:
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

    def take(self, candidates: list[tuple[int, int, float]], stop_ids: list[int], is_last: bool) -> list[int]:
        """Go on with the best of (beam, token, summed log-prob), ordered by it; the beams that were continued."""
        if self.done:
            return []
        going_on, parents = [], []
        for rank, (beam, token, total) in enumerate(candidates):
            ids = [*self.running[beam][0], token]
            if token not in stop_ids and not is_last:
                going_on.append((ids, total))
                parents.append(beam)
            elif rank < self.width:
                self.finished.append((total / len(ids), ids))
        self.finished = sorted(self.finished, key=lambda one: -one[0])[: self.width]
        if is_last:
            self.done = True
            return []
        self.running, parents = going_on[: self.width], parents[: self.width]
        # What runs now can end no better than as if it ended here.
        ids, total = self.running[0]
        self.done = len(self.finished) == self.width and total / len(ids) <= self.finished[-1][0]
        return parents


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
    groups = [[_Group(width) for _ in range(num_beam_groups)] for _ in prompts]
    rows = _Rows(lm, prompts)
    logits = rows.forward(**_last_logit(lm.model)).logits[:, -1]
    first = torch.arange(batch, device=logits.device).repeat_interleave(num_beams)
    logits = logits[first]
    rows.select(first)
    num_candidates = max(2, 1 + len(lm.stop_ids)) * width
    for step in range(max_new_tokens):
        log_probs = logits.float().log_softmax(dim=-1).view(batch, num_beam_groups, width, -1)
        vocabulary = log_probs.shape[-1]
        chosen, parents = [], []  # of each group: [batch, width]
        for number in range(num_beam_groups):
            of_group = [groups_of_prompt[number] for groups_of_prompt in groups]
            totals = log_probs[:, number] + _tensor([[total for _, total in g.running] for g in of_group], logits)
            if chosen:
                totals = totals - diversity_penalty * hamming_penalty(chosen, vocabulary).unsqueeze(1)
            best, places = totals.flatten(1).topk(min(num_candidates, width * vocabulary))
            beams, tokens = places // vocabulary, places % vocabulary
            tokens_now, parents_now = [], []
            for group, *candidates in zip(of_group, beams.tolist(), tokens.tolist(), best.tolist(), strict=True):
                is_last = step == max_new_tokens - 1
                parents_of_group = group.take(list(zip(*candidates, strict=True)), lm.stop_ids, is_last)
                tokens_now.append([ids[-1] for ids, _ in group.running] if parents_of_group else [-1] * width)
                parents_now.append(parents_of_group or list(range(width)))
            chosen.append(torch.tensor(tokens_now, device=logits.device))
            parents.append(torch.tensor(parents_now, device=logits.device) + number * width)
        if all(group.done for groups_of_prompt in groups for group in groups_of_prompt):
            break
        offsets = torch.arange(batch, device=logits.device).unsqueeze(1) * num_beams
        rows.select((torch.cat(parents, dim=1) + offsets).flatten())
        rows.append(torch.cat(chosen, dim=1).flatten().clamp(min=0))  # a done group's rows are filled with anything
        logits = rows.forward().logits[:, -1]

    answers = []
    for groups_of_prompt in groups:
        finished = sorted((one for group in groups_of_prompt for one in group.finished), key=lambda one: -one[0])
        answers += [up_to_stop(ids, lm.stop_ids) for _, ids in finished[:num_return_sequences]]
    return answers


def _tensor(totals: list[list[float]], like: torch.Tensor) -> torch.Tensor:
    """[batch, width, 1]."""
    return torch.tensor(totals, device=like.device, dtype=torch.float32).unsqueeze(-1)


def _last_logit(model) -> dict:
    return {"logits_to_keep": 1} if forward_accepts(model, "logits_to_keep") else {}


# ---------------------------------------------------------------- contrastive search


@torch.no_grad()
def contrastive_ids(
    lm: LanguageModel, prompts: list[list[int]], max_new_tokens: int, top_k: int, penalty_alpha: float
) -> list[list[int]]:
    """The token of the top_k likeliest that scores best by ``contrastive_scores``, over and over; one row per prompt.

    Alpha 0 or k 1 is greedy. Hidden states are those of the last layer.
    """
    batch = len(prompts)
    rows = _Rows(lm, prompts)
    output = rows.forward(output_hidden_states=True, **_last_logit(lm.model))
    logits, context = output.logits[:, -1], output.hidden_states[-1]
    answers = torch.zeros(batch, 0, dtype=torch.long, device=logits.device)
    stop_ids = torch.tensor(lm.stop_ids, device=logits.device)
    over = torch.zeros(batch, dtype=torch.bool, device=logits.device)
    first = torch.arange(batch, device=logits.device)
    for _ in range(max_new_tokens):
        probs, candidates = logits.float().softmax(dim=-1).topk(min(top_k, logits.shape[-1]))
        k = probs.shape[1]
        mask = rows.mask
        rows.select(first.repeat_interleave(k))
        rows.append(candidates.flatten())
        output = rows.forward(output_hidden_states=True)
        hidden = output.hidden_states[-1].view(batch, k, -1)
        best = contrastive_scores(probs, hidden, context, mask, penalty_alpha).argmax(dim=1)
        chosen = first * k + best
        rows.select(chosen)
        logits, context = output.logits[chosen, -1], torch.cat([context, hidden[first, best].unsqueeze(1)], dim=1)
        token = candidates[first, best]
        answers = torch.cat([answers, token.unsqueeze(1)], dim=1)
        over = over | torch.isin(token, stop_ids)
        if over.all():
            break
    return [up_to_stop(row, lm.stop_ids) for row in answers.tolist()]
