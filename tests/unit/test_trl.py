"""The losses of steps 1, 2 and DPO against TRL's trainers. Not run by default; in an environment that has TRL 1.16:

python -m pytest -m trl
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import make_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from training.step2_dpo_finetuning.dpo_math import PreferenceLoss
from training.step2_dpo_finetuning.main import compare
from training.step2_dpo_finetuning.reference import batch_log_probs
from utils.data.batching import DataCollatorDPO, pad_rows
from utils.model.inputs import model_inputs
from utils.model.losses import LabelLogProbs, causal_lm_loss_sum, label_count
from utils.model.model_utils import create_critic_model
from utils.model.reward_model import pairwise_loss
from utils.model.tokenizer import load_hf_tokenizer
from utils.run.results import save_hf_format

pytestmark = pytest.mark.trl
PAIRS = [([10, 11, 12, 13, 14], [10, 11, 20, 21]), ([30, 31, 32], [30, 33, 34, 35, 36, 37]), ([40, 41], [40, 42])]


@pytest.fixture
def trl():
    return pytest.importorskip("trl", minversion="1.16")


def _common(folder):
    return dict(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("center_coef", [0.0, 0.7])
def test_the_end_token_loss_is_that_of_trls_reward_trainer(trl, model_folder, tmp_path, margin, center_coef):
    tokenizer = load_hf_tokenizer(model_folder)
    torch.manual_seed(0)
    ours = create_critic_model(model_folder, tokenizer).eval()
    save_hf_format(ours, tokenizer, SimpleNamespace(output_dir=str(tmp_path / "reward")))
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected, "margin": margin} for chosen, rejected in PAIRS]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    trainer = trl.RewardTrainer(
        theirs,
        args=trl.RewardConfig(center_rewards_coefficient=center_coef, **_common(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    wanted = trainer.compute_loss(theirs, trainer.data_collator(rows)).item()

    n, (chosen, rejected) = len(PAIRS), zip(*PAIRS, strict=True)
    ids, mask = pad_rows([*chosen, *rejected], tokenizer.pad_token_id)
    values = ours.values(ids, mask)
    loss = pairwise_loss(
        values[:n], values[n:], ids[:n], ids[n:], mask[:n], mask[n:], "end_token", margin, center_coef
    ).mean()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_the_sft_loss_is_that_of_trls_sft_trainer(trl, model_folder, tmp_path):
    tokenizer = load_hf_tokenizer(model_folder)
    rows = [{"input_ids": chosen, "labels": [-100, *chosen[1:]]} for chosen, _ in PAIRS]
    rows[0]["labels"][:3] = [-100] * 3
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**_common(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    wanted = trainer.compute_loss(model, trainer.data_collator(rows)).item()

    ids, mask = pad_rows([row["input_ids"] for row in rows], tokenizer.pad_token_id)
    labels, _ = pad_rows([row["labels"] for row in rows], -100, to_length=ids.shape[1])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    loss = causal_lm_loss_sum(LabelLogProbs(model), model_inputs(model, ids, mask), labels) / label_count(labels)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


PREFERENCES = [
    ([10, 11, 12], [13, 14, 0], [20, 0]),
    ([30], [33, 34, 35, 36, 37, 0], [31, 32]),
    ([40, 41], [0], [42, 43]),
]
TRLS = {  # our loss -> theirs
    PreferenceLoss(): dict(loss_type=["sigmoid"]),
    PreferenceLoss("hinge", beta=0.3): dict(loss_type=["hinge"]),
    PreferenceLoss("ipo", beta=0.3): dict(loss_type=["ipo"]),
    PreferenceLoss("apo_zero", beta=0.3): dict(loss_type=["apo_zero"]),
    PreferenceLoss(rpo_alpha=0.5): dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
}


@pytest.mark.parametrize("loss", TRLS, ids=lambda loss: f"{loss.kind}, SFT x {loss.rpo_alpha}")
def test_losses_gradients_and_rewards_of_dpo_are_those_of_trl(trl, model_folder, tmp_path, loss):
    other = make_model(tmp_path / "other", seed=3)
    ours, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (model_folder, other))
    theirs, their_reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, other))
    tokenizer = load_hf_tokenizer(model_folder)
    texts = Dataset.from_dict({"prompt": ["a"] * 3, "chosen": ["b"] * 3, "rejected": ["c"] * 3})
    settings = trl.DPOConfig(beta=loss.beta, **TRLS[loss], **_common(tmp_path), gradient_checkpointing=False)
    trainer = trl.DPOTrainer(theirs, their_reference, settings, train_dataset=texts, processing_class=tokenizer)
    rows = [
        {"chosen_ids": p + c, "rejected_ids": p + r, "answer_starts": [len(p)] * 2, "ranked_ids": [], "ranks": []}
        for p, c, r in PREFERENCES
    ]
    # TRL takes the mean of the SFT term over the tokens of a batch, and the source over those of an answer.
    batches = [slice(i, i + 1) for i in range(3)] if loss.rpo_alpha else [slice(None)]
    label_log_probs, ref_label_log_probs = LabelLogProbs(ours), LabelLogProbs(reference)

    @torch.no_grad()
    def of_reference(batch):
        return batch_log_probs(ref_label_log_probs, batch)

    for part in batches:
        losses, figures = compare(label_log_probs, of_reference, loss, DataCollatorDPO(2)(rows[part]))
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = trainer.data_collator([dict(zip(names, row, strict=True)) for row in PREFERENCES[part]])
        their_loss = trainer.compute_loss(theirs.eval(), batch)
        assert losses.mean().item() == pytest.approx(their_loss.item(), abs=1e-5)
        ours.zero_grad()
        theirs.zero_grad()
        losses.mean().float().backward()
        their_loss.backward()
        for (name, mine), weight in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, weight.grad, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        reported = trainer._metrics["eval"]
        for name, key in (
            ("rewards/chosen", "rewards/chosen"),
            ("rewards/rejected", "rewards/rejected"),
            ("margin", "rewards/margins"),
            ("log_probs/chosen", "logps/chosen"),
        ):
            assert figures[name].mean().item() == pytest.approx(reported[key][-1], abs=2e-5), name
