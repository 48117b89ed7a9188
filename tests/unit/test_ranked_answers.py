"""Step 2 with more than two answers to a prompt: all pairs of a ranking, each answer seen once, each prompt alike."""

import statistics

import numpy as np
import pytest
import torch
from helpers import make_model, read_metrics, slow_pair_loss

from training.step2_reward_model_finetuning.main import evaluate
from utils.data import batching, preparation
from utils.data.batching import DataCollatorReward, count_pairs
from utils.model.model_utils import create_critic_model
from utils.model.tokenizer import load_hf_tokenizer

A, B, C, D = [10, 11, 12, 13], [10, 20, 21], [10, 30, 31, 32, 33, 34], [10, 40]
SETTINGS = [("end_token", 0.0, 0.0), ("per_token", 0.3, 0.05)]


def ranked(ids: list[list[int]], ranks: list[int]) -> dict:
    return {"chosen_ids": ids[0], "rejected_ids": ids[-1], "prompt_length": 1, "ranked_ids": ids, "ranks": ranks}


def pair(chosen: list[int], rejected: list[int]) -> dict:
    """As the cache gives it: a column of lists that has none in this row."""
    return {"chosen_ids": chosen, "rejected_ids": rejected, "prompt_length": 1, "ranked_ids": [], "ranks": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("llama") / "model")
    torch.manual_seed(1)
    return create_critic_model(folder, load_hf_tokenizer(folder)).eval()


@pytest.fixture(params=SETTINGS, ids=lambda settings: settings[0])
def settings(request, model):
    model.rm_loss, model.rm_margin, model.rm_center_coef = request.param
    return request.param


def collate(model, *rows) -> dict:
    return DataCollatorReward(model.PAD_ID, 64)(list(rows))


def gradients(model, *batches) -> tuple[float, list[torch.Tensor]]:
    """The loss of an optimizer step that sees these batches, and its gradient."""
    model.zero_grad()
    prompts = sum(count_pairs(batch)[0] for batch in batches)
    losses = [model(**batch)["loss"] / prompts for batch in batches]
    sum(losses).backward()
    return sum(loss.item() for loss in losses), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_step(one, other) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert len(one[1]) == len(other[1]) > 0
    for ours, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_loss_of_three_answers_of_which_two_tie_is_that_of_two_pairs_by_hand(model, settings):
    batch = collate(model, ranked([A, B, C], [1, 2, 2]))
    assert batch["input_ids"].shape[0] == 3, "each answer goes through the model once"
    assert batch["pairs"].tolist() == [[0, 1], [0, 2]] and batch["pair_weights"].tolist() == [0.5, 0.5]
    with torch.no_grad():
        values = {
            tuple(ids): model.values(torch.tensor([ids]), torch.ones(1, len(ids)))[0].tolist() for ids in (A, B, C)
        }
        outputs = model(**batch)
    terms = [slow_pair_loss(values[tuple(A)], values[tuple(other)], A, other, *settings) for other in (B, C)]
    assert outputs["loss"].item() == pytest.approx(sum(terms) / 2, rel=1e-5)
    assert outputs["chosen_mean_scores"].tolist() == pytest.approx([values[tuple(A)][-1]] * 2, abs=1e-5)
    expected = [values[tuple(B)][-1], values[tuple(C)][-1]]
    assert outputs["rejected_mean_scores"].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_ranking_of_two_is_a_pair(model, settings):
    two, plain = collate(model, ranked([A, B], [1, 2])), collate(model, pair(A, B))
    assert "pairs" not in plain and count_pairs(two) == count_pairs(plain) == (1.0, len(A) + len(B), 2)
    assert_same_step(gradients(model, two), gradients(model, plain))


def test_a_ranking_of_four_is_its_six_pairs_of_a_sixth_each(model, settings):
    answers = [A, B, C, D]
    expanded = collate(model, *(pair(x, y) for i, x in enumerate(answers) for y in answers[i + 1 :]))
    assert expanded["input_ids"].shape[0] == 12 and "pairs" not in expanded
    expanded["pair_weights"] = torch.full((6,), 1 / 6)
    assert_same_step(gradients(model, collate(model, ranked(answers, [1, 2, 3, 4]))), gradients(model, expanded))


