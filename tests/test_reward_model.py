"""The reward model: losses against a slow loop and hand values, scores that no padding changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from utils.data.batching import pad_rows
from utils.distributed import UserError
from utils.model.model_utils import create_critic_model
from utils.model.reward_model import ValueHead, end_indices, end_scores, pairwise_loss
from utils.utils import load_hf_tokenizer


def _slow_per_token_loss(chosen_values, rejected_values, chosen, rejected):
    """Row by row, token by token: from the first difference on; the shorter answer keeps its end score."""
    losses = []
    for c_v, r_v, c, r in zip(chosen_values, rejected_values, chosen, rejected, strict=True):
        longest = max(len(c), len(r))
        start = next((i for i in range(longest) if i >= min(len(c), len(r)) or c[i] != r[i]), None)
        if start is None:
            losses.append(torch.tensor(0.0))
            continue
        terms = [-F.logsigmoid(c_v[min(i, len(c) - 1)] - r_v[min(i, len(r) - 1)]) for i in range(start, longest)]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


PAIRS = [([5, 6, 7, 8], [5, 6, 9]), ([1, 2], [1, 2, 3, 4, 5]), ([9], [8]), ([4, 4, 4], [4, 4, 4])]


@pytest.mark.parametrize("length", [None, 16])
def test_per_token_loss_equals_a_slow_loop_for_every_padding(length):
    torch.manual_seed(0)
    chosen, rejected = zip(*PAIRS, strict=True)
    ids, mask = pad_rows([*chosen, *rejected], 0, to_length=length)
    values = torch.randn(8, 16)[:, : ids.shape[1]]
    n = len(PAIRS)
    got = pairwise_loss(values[:n], values[n:], ids[:n], ids[n:], mask[:n], mask[n:])
    torch.testing.assert_close(got, _slow_per_token_loss(values[:n], values[n:], chosen, rejected))
    assert got[3] == 0


def test_end_token_loss_by_hand_and_identical_pairs_weigh_nothing():
    ids, mask = pad_rows([[5, 6], [4], [5, 7, 7], [4]], 0)
    values = torch.zeros_like(ids, dtype=torch.float32)
    values[0, 1], values[2, 2] = 2.0, 0.5
    loss = pairwise_loss(values[:2], values[2:], ids[:2], ids[2:], mask[:2], mask[2:], kind="end_token")
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), 0.0])


def test_the_end_is_the_last_real_token_on_either_padding_side():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    assert end_indices(mask).tolist() == [2, 3, 0]
    assert end_scores(torch.arange(12.0).view(3, 4), mask).tolist() == [2.0, 7.0, 8.0]


def test_a_fresh_head_has_no_bias_and_the_published_spread():
    torch.manual_seed(0)
    head = ValueHead(4095)
    assert head.bias is None
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(4096), rel=0.05)
    assert head.bfloat16()(torch.randn(2, 4095).bfloat16()).dtype == torch.float32


@pytest.fixture(params=["llama", "gpt2", "opt", "bloom"])
def reward_model(request, tmp_path):
    folder = make_model(tmp_path / request.param, request.param)
    tokenizer = load_hf_tokenizer(folder)
    return create_critic_model(folder, tokenizer).eval(), tokenizer, tmp_path


def _score(model, row, side, length):
    ids, mask = pad_rows([row], model.PAD_ID, side=side, to_length=length)
    return model.forward_value(ids, mask)["chosen_end_scores"].item()


def test_padding_never_changes_a_score_and_forward_scores_like_forward_value(reward_model):
    model, tokenizer, _ = reward_model
    rows = [[10, 11, 12, tokenizer.eos_token_id], [13, 14, tokenizer.eos_token_id]]
    with torch.no_grad():
        alone = [_score(model, row, "right", len(row)) for row in rows]
        for side in ("left", "right"):
            assert [_score(model, row, side, 16) for row in rows] == pytest.approx(alone, abs=1e-5)
        ids, mask = pad_rows(rows, tokenizer.pad_token_id)
        outputs = model(ids, mask)
    assert outputs["chosen_mean_scores"].item() == pytest.approx(alone[0], abs=1e-5)
    assert outputs["rejected_mean_scores"].item() == pytest.approx(alone[1], abs=1e-5)


def test_saved_it_loads_as_sequence_classification_with_the_same_scores_after_a_move(reward_model):
    from types import SimpleNamespace

    from utils.utils import save_hf_format

    model, tokenizer, folder = reward_model
    save_hf_format(model, tokenizer, SimpleNamespace(output_dir=str(folder / "saved")))
    moved = (folder / "saved").rename(folder / "elsewhere")
    plain, info = AutoModelForSequenceClassification.from_pretrained(moved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.config.num_labels == 1
    assert len(AutoTokenizer.from_pretrained(moved)) == len(tokenizer)
    rows = [[10, 11, 12, tokenizer.eos_token_id], [13, 14, tokenizer.eos_token_id]]
    for side in ("right", "left"):
        ids, mask = pad_rows(rows, tokenizer.pad_token_id, side=side)
        with torch.no_grad():
            ours = model.forward_value(ids, mask)["chosen_end_scores"]
            theirs = torch.cat(
                [plain.eval()(ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0] for i in range(2)]
            )
        if side == "right":
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    again = create_critic_model(moved, tokenizer, rlhf_training=True)
    assert torch.equal(again.v_head.weight, model.v_head.weight)


def test_step_3_refuses_a_folder_without_a_trained_head(model_folder):
    with pytest.raises(UserError, match=r"score\.weight"):
        create_critic_model(model_folder, load_hf_tokenizer(model_folder), rlhf_training=True)
