"""The losses of steps 1 and 2 against TRL's trainers. Not run by default; in an environment that has TRL 1.16:

python -m pytest -m trl
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from utils.data.batching import pad_rows
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
