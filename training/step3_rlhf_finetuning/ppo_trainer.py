"""PPO: making experience with the four models, and updating actor and critic from it."""

import math
import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from training.step3_rlhf_finetuning import ppo_math
from training.step3_rlhf_finetuning.experience import Experience
from training.step3_rlhf_finetuning.ppo_math import gather_log_probs
from utils.distributed import UserError, all_reduce_sum, get_world_size
from utils.model.inputs import embedding_rows, model_inputs
from utils.model.losses import IGNORE_INDEX, LabelLogProbs, causal_lm_loss_sum, label_count
from utils.model.reward_model import end_scores
from utils.utils import print_rank_0, take_step, to_device

__all__ = ["DeepSpeedPPOTrainer", "DeepSpeedPPOTrainerUnsupervised", "gather_log_probs"]


@dataclass
class MicroBatch:
    """What one forward and backward pass of an update sees: rollouts, and text for the ptx loss if there is some."""

    experience: Experience
    unsupervised: dict | None = None


class DeepSpeedPPOTrainer:
    """Holds no state of its own beside counters: models live in the engine, settings in the arguments."""

    def __init__(self, rlhf_engine, args):
        self.rlhf_engine, self.args = rlhf_engine, args
        self.tokenizer = rlhf_engine.tokenizer
        self.actor_model, self.critic_model = rlhf_engine.actor, rlhf_engine.critic
        self.ref_model, self.reward_model = rlhf_engine.ref, rlhf_engine.reward
        self.actor_label_log_probs = LabelLogProbs(self.actor_model)
        self.ref_label_log_probs = LabelLogProbs(self.ref_model)
        self.kl_controller = ppo_math.AdaptiveKLController(args.kl_ctl, args.kl_target, args.kl_horizon)
        self.generate_time = 0.0
        self.generated_steps = 0
        self.skipped_updates = 0
        config = self.reward_model.module.config
        self.reward_scale = None
        if args.normalize_reward:
            mean, std = getattr(config, "reward_score_mean", None), getattr(config, "reward_score_std", None)
            if not std:
                raise UserError(
                    "--normalize_reward: the reward model's config has no reward_score_mean and reward_score_std"
                )
            self.reward_scale = (mean, std)

    # ------------------------------------------------------------ experience

    def generate_experience(self, prompts, mask, step=0) -> Experience:
        """Sample answers and look at them with all four models.

        Args:
            prompts, mask: [B, P], left-padded.
            step: for messages.
        """
        self.eval()
        input_ids = self._generate_sequence(prompts, mask, step)
        answers = input_ids[:, prompts.shape[1] :]
        real = ppo_math.answer_mask(answers, self.tokenizer.eos_token_id)
        attention_mask = torch.cat([mask, real], dim=1)
        width = answers.shape[1]
        with torch.no_grad():
            log_probs, _ = self._answer_log_probs(self.actor_label_log_probs, input_ids, attention_mask, width)
            ref_log_probs, _ = self._answer_log_probs(self.ref_label_log_probs, input_ids, attention_mask, width)
            values = self._answer_values(input_ids, attention_mask, width)
            reward_values = self.reward_model(input_ids=input_ids, attention_mask=attention_mask, values_only=True)
        ended = (answers == self.tokenizer.eos_token_id).any(dim=1)
        scores = self._final_scores(end_scores(reward_values, attention_mask), ended)
        self.train()
        # An answer that is nothing but EOS says nothing the reward model was trained to judge.
        usable = (torch.isfinite(scores) & (real.sum(1) > ended.long())).unsqueeze(1)
        trains = real * usable
        log_probs, ref_log_probs, values = (x.masked_fill(trains == 0, 0.0) for x in (log_probs, ref_log_probs, values))
        return Experience(
            input_ids=input_ids,
            attention_mask=attention_mask,
            answer_mask=trains,
            log_probs=log_probs,
            ref_log_probs=ref_log_probs,
            values=values,
            scores=torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0),
            ended=ended.long(),
        )

    def _generate_sequence(self, prompts, mask, step) -> torch.Tensor:
        """[B, P] -> [B, P + A], A the longest answer of this rank; after a row's EOS come pads."""
        args, start = self.args, time.perf_counter()
        samples = args.do_sample and args.temperature > 0
        sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k) if samples else {}
        config = GenerationConfig(
            do_sample=samples,
            max_new_tokens=args.max_answer_seq_len,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            use_cache=True,
            # Rows of the embedding beyond the tokenizer mean nothing, and the critic may not have them.
            suppress_tokens=list(range(len(self.tokenizer), embedding_rows(self.actor_model.module))) or None,
            **sampling,
        )
        generator = self.rlhf_engine.generator
        with generator.generation() as model:
            # What the model came with (a repetition penalty, say) must not shape rollouts that PPO scores without it.
            own_config, model.generation_config = model.generation_config, config
            try:
                sequences = model.generate(
                    prompts,
                    attention_mask=mask,
                    generation_config=config,
                    synced_gpus=generator.needs_lockstep and get_world_size() > 1,
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise UserError(f"the actor's logits are not finite in step {step}: {error}") from error
            finally:
                model.generation_config = own_config
        self.generate_time = time.perf_counter() - start
        self.generated_steps = sequences.shape[1] - prompts.shape[1]
        if args.print_answers and step % args.print_answers_interval == 0:
            self._print_answers(prompts, mask, sequences, step)
        return sequences

    def _print_answers(self, prompts, mask, sequences, step) -> None:
        answers = self.tokenizer.batch_decode(sequences[:, prompts.shape[1] :], skip_special_tokens=True)
        questions = self.tokenizer.batch_decode([row[m.bool()] for row, m in zip(prompts, mask, strict=True)])
        print_rank_0(f"--- prompt --> step={step}, {questions}")
        print_rank_0(f"--- ans    --> step={step}, {answers}")

    def _final_scores(self, scores, ended) -> torch.Tensor:
        scores = scores.float()
        if self.reward_scale is not None:
            mean, std = self.reward_scale
            scores = (scores - mean) / std
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~ended).float()
        return scores

    def _answer_log_probs(self, label_log_probs: LabelLogProbs, input_ids, attention_mask, width, with_entropy=False):
        """Log-probs [B, A] of the last ``width`` tokens, 0 at pads; and their entropies [B, A], or None."""
        real = attention_mask[:, -width:].bool()
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, -width:] = input_ids[:, -width:].masked_fill(~real, IGNORE_INDEX)
        scores = label_log_probs(
            model_inputs(label_log_probs.model, input_ids, attention_mask),
            labels,
            temperature=self.args.temperature if self.args.do_sample and self.args.temperature > 0 else 1.0,
            vocabulary=len(self.tokenizer),  # rows of the embedding beyond the tokenizer are never sampled
            with_entropy=with_entropy,
        )
        zeros = torch.zeros(real.shape, device=real.device)
        return tuple(None if part is None else zeros.masked_scatter(real, part) for part in scores)

    def _answer_values(self, input_ids, attention_mask, width) -> torch.Tensor:
        """[B, A]: the critic's value of the state before each answer token."""
        values = self.critic_model(input_ids=input_ids, attention_mask=attention_mask, values_only=True)
        return values[:, -width - 1 : -1]

    # ------------------------------------------------------------ rewards and advantages

    def compute_rewards(self, experience: Experience) -> Experience:
        """Fill in rewards: the KL penalty per token and the score at the answer's end."""
        kl = ppo_math.kl_per_token(experience.log_probs, experience.ref_log_probs, self.args.kl_estimator)
        experience.rewards = ppo_math.place_rewards(
            experience.scores, kl, experience.answer_mask, self.kl_controller.value, self.args.clip_reward_value
        )
        return experience

    def get_advantages_and_returns(self, experience: Experience) -> Experience:
        """Fill in advantages and returns, once per experience; advantages whitened over all rows of all ranks."""
        advantages, experience.returns = ppo_math.get_advantages_and_returns(
            experience.values, experience.rewards, experience.answer_mask, self.args.gamma, self.args.lam
        )
        if self.args.whiten_advantages:
            advantages = ppo_math.masked_whiten(advantages, experience.answer_mask, all_reduce_sum)
        experience.advantages = advantages
        return experience

    def experience_metrics(self, experience: Experience) -> dict[str, float]:
        """What the rollouts were like, over all ranks."""
        mask, scores = experience.answer_mask, experience.scores
        used = mask.any(dim=1).float()
        difference = experience.log_probs - experience.ref_log_probs
        sums = [
            torch.tensor(float(len(experience)), device=scores.device),
            used.sum(),
            (scores * used).sum(),
            (scores**2 * used).sum(),
            (difference * mask).sum(),
            mask.sum().float(),
            (mask.sum(1) * used).sum().float(),
            (experience.ended * used).sum().float(),
            experience.rewards.sum(),
            (ppo_math.kl_per_token(experience.log_probs, experience.ref_log_probs, "k3") * mask).sum(),
        ]
        rows, used_rows, score, squares, kl, tokens, length, ended, reward, k3 = all_reduce_sum(
            torch.stack(sums)
        ).tolist()
        explained = ppo_math.explained_variance(experience.values, experience.returns, mask, all_reduce_sum).item()
        n = max(used_rows, 1)
        return {
            "score": score / n,
            "score_std": math.sqrt(max(squares / n - (score / n) ** 2, 0)),
            "reward": reward / n,
            "kl": kl / n,
            "kl_per_token": kl / max(tokens, 1),
            "kl_k3_per_token": k3 / max(tokens, 1),
            "kl_ctl": self.kl_controller.value,
            "answer_length": length / n,
            "eos_rate": ended / n,
            "used_answers": used_rows,
            "unused_answers": rows - used_rows,
            "explained_variance": explained,
        }

    # ------------------------------------------------------------ updates

    def actor_loss_fn(self, log_probs, old_log_probs, advantages, mask) -> ppo_math.PolicyLoss:
        return ppo_math.policy_loss_sum(log_probs, old_log_probs, advantages, mask, self.args.cliprange)

    def critic_loss_fn(self, values, old_values, returns, mask) -> ppo_math.ValueLoss:
        return ppo_math.value_loss_sum(values, old_values, returns, mask, self.args.cliprange_value)

    def train_rlhf(self, window: list[MicroBatch]) -> dict[str, float] | None:
        """One optimizer step of actor and critic from the micro-batches of this rank.

        Losses are means over the real answer tokens of all ranks and micro-batches. Returns metrics; None, on every
        rank alike, if there was no token to learn from.
        """
        device = window[0].experience.input_ids.device
        tokens = sum(micro.experience.answer_mask.sum() for micro in window)
        unsupervised_tokens = sum(self._unsupervised_tokens(micro) for micro in window)
        counts = torch.stack([tokens.float(), torch.tensor(float(unsupervised_tokens), device=device)])
        tokens, unsupervised_tokens = all_reduce_sum(counts).tolist()
        if tokens == 0:
            self.skipped_updates += 1
            return None
        sums = torch.zeros(9, device=device)
        for i, micro in enumerate(window):
            is_last = i == len(window) - 1
            batch = micro.experience
            mask, width = batch.answer_mask, batch.answer_width

            log_probs, entropies = self._answer_log_probs(
                self.actor_label_log_probs, batch.input_ids, batch.attention_mask, width, with_entropy=True
            )
            policy = self.actor_loss_fn(log_probs, batch.log_probs, batch.advantages, mask)
            actor_loss = policy.loss / tokens
            self._backward(self.actor_model, actor_loss, is_last and not unsupervised_tokens)
            unsupervised_loss = self._unsupervised_backward(micro, unsupervised_tokens, is_last)

            values = self._answer_values(batch.input_ids, batch.attention_mask, width)
            value = self.critic_loss_fn(values, batch.values, batch.returns, mask)
            critic_loss = value.loss / tokens
            self._backward(self.critic_model, critic_loss, is_last)

            parts = [actor_loss, critic_loss, unsupervised_loss, policy.clipped, policy.approx_kl, policy.ratio]
            parts += [(entropies * mask).sum(), value.clipped, (values * mask).sum()]
            scale = [1, 1, 1] + [1 / tokens] * 6
            sums += torch.stack([part.detach().float() * s for part, s in zip(parts, scale, strict=True)])
            if is_last:
                names = ["actor_loss", "critic_loss", "unsupervised_loss", "clip_fraction", "approx_kl", "ratio"]
                names += ["entropy", "value_clip_fraction", "value"]
                metrics = dict(zip(names, all_reduce_sum(sums).tolist(), strict=True))
                bad = [name for name in names[:3] if not math.isfinite(metrics[name])]
                if bad:
                    raise UserError(f"{' and '.join(bad)} not finite: no update was made from this batch")
            actor_norm, critic_norm = take_step(self.actor_model), take_step(self.critic_model)
        metrics["actor_grad_norm"], metrics["critic_grad_norm"] = actor_norm, critic_norm
        metrics["actor_step_applied"] = self.actor_model.was_step_applied()
        return metrics

    @staticmethod
    def _backward(engine, loss, is_boundary: bool) -> None:
        # DeepSpeed takes the mean of the ranks' gradients; the loss is already a share of the global mean.
        engine.set_gradient_accumulation_boundary(is_boundary)
        engine.backward(loss * get_world_size(), scale_wrt_gas=False)

    def _unsupervised_tokens(self, micro: MicroBatch) -> int:
        return 0

    def _unsupervised_backward(self, micro: MicroBatch, tokens: float, is_last: bool) -> torch.Tensor:
        return torch.zeros((), device=micro.experience.input_ids.device)

    def train(self) -> None:
        self.actor_model.train()
        self.critic_model.train()

    def eval(self) -> None:
        self.actor_model.eval()
        self.critic_model.eval()
        self.ref_model.eval()
        self.reward_model.eval()


class DeepSpeedPPOTrainerUnsupervised(DeepSpeedPPOTrainer):
    """PPO-ptx (InstructGPT): the gradient of a language-model loss on plain text joins the same optimizer step."""

    def _unsupervised_tokens(self, micro: MicroBatch) -> int:
        return label_count(micro.unsupervised["labels"])

    def _unsupervised_backward(self, micro: MicroBatch, tokens: float, is_last: bool) -> torch.Tensor:
        engine = self.actor_model
        batch = to_device(micro.unsupervised, micro.experience.input_ids.device)
        inputs = model_inputs(engine.module, batch["input_ids"], batch["attention_mask"])
        loss = causal_lm_loss_sum(self.actor_label_log_probs, inputs, batch["labels"]) / tokens
        self._backward(engine, self.args.unsup_coef * loss, is_last)
        return loss
