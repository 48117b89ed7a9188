"""A decoder that gives each position a value: the reward model of step 2, the critic of step 3."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from utils.model.inputs import model_inputs
from utils.process.errors import UserError

SCORE_SCALE = ("reward_score_mean", "reward_score_std")  # of a reward model's configuration, set by step 2


class ValueHead(nn.Linear):
    """hidden -> one value, no bias, computed in fp32 whatever the model's dtype.

    A fresh head has std 1/sqrt(hidden + 1): scores of a new reward model then have a variance near 1 (the published
    summarisation-from-feedback code; see Huang et al., 2024, https://arxiv.org/abs/2403.17031, detail 12).
    """

    def __init__(self, hidden_size: int, dtype=None):
        super().__init__(hidden_size, 1, bias=False, dtype=dtype)
        nn.init.normal_(self.weight, std=(hidden_size + 1) ** -0.5)

    def forward(self, hidden_states):
        return F.linear(hidden_states.float(), self.weight.float()).squeeze(-1)


def end_indices(attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, length] -> [batch]: where each row's last real token stands, with pads on either side."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.long() * positions).argmax(dim=1)


def end_scores(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """values [batch, length] -> [batch]: the value at the last real token."""
    return values.gather(1, end_indices(attention_mask).unsqueeze(1)).squeeze(1)


def pairwise_loss(
    chosen_values,
    rejected_values,
    chosen_ids,
    rejected_ids,
    chosen_mask,
    rejected_mask,
    kind="per_token",
    margin=0.0,
    center_coef=0.0,
):
    """-log sigmoid(chosen - rejected - margin) + center_coef * (chosen_end + rejected_end)^2, one number per pair.

    ``end_token`` compares the two end scores (InstructGPT, https://arxiv.org/abs/2203.02155, eq. 1). ``per_token``
    is the mean over the positions from the first token in which the two differ to the end of the longer one; the
    shorter one keeps its end score there, so that no pad is ever looked at. The margin is that of Llama 2
    (https://arxiv.org/abs/2307.09288, eq. 2), one number for all pairs. The loss knows differences only, so that all
    scores could drift together; the penalty on the end scores' sum keeps their mean near 0 (Eisenstein et al., 2023,
    https://arxiv.org/abs/2312.09244, section 3).

    Args:
        *_values: [pairs, length] fp32; *_ids, *_mask: [pairs, length], right-padded.

    Returns:
        [pairs]; exactly 0 with no gradient where the two sequences are identical.
    """
    chosen_end, rejected_end = end_indices(chosen_mask), end_indices(rejected_mask)
    chosen_score, rejected_score = end_scores(chosen_values, chosen_mask), end_scores(rejected_values, rejected_mask)
    differs = (chosen_ids != rejected_ids) | (chosen_mask != rejected_mask)
    if kind == "end_token":
        loss = -F.logsigmoid(chosen_score - rejected_score - margin)
    else:
        positions = torch.arange(chosen_ids.shape[1], device=chosen_ids.device).expand_as(chosen_ids)
        chosen_at = chosen_values.gather(1, torch.minimum(positions, chosen_end.unsqueeze(1)))
        rejected_at = rejected_values.gather(1, torch.minimum(positions, rejected_end.unsqueeze(1)))
        first_difference = differs.long().argmax(dim=1, keepdim=True)
        last = torch.maximum(chosen_end, rejected_end).unsqueeze(1)
        counted = ((positions >= first_difference) & (positions <= last)).float()
        loss = (-F.logsigmoid(chosen_at - rejected_at - margin) * counted).sum(1) / counted.sum(1)
    loss = loss + center_coef * (chosen_score + rejected_score) ** 2
    return torch.where(differs.any(dim=1), loss, loss.new_zeros(()))


def pair_accuracy(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """[pairs] -> [pairs]: 1 where the chosen answer scores higher, 0 where it scores lower, one half for a tie."""
    margin = chosen_scores - rejected_scores
    return torch.heaviside(margin, margin.new_tensor(0.5))


def reward_scale(config, wanted: bool | None = True) -> tuple[float, float] | None:
    """Mean and std of a reward model's scores, as step 2 saved them in its configuration.

    Args:
        wanted: --normalize_reward; None takes them where they are, False takes none.

    Returns:
        None where scores stay as they are.

    Raises:
        UserError: they are wanted and the configuration has none.
    """
    mean, std = (getattr(config, name, None) for name in SCORE_SCALE)
    if wanted and not std:
        raise UserError(f"--normalize_reward: the reward model's config has no {' and '.join(SCORE_SCALE)}")
    return (mean, std) if std and wanted is not False else None


def _mask_of(input_ids, attention_mask, **unused) -> torch.Tensor:
    """The mask of a published call, all ones where it gives none; UserError if it gives a value that has no use."""
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise UserError(
            f"RewardModel scores whole rows of input_ids, at positions that attention_mask gives; {', '.join(given)} "
            "would not be used: leave it out"
        )
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask


class RewardModel(nn.Module):
    """A decoder (``rwtransformer``) and a value head (``v_head``).

    Args:
        base_model: the decoder without its language-model head, as AutoModel makes it.
        num_padding_at_beginning: accepted for old command lines and ignored: masks tell where a row ends.
        compute_fp32_loss: values and loss are always fp32 here; accepted for old callers.
        rm_loss: "per_token" or "end_token"; rm_margin, rm_center_coef: 0 to turn off; see ``pairwise_loss``.
        value_head: weights [1, hidden] of a trained head; None for a fresh one.
    """

    def __init__(
        self,
        base_model,
        tokenizer,
        num_padding_at_beginning=0,
        compute_fp32_loss=False,
        rm_loss="per_token",
        rm_margin=0.0,
        rm_center_coef=0.0,
        value_head=None,
    ):
        super().__init__()
        self.config = base_model.config
        self.rwtransformer = base_model
        self.PAD_ID = tokenizer.pad_token_id
        self.rm_loss, self.rm_margin, self.rm_center_coef = rm_loss, rm_margin, rm_center_coef
        # OPT-350m's blocks are wider than what its decoder puts out.
        hidden_size = getattr(self.config, "word_embed_proj_dim", None) or self.config.get_text_config().hidden_size
        self.v_head = ValueHead(hidden_size, base_model.dtype)  # ZeRO-3 wants one dtype; its master copy is fp32
        if value_head is not None:
            if value_head.shape != self.v_head.weight.shape:
                raise UserError(f"the value head has shape {tuple(value_head.shape)}, expected {(1, hidden_size)}")
            with torch.no_grad():
                self.v_head.weight.copy_(value_head)

    def gradient_checkpointing_enable(self, **kwargs):
        self.rwtransformer.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self):
        self.rwtransformer.gradient_checkpointing_disable()

    def enable_input_require_grads(self):
        self.rwtransformer.enable_input_require_grads()

    def get_input_embeddings(self):
        return self.rwtransformer.get_input_embeddings()

    def get_output_embeddings(self):
        """The value head: it trains whole, and scopes of LoRA that mean all layers leave it out."""
        return self.v_head

    def values(self, input_ids, attention_mask) -> torch.Tensor:
        """[batch, length] -> [batch, length] fp32. Values at pads mean nothing."""
        inputs = model_inputs(self.rwtransformer, input_ids, attention_mask)
        return self.v_head(self.rwtransformer(**inputs).last_hidden_state)

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        head_mask=None,
        inputs_embeds=None,
        use_cache=False,
        *,
        values_only=False,
        pair_weights=None,
        pairs=None,
    ):
        """Score pairs of answers. Each answer goes through the model once, however many pairs it stands in.

        Args:
            input_ids, attention_mask: [answers, length], right-padded; no mask: no pads.
            past_key_values, position_ids, head_mask, inputs_embeds: stand here as published; only None is taken.
            use_cache: accepted for old callers: nothing is generated here.
            values_only: return the values [answers, length] instead; the batch need not be pairs then.
            pair_weights: [pairs], weights of the loss sum; None for the mean over pairs.
            pairs: [pairs, 2], rows of the chosen and the rejected answer; None: the first half of the batch is
                chosen, the second half rejected, in the same order.

        Returns:
            {loss, chosen_mean_scores [pairs], rejected_mean_scores [pairs]}; the scores are those at the end token.
        """
        unused = dict(past_key_values=past_key_values, position_ids=position_ids, head_mask=head_mask)
        attention_mask = _mask_of(input_ids, attention_mask, inputs_embeds=inputs_embeds, **unused)
        values = self.values(input_ids, attention_mask)
        if values_only:
            return values
        half = input_ids.shape[0] // 2
        chosen, rejected = (slice(half), slice(half, None)) if pairs is None else pairs.unbind(1)
        loss_per_pair = pairwise_loss(
            values[chosen],
            values[rejected],
            input_ids[chosen],
            input_ids[rejected],
            attention_mask[chosen],
            attention_mask[rejected],
            kind=self.rm_loss,
            margin=self.rm_margin,
            center_coef=self.rm_center_coef,
        )
        scores = end_scores(values, attention_mask)
        return {
            "loss": loss_per_pair.mean() if pair_weights is None else (loss_per_pair * pair_weights).sum(),
            "chosen_mean_scores": scores[chosen],
            "rejected_mean_scores": scores[rejected],
        }

    def forward_value(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        head_mask=None,
        inputs_embeds=None,
        return_value_only=False,
        prompt_length=0,
        use_cache=False,
    ):
        """Values [batch, length], or {values, chosen_end_scores [batch]}: the score at each row's last real token.

        ``prompt_length`` and ``use_cache`` are accepted for old callers: the mask tells where the answer ends. For the
        rest see ``forward``.
        """
        unused = dict(past_key_values=past_key_values, position_ids=position_ids, head_mask=head_mask)
        attention_mask = _mask_of(input_ids, attention_mask, inputs_embeds=inputs_embeds, **unused)
        values = self.values(input_ids, attention_mask)
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": end_scores(values, attention_mask)}

    def for_saving(self):
        """This model as a sequence-classification model with one label, so that plain transformers can load it.

        Returns:
            (an empty model of that class, a function from our names of weights to that class's)

        Raises:
            UserError: when transformers has no such class, or one with a head of another kind.
        """
        target = empty_classifier(self.config, self.rwtransformer.dtype)
        prefix = target.base_model_prefix

        def rename(name: str) -> str:
            return "score.weight" if name == "v_head.weight" else f"{prefix}.{name.removeprefix('rwtransformer.')}"

        return target, rename


def empty_classifier(config, dtype=None):
    """The sequence-classification model, weightless, that a reward model of this configuration is saved as.

    Raises:
        UserError: when transformers has no such class, or one with a head of another kind.
    """
    family = type(config)
    if family not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"transformers has no sequence-classification model for {family.__name__}, so that no reward model of this "
            "family could be saved; train the reward model from another family with the same tokenizer"
        )
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(
            f"the head of {type(model).__name__} is not one plain matrix named score; a reward model of this family "
            "could not be saved"
        )
    return model