def test_a_step_does_not_depend_on_how_prompts_are_cut_and_each_counts_once(model, settings):
    rows = [ranked([A, B, C, D], [1, 2, 3, 4]), pair(C, A), ranked([D, C, B], [1, 1, 2]), ranked([B, D], [3, 9])]
    whole = gradients(model, collate(model, *rows))
    assert_same_step(whole, gradients(model, *(collate(model, row) for row in rows)))
    assert_same_step(whole, gradients(model, collate(model, rows[0], None), collate(model, *rows[1:], None)))
    assert whole[0] == pytest.approx(statistics.fmean(gradients(model, collate(model, row))[0] for row in rows), 1e-5)


def test_batches_of_pairs_are_as_they_were(model):
    batch = collate(model, pair(A, B), None, {"chosen_ids": C, "rejected_ids": D})
    assert batch.keys() == {"input_ids", "attention_mask", "pair_weights"}
    pad = model.PAD_ID
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == [A, [pad], C, B, [pad], D]
    assert batch["pair_weights"].tolist() == [1.0, 0.0, 1.0]
    assert count_pairs(batch) == (2.0, sum(map(len, (A, B, C, D))), 4), "fillers are neither tokens nor answers"


def test_fillers_ties_and_identical_answers_weigh_nothing(model):
    rows = [ranked([A, list(A), B], [1, 2, 2]), None, ranked([C, D], [4, 4]), pair(C, D)]
    batch = collate(model, *rows)
    assert batch["pairs"].tolist() == [[0, 2], [3, 4], [5, 6], [7, 8]]
    assert batch["pair_weights"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert count_pairs(batch) == (2.0, len(A) + len(B) + len(C) + len(D), 4)
    assert_same_step(gradients(model, batch), gradients(model, collate(model, pair(A, B), pair(C, D))))


class Scores:
    """Stands for an engine: the score of an answer is its last id."""

    def eval(self):
        return self

    train = eval

    def __call__(self, input_ids, attention_mask, pair_weights, pairs=None):
        ends = (attention_mask.cumsum(1) * attention_mask).argmax(1, keepdim=True)
        scores = input_ids.gather(1, ends).squeeze(1).float()
        chosen, rejected = scores.chunk(2) if pairs is None else scores[pairs].unbind(1)
        return {"loss": pair_weights.sum(), "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}


def test_an_evaluation_counts_each_prompt_once_and_in_the_scores_each_answer_once(model):
    # Scores 12, 40 and 40; 30 and 31. The first prompt has pairs 12 over 40, twice, both wrong.
    rows = [ranked([[12], [40], [5, 40]], [1, 2, 2]), pair([31], [30]), None]
    batches = [collate(model, *rows), collate(model, pair([31], [30]), None)]
    scores = [12, 40, 40, 31, 30, 31, 30]
    figures = evaluate(Scores(), batches, "cpu", 0)
    assert figures == pytest.approx(
        {
            "loss": 1.0,
            "accuracy": 2 / 3,
            "chosen_score": (12 + 31 + 31) / 3,
            "rejected_score": (40 + 30 + 30) / 3,
            "score_mean": statistics.fmean(scores),
            "score_std": statistics.pstdev(scores),
            "pairs": 3,
        }
    )


class Rankings(list):
    def __init__(self):
        rows = [ranked([A, B, C], [1, 2, 3]), pair(B, D), ranked([D, A, C, B], [1, 2, 2, 3]), ranked([B, C], [1, 2])]
        super().__init__(rows * 2)
        self.lengths, self.counts = np.array([6, 3, 6, 6] * 2), [""]


def test_step_2_trains_on_rankings_alike_at_every_micro_batch(model_folder, run_step, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "datasets_of_step", lambda *_, **__: (Rankings(), Rankings()))
    monkeypatch.setattr(preparation, "check_data_of_step", lambda *_: [])
    counted = []
    monkeypatch.setattr(batching, "count_pairs", lambda batch: counted.append(count_pairs(batch)) or counted[-1])
    common = f"--model_name_or_path {model_folder} --dtype fp32 --dropout 0 --max_seq_len 16 --learning_rate 1e-3"
    rows = []
    for micro, accumulation in ((4, 1), (1, 4)):
        output = tmp_path / str(micro)
        sizes = f"--per_device_train_batch_size {micro} --gradient_accumulation_steps {accumulation}"
        run_step(2, f"{common} {sizes} --output_dir {output}".split())
        rows.append(read_metrics(output))
        assert read_metrics(output, "eval")[-1]["eval/pairs"] == 8
    for one, other in zip(*rows, strict=True):
        for name in ("train/loss", "train/accuracy", "train/margin", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert sum(pairs for pairs, _, _ in counted) == pytest.approx(2 * 8)
    assert sum(answers for _, _, answers in counted) == 2 * 2 * (3 + 2 + 4 + 2)
