"""The losses of steps 1, 2, DPO and GRPO against TRL's trainers. Not run by default; in an environment with TRL 1.16:

python -m pytest -m trl
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import make_model
from test_against_trl import run_statements
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from training.step2_dpo_finetuning.dpo_math import PreferenceLoss
from training.step2_dpo_finetuning.main import compare
from training.step2_dpo_finetuning.reference import batch_log_probs
from training.step3_rlhf_finetuning import ppo_math
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


@pytest.fixture
def trl_grpo(trl, monkeypatch):
    """Its module, imported where tests/vllm is not taken for the package of that name."""
    tests = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and Path(path) != tests])
    return pytest.importorskip("trl.trainer.grpo_trainer")


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("loss_mean", ["token", "answer"])
def test_losses_gradients_and_advantages_of_grpo_are_those_of_trl(
    trl, trl_grpo, model_folder, tmp_path, loss_mean, scale, beta
):
    """TRL's loss types dapo and grpo, with clip-higher, on answers of several lengths and a policy that has moved."""
    tokenizer = load_hf_tokenizer(model_folder)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(model_folder).eval() for _ in range(2))
    settings = trl.GRPOConfig(
        loss_type="dapo" if loss_mean == "token" else "grpo",
        scale_rewards="group" if scale else "none",
        **dict(
            epsilon=0.2,
            epsilon_high=0.28,
            beta=beta,
            use_bias_correction_kl=False,
            num_generations=2,
            per_device_train_batch_size=4,
        ),
        **_common(tmp_path),
        gradient_checkpointing=False,
    )
    texts = Dataset.from_dict({"prompt": ["a"] * 4})
    trainer = trl_grpo.GRPOTrainer(
        theirs, lambda completions, **_: [0.0] * len(completions), settings, texts, processing_class=tokenizer
    )
    prompts, prompt_mask = pad_rows([[10, 11, 12]] * 2 + [[13]] * 2, tokenizer.pad_token_id, side="left")
    answers, mask = pad_rows([[20, 21, 22, 0], [30], [40, 41], [50, 51, 0]], tokenizer.pad_token_id)
    ids, attention_mask = torch.cat([prompts, answers], dim=1), torch.cat([prompt_mask, mask], dim=1)
    noise = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    scores = torch.tensor([1.0, 0.2, 0.5, 0.5])

    labels = torch.cat([torch.full_like(prompts, -100), answers.masked_fill(mask == 0, -100)], dim=1)
    token_log_probs, _ = LabelLogProbs(ours)(model_inputs(ours, ids, attention_mask), labels)
    log_probs = torch.zeros(mask.shape).masked_scatter(mask.bool(), token_log_probs)
    old, reference = (log_probs.detach() + part for part in noise)
    whole = ppo_math.group_advantages(scores, torch.ones(4, dtype=torch.bool), 2, "grpo", scale)
    weights, clip = ppo_math.loss_weights(mask, loss_mean), dict(cliprange=0.2, cliprange_high=0.28)
    policy = ppo_math.policy_loss_sum(log_probs, old, whole.unsqueeze(1) * mask, mask, weights=weights, **clip)
    kl = ppo_math.kl_per_token(log_probs, reference, "k3")
    loss = (policy.loss + beta * (kl * weights).sum()) / ppo_math.loss_units(mask, loss_mean)

    names = dict(rewards=scores, num_generations=2, self=trainer, nanstd=trl_grpo.nanstd)
    generate = trl_grpo.GRPOTrainer._generate_and_score_completions
    advantages = run_statements(generate, "mean_grouped_rewards", "is_std_zero", names)["advantages"]
    torch.testing.assert_close(whole, advantages, rtol=0, atol=1e-6)
    batch = dict(prompt_ids=prompts, prompt_mask=prompt_mask, completion_ids=answers, completion_mask=mask)
    batch |= dict(old_per_token_logps=old, ref_per_token_logps=reference, num_items_in_batch=mask.sum())
    wanted = trainer._compute_loss(theirs, batch | {"advantages": advantages})
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert policy.clipped > 0, "the bounds should be seen"
    loss.backward()
    wanted.backward()
    for (name, mine), weight in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, weight.grad, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
