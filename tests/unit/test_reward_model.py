"""The reward model: losses against a slow loop and hand values, scores that no padding changes."""

import math
import statistics

import pytest
import torch
from helpers import make_model, slow_pair_loss
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training.step2_reward_model_finetuning.main import evaluate
from utils.data.batching import pad_rows
from utils.model.model_utils import create_critic_model
from utils.model.reward_model import ValueHead, end_indices, end_scores, pair_accuracy, pairwise_loss
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError

PAIRS = [([5, 6, 7, 8], [5, 6, 9]), ([1, 2], [1, 2, 3, 4, 5]), ([9, 4], [9]), ([4, 4, 4], [4, 4, 4])]
SETTINGS = [
    dict(kind=kind, margin=margin, center_coef=center_coef)
    for kind in ("per_token", "end_token")
    for margin, center_coef in ((0.0, 0.0), (0.7, 0.0), (0.0, 0.1), (0.7, 0.1))
]


def _padded(pairs, length=None, pad=0):
    """(chosen ids, rejected ids, chosen mask, rejected mask)"""
    chosen, rejected = zip(*pairs, strict=True)
    ids, mask = pad_rows([*chosen, *rejected], pad, to_length=length)
    n = len(pairs)
    return ids[:n], ids[n:], mask[:n], mask[n:]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
def test_the_losses_equal_a_slow_loop_for_every_padding(settings):
    torch.manual_seed(0)
    values = torch.randn(2, len(PAIRS), 16)
    expected = [
        slow_pair_loss(c_v[: len(c)].tolist(), r_v[: len(r)].tolist(), c, r, **settings)
        for c_v, r_v, (c, r) in zip(*values, PAIRS, strict=True)
    ]
    for length, pad in ((None, 0), (16, 0), (16, 4)):  # 4 is a token of a row too
        ids = _padded(PAIRS, length, pad)
        got = pairwise_loss(*values[:, :, : ids[0].shape[1]], *ids, **settings)
        assert got.tolist() == pytest.approx(expected, abs=1e-6)
    assert got[3] == 0


def test_pads_and_identical_pairs_have_no_gradient():
    for settings in SETTINGS:
        values = torch.randn(2, len(PAIRS), 8, requires_grad=True)
        pairwise_loss(*values, *_padded(PAIRS), **settings).sum().backward()
        for grad, answers in zip(values.grad, zip(*PAIRS, strict=True), strict=True):
            for row, answer in zip(grad[:3], answers[:3], strict=True):
                assert row[len(answer) - 1] != 0
                assert torch.all(row[len(answer) :] == 0)
        assert torch.all(values.grad[:, 3] == 0)


def test_the_losses_by_hand():
    ids = _padded([([5, 6], [5, 7, 7]), ([4], [4])])
    chosen_values, rejected_values = torch.zeros(2, 8), torch.zeros(2, 8)
    chosen_values[0, 1], rejected_values[0, 1], rejected_values[0, 2] = 2.0, -1.0, 0.5

    def loss(**settings):
        first, identical = pairwise_loss(chosen_values, rejected_values, *ids, **settings).tolist()
        assert identical == 0
        return first

    def log1p_exp(x):
        return math.log(1 + math.exp(x))

    assert loss(kind="end_token") == pytest.approx(log1p_exp(-1.5))
    # The second token: 2 against -1; the third: 2, the end score of the shorter answer, against 0.5.
    assert loss() == pytest.approx((log1p_exp(-3) + log1p_exp(-1.5)) / 2)
    assert loss(kind="end_token", margin=1.5) == pytest.approx(math.log(2))
    assert loss(margin=1.0) == pytest.approx((log1p_exp(-2) + log1p_exp(-0.5)) / 2)
    assert loss(kind="end_token", center_coef=0.01) == pytest.approx(log1p_exp(-1.5) + 0.01 * 2.5**2)


def test_a_tie_is_half_right_and_its_loss_log_two():
    scores = torch.tensor([1.0, 2.0, 3.0])
    assert pair_accuracy(scores, torch.tensor([0.0, 2.0, 4.0])).tolist() == [1.0, 0.5, 0.0]
    for kind in ("per_token", "end_token"):
        tie = pairwise_loss(torch.ones(3, 8), torch.ones(3, 8), *_padded(PAIRS[:3]), kind=kind)
        assert tie.tolist() == pytest.approx([math.log(2)] * 3)


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


def _values(model, rows, side, length=None):
    """Values at each row's own tokens, and its score."""
    ids, mask = pad_rows(rows, model.PAD_ID, side=side, to_length=length)
    outputs = model.forward_value(ids, mask)
    return [v[m.bool()] for v, m in zip(outputs["values"], mask, strict=True)], outputs["chosen_end_scores"]


def test_padding_and_neighbours_never_change_a_value(reward_model):
    model, tokenizer, _ = reward_model
    rows = [[10, 11, 12, tokenizer.eos_token_id], [13, 14, tokenizer.eos_token_id], [15]]
    with torch.no_grad():
        for i, row in enumerate(rows):
            [alone], [score] = _values(model, [row], "right", len(row))
            assert score == alone[-1]
            for side in ("left", "right"):
                for batch, place in (([row], 0), (rows, i)):
                    for length in (None, 16, 40):
                        values, scores = _values(model, batch, side, length)
                        torch.testing.assert_close(values[place], alone, atol=1e-5, rtol=0)
                        assert scores[place].item() == pytest.approx(score.item(), abs=1e-5)


def test_forward_scores_like_forward_value_and_its_loss_knows_no_padding(reward_model):
    model, tokenizer, _ = reward_model
    eos = tokenizer.eos_token_id
    pairs = [([10, 11, 12, eos], [10, 11, eos]), ([13, eos], [14, 15, 16, 17, eos])]
    model.rm_margin, model.rm_center_coef = 0.3, 0.05
    rows = [*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)]
    with torch.no_grad():
        alone = [_values(model, [row], "right", len(row))[1].item() for row in rows]
        for kind in ("per_token", "end_token"):
            model.rm_loss = kind
            values = [_values(model, [row], "right", len(row))[0][0].tolist() for row in rows]
            expected = [
                slow_pair_loss(values[i], values[i + 2], *pairs[i], kind, model.rm_margin, model.rm_center_coef)
                for i in range(2)
            ]
            for length in (None, 24):
                ids, mask = pad_rows(rows, model.PAD_ID, to_length=length)
                outputs = model(ids, attention_mask=mask)
                assert outputs["chosen_mean_scores"].tolist() == pytest.approx(alone[:2], abs=1e-5)
                assert outputs["rejected_mean_scores"].tolist() == pytest.approx(alone[2:], abs=1e-5)
                assert outputs["loss"].item() == pytest.approx(sum(expected) / 2, abs=1e-5)
                weighed = model(ids, attention_mask=mask, pair_weights=torch.tensor([1.0, 0.0]))["loss"]
                assert weighed.item() == pytest.approx(expected[0], abs=1e-5)
                torch.testing.assert_close(
                    model(ids, attention_mask=mask, values_only=True),
                    model.forward_value(ids, mask, return_value_only=True),
                )


def test_saved_it_loads_as_sequence_classification_with_the_same_scores_after_a_move(reward_model):
    from types import SimpleNamespace

    from utils.run.results import save_hf_format

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


class _FixedScores:
    """Stands for an engine: a batch brings the scores it is to be given."""

    def eval(self):
        return self

    train = eval

    def __call__(self, chosen, rejected, pair_weights):
        loss = (pair_weights * torch.arange(1.0, len(pair_weights) + 1)).sum()
        return {"loss": loss, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}


def test_an_evaluation_leaves_fillers_out_and_counts_a_tie_half():
    first = dict(chosen=[30001.0, 30002.0], rejected=[30000.0, 30003.0], pair_weights=[1.0, 1.0])
    second = dict(chosen=[30004.0, 7.0], rejected=[30004.0, -9.0], pair_weights=[1.0, 0.0])
    batches = [{name: torch.tensor(values) for name, values in batch.items()} for batch in (first, second)]
    scores = [30001.0, 30002.0, 30004.0, 30000.0, 30003.0, 30004.0]
    expected = {
        "loss": (1 + 2 + 1) / 3,
        "accuracy": (1 + 0 + 0.5) / 3,
        "chosen_score": 90007 / 3,
        "rejected_score": 90007 / 3,
        "score_mean": statistics.fmean(scores),
        "score_std": statistics.pstdev(scores),  # in fp32 sums of squares of this size would lose it
        "pairs": 3,
    }
    assert evaluate(_FixedScores(), batches, "cpu", 0) == pytest.approx(expected, rel=1e-6)
    assert evaluate(_FixedScores(), batches, "cpu", 1)["pairs"] == 2
