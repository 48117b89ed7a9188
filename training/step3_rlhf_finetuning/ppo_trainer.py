"""PPO: making experience with the four models, and updating actor and critic from it."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from training.step3_rlhf_finetuning import ppo_math
from training.step3_rlhf_finetuning.experience import Experience, MicroBatch
from training.step3_rlhf_finetuning.ppo_math import gather_log_probs
from utils.data.batching import IGNORE_INDEX, to_device
from utils.engine.nonfinite import Figures, refuse_nonfinite
from utils.engine.update import Update
from utils.generation.sampling import Decoding, Rollout
from utils.model.inputs import model_inputs
from utils.model.losses import LabelLogProbs, causal_lm_loss_sum, label_count
from utils.model.reward_functions import RewardFunction
from utils.model.reward_model import end_scores, reward_scale
from utils.model.tokenizer import vocabulary_size
from utils.process.console import print_rank_0
from utils.process.errors import UserError
from utils.process.ranks import agree, all_reduce_max, all_reduce_sum

__all__ = ["DeepSpeedPPOTrainer", "DeepSpeedPPOTrainerUnsupervised", "gather_log_probs"]


class DeepSpeedPPOTrainer:
    """Holds no state of its own beside counters: models live in the engine, settings in the arguments.

    Raises:
        UserError: the flags ask for log-probs of the sampler, which notes none.
    """

    def __init__(self, rlhf_engine, args, reward_functions: Sequence[RewardFunction] = ()):
        self.rlhf_engine, self.args, self.reward_functions = rlhf_engine, args, list(reward_functions)
        self.tokenizer = rlhf_engine.tokenizer
        self.end_token_ids, self.vocabulary = rlhf_engine.end_token_ids, vocabulary_size(rlhf_engine.tokenizer)
        self.actor_model, self.critic_model = rlhf_engine.actor, rlhf_engine.critic
        self.reward_model = rlhf_engine.reward
        self.actor_label_log_probs = self.ref_label_log_probs = LabelLogProbs(self.actor_model)
        if rlhf_engine.ref is not None:
            self.ref_label_log_probs = LabelLogProbs(rlhf_engine.ref)
        self.kl_controller = ppo_math.AdaptiveKLController(args.kl_ctl, args.kl_target, args.kl_horizon)
        self.generate_time = 0.0
        self.generated_steps = 0
        self.skipped_updates = 0
        self.update = Update(rlhf_engine.trained_engines(), args.align_overflow)
        self.reward_scale = None
        if self.reward_model is not None:
            self.reward_scale = reward_scale(self.reward_model.module.config, args.normalize_reward)
        self._refuse_without_rollout_log_probs()

    def state_dict(self) -> dict:
        """What a checkpoint of the run must hold beside the engines."""
        return {
            "kl_ctl": self.kl_controller.value,
            "kl_ctl_at_start": self.args.kl_ctl,
            "skipped_updates": self.skipped_updates,
        }

    def load_state_dict(self, state: dict) -> None:
        self.skipped_updates = int(state["skipped_updates"])
        changed = "kl_ctl" in self.args.allow_changed
        # Another --kl_ctl than before is a new start for the weight. Older checkpoints do not say what it was.
        if state.get("kl_ctl_at_start", None if changed else self.args.kl_ctl) == self.args.kl_ctl:
            self.kl_controller.value = float(state["kl_ctl"])

    # ------------------------------------------------------------ experience

    def _refuse_without_rollout_log_probs(self) -> None:
        """Backend auto may have fallen back to generate(), and vLLM notes none under some sampling flags."""
        wanted = {"--rollout_log_probs": self.args.rollout_log_probs, "--rollout_is_clip": self.args.rollout_is_clip}
        generator = self.rlhf_engine.generator
        for flag in (flag for flag, value in wanted.items() if value):
            if not generator.records_log_probs(self.decoding()):
                raise UserError(
                    f"{flag} needs the log-probs of the sampler, and generation by {generator.backend} notes none with "
                    "this model and these flags: leave it out, or take --hybrid_engine_backend own"
                )

    def generate_experience(
        self, prompts, mask, step=0, refuse: Callable[[Figures], object] = refuse_nonfinite, columns=None
    ) -> Experience:
        """Sample answers and look at them with all four models.

        Args:
            prompts, mask: [B, P], left-padded.
            step: for printed answers; None to print none.
            refuse: called on every rank when logits of any were not finite.
            columns: [B] dicts, the columns of the data for reward functions; None where there are none.
        """
        self.eval()
        try:
            rollout = self._generate_sequence(prompts, mask, step)
        except FloatingPointError:
            refuse({"actor": {"logits in generation": math.nan}})
            raise
        input_ids, answers = rollout.sequences, rollout.sequences[:, prompts.shape[1] :]
        real = ppo_math.answer_mask(answers, self.end_token_ids)
        attention_mask = torch.cat([mask, real], dim=1)
        width = answers.shape[1]
        with torch.no_grad():
            scored = None
            if self._scores_policy(step):
                scored, _ = self._answer_log_probs(self.actor_label_log_probs, input_ids, attention_mask, width)
            with self.rlhf_engine.reference_weights():
                ref_log_probs, _ = self._answer_log_probs(self.ref_label_log_probs, input_ids, attention_mask, width)
            values = self._answer_values(input_ids, attention_mask, width) if self.critic_model is not None else None
            ended = ppo_math.is_end_token(answers, self.end_token_ids).any(dim=1)
            score_parts = self._score_parts(input_ids, attention_mask, prompts.shape[1], columns, ended)
        scores = self._final_scores(score_parts, ended)
        self.train()
        # An answer that is nothing but an end token says nothing the reward model was trained to judge.
        usable = (torch.isfinite(scores) & (real.sum(1) > ended.long())).unsqueeze(1)
        trains = real * usable
        scored, noted, ref_log_probs, values = (
            None if x is None else x.masked_fill(trains == 0, 0.0)
            for x in (scored, rollout.log_probs, ref_log_probs, values)
        )
        return Experience(
            input_ids=input_ids,
            attention_mask=attention_mask,
            answer_mask=trains,
            log_probs=noted if self.args.rollout_log_probs else scored,
            ref_log_probs=ref_log_probs,
            values=values,
            rollout_log_probs=noted,
            scored_log_probs=scored,
            scores=torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0),
            ended=ended.long(),
            score_parts=score_parts,
        )

    def _scores_policy(self, step: int | None) -> bool:
        """Whether the actor scores its own answers; with --rollout_log_probs only for ``rollout_log_prob_gap``, at the
        first step, once in --log_interval steps, and in evaluations."""
        return not self.args.rollout_log_probs or step is None or step % self.args.log_interval == 0

    @property
    def temperature(self) -> float:
        """Of sampling and of log-probs: those of greedy answers are taken at 1."""
        return self.args.temperature if self.args.do_sample and self.args.temperature > 0 else 1.0

    def decoding(self) -> Decoding:
        args = self.args
        return Decoding(
            max_new_tokens=args.max_answer_seq_len,
            eos_token_ids=tuple(self.end_token_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            # Rows of the embedding beyond the tokenizer mean nothing, and the critic may not have them.
            vocabulary=self.vocabulary,
            temperature=args.temperature if args.do_sample else 0.0,
            top_k=args.top_k,
            top_p=args.top_p,
        )

    def _generate_sequence(self, prompts, mask, step) -> Rollout:
        """[B, P] -> sequences [B, P + A], A the longest answer of this rank; after a row's end token come pads.

        Raises:
            FloatingPointError: on all ranks, when logits of any were not finite.
        """
        args, start, problem = self.args, time.perf_counter(), None
        try:
            rollout = self.rlhf_engine.generator.generate(prompts, mask, self.decoding())
        except FloatingPointError as error:
            problem = error
        if all_reduce_sum(torch.tensor(int(problem is not None), device=prompts.device)):
            raise problem or FloatingPointError("logits of another rank are not finite")
        self.generate_time = time.perf_counter() - start
        self.generated_steps = rollout.width
        if args.print_answers and step is not None and step % args.print_answers_interval == 0:
            self._print_answers(prompts, mask, rollout.sequences, step)
        return rollout

    def _print_answers(self, prompts, mask, sequences, step) -> None:
        answers = self.tokenizer.batch_decode(sequences[:, prompts.shape[1] :], skip_special_tokens=True)
        questions = self.tokenizer.batch_decode([row[m.bool()] for row, m in zip(prompts, mask, strict=True)])
        print_rank_0(f"--- prompt --> step={step}, {questions}")
        print_rank_0(f"--- ans    --> step={step}, {answers}")

    @property
    def score_names(self) -> list[str]:
        """What the columns of Experience.score_parts are."""
        return ["reward_model"] * (self.reward_model is not None) + [
            function.name for function in self.reward_functions
        ]

    def _score_parts(self, input_ids, attention_mask, prompt_width, columns=None, ended=None) -> torch.Tensor:
        """[B, n]: what the reward model, if there is one, and each reward function give to the answers.

        ``columns``: [B] dicts of the data's columns, ``ended``: [B] bool, for reward functions.
        """
        parts = []
        if self.reward_model is not None:
            values = self.reward_model(input_ids=input_ids, attention_mask=attention_mask, values_only=True)
            parts.append(end_scores(values, attention_mask).float())
        if self.reward_functions:
            real = attention_mask.bool()
            rows = zip(input_ids, real, strict=True)
            halves = [(ids[:prompt_width][m[:prompt_width]], ids[prompt_width:][m[prompt_width:]]) for ids, m in rows]
            prompts, answers = (
                self.tokenizer.batch_decode(list(part), skip_special_tokens=True) for part in zip(*halves, strict=True)
            )
            scores = []
            # A function that fails on one rank must not leave the others waiting.
            ended = None if ended is None else ended.tolist()
            agree(lambda: scores.extend(judge(prompts, answers, columns, ended) for judge in self.reward_functions))
            parts += [torch.tensor(row, dtype=torch.float32, device=input_ids.device) for row in scores]
        return torch.stack(parts, dim=1)

    def _final_scores(self, score_parts, ended) -> torch.Tensor:
        """[B, n], [B] bool -> [B]: the weighted sum, the reward model's share scaled, a missing EOS paid for.

        A reward model has learned from answers that end. Of the others its score is a guess, often a high one, and
        counts as its mean at most: answers that never end must not pay. What weighs 0 is only watched: it may be NaN.
        """
        parts = list(score_parts.float().unbind(1))
        scores = -self.args.missing_eos_penalty * (~ended).float()
        if self.reward_model is not None:
            part = parts.pop(0)
            if self.reward_scale is not None:
                mean, std = self.reward_scale
                part = (part - mean) / std
            part = self.args.reward_model_weight * part
            if self.reward_scale is not None and self.args.missing_eos_penalty:
                part = torch.where(ended, part, part.clamp(max=0.0))
            scores = scores + part
        for function, part in zip(self.reward_functions, parts, strict=True):
            if function.weight:
                scores = scores + function.weight * part
        return scores

    def _answer_log_probs(self, label_log_probs: LabelLogProbs, input_ids, attention_mask, width, with_entropy=False):
        """Log-probs [B, A] of the last ``width`` tokens, 0 at pads; and their entropies [B, A], or None."""
        real = attention_mask[:, -width:].bool()
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, -width:] = input_ids[:, -width:].masked_fill(~real, IGNORE_INDEX)
        scores = label_log_probs(
            model_inputs(label_log_probs.model, input_ids, attention_mask),
            labels,
            temperature=self.temperature,
            vocabulary=self.vocabulary,  # rows of the embedding beyond the tokenizer are never sampled
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
        """Fill in rewards: the KL penalty per token and the score at the answer's end.

        GRPO's rewards are the scores alone: its KL penalty is a term of the loss.
        """
        kl = ppo_math.kl_per_token(experience.log_probs, experience.ref_log_probs, self.args.kl_estimator)
        kl_ctl = 0.0 if self.args.advantage_estimator == "grpo" else self.kl_controller.value
        experience.rewards = ppo_math.place_rewards(
            experience.scores, kl, experience.answer_mask, kl_ctl, self.args.clip_reward_value
        )
        return experience

    def get_advantages_and_returns(self, experience: Experience) -> Experience:
        """Fill in advantages, and returns for the critic, once per experience; whitened over all rows of all ranks."""
        if self.args.advantage_estimator == "gae":
            advantages, experience.returns = ppo_math.get_advantages_and_returns(
                experience.values, experience.rewards, experience.answer_mask, self.args.gamma, self.args.lam
            )
        else:
            advantages = self._group_advantages(experience).unsqueeze(1) * experience.answer_mask
        if self.args.whiten_advantages:
            mask = experience.answer_mask
            if self.args.drop_groups_without_spread:  # over the rows that train
                mask = mask * experience.has_spread.unsqueeze(1)
            advantages = ppo_math.masked_whiten(advantages, mask, all_reduce_sum)
        experience.advantages = advantages
        return experience

    def _group_advantages(self, experience: Experience) -> torch.Tensor:
        """[B]: each answer against the others to its prompt; notes which groups differ in score."""
        args, size = self.args, self.args.num_generations_per_prompt
        clipped = experience.scores.clamp(-args.clip_reward_value, args.clip_reward_value)
        experience.has_spread = ppo_math.groups_with_spread(clipped, experience.usable, size).repeat_interleave(size)
        return ppo_math.group_advantages(
            experience.rewards.sum(1), experience.usable, size, args.advantage_estimator, args.scale_group_rewards
        )

    def experience_metrics(self, experience: Experience) -> dict[str, float]:
        """What the rollouts were like, over all ranks; means are NaN where there is no answer to take them of."""
        mask, scores = experience.answer_mask, experience.scores
        used = experience.usable.float()
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
        known = experience.score_parts.isfinite() & experience.usable.unsqueeze(1)  # a watched one may be NaN
        parts = torch.where(known, experience.score_parts, 0.0).sum(0)
        rows, used_rows, score, squares, kl, tokens, length, ended, reward, k3, *parts = all_reduce_sum(
            torch.cat([torch.stack(sums), parts, known.sum(0).float()])
        ).tolist()
        n = used_rows or math.nan
        halves = parts[: len(self.score_names)], parts[len(self.score_names) :]
        more = {
            f"score/{name}": part / (count or math.nan)
            for name, part, count in zip(self.score_names, *halves, strict=True)
        }
        if experience.values is not None:
            more["explained_variance"] = ppo_math.explained_variance(
                experience.values, experience.returns, mask, all_reduce_sum
            ).item()
        if experience.has_spread is not None:
            rows_without = all_reduce_sum((~experience.has_spread).sum()).item()
            more["groups_without_spread"] = rows_without // self.args.num_generations_per_prompt
        if experience.scored_log_probs is not None and experience.rollout_log_probs is not None:
            pair = experience.scored_log_probs, experience.rollout_log_probs
            gap, largest = ppo_math.log_prob_gap(*pair, mask, all_reduce_sum, all_reduce_max)
            more |= {"rollout_log_prob_gap": gap.item(), "rollout_log_prob_gap_max": largest.item()}
        return {
            "score": score / n,
            "score_std": math.sqrt(max(squares / n - (score / n) ** 2, 0)) if used_rows else math.nan,
            "reward": reward / n,
            "kl": kl / n,
            "kl_per_token": kl / max(tokens, 1),
            "kl_k3_per_token": k3 / max(tokens, 1),
            "kl_ctl": self.kl_controller.value,
            "answer_length": length / n,
            "eos_rate": ended / n,
            "used_answers": used_rows,
            "unused_answers": rows - used_rows,
            **more,
        }

    # ------------------------------------------------------------ updates

    def actor_loss_fn(self, log_probs, old_log_probs, advantages, mask, weights=None) -> ppo_math.PolicyLoss:
        clip = self.args.cliprange, weights, self.args.cliprange_high
        return ppo_math.policy_loss_sum(log_probs, old_log_probs, advantages, mask, *clip)

    def critic_loss_fn(self, values, old_values, returns, mask, weights=None) -> ppo_math.ValueLoss:
        return ppo_math.value_loss_sum(values, old_values, returns, mask, self.args.cliprange_value, weights)

    def train_rlhf(
        self, window: list[MicroBatch], is_dropped: Callable[[Figures], bool] = refuse_nonfinite
    ) -> dict[str, float] | None:
        """One optimizer step of actor and critic from the micro-batches of this rank.

        Args:
            is_dropped: from losses and norms, whether the step makes no update; it may raise (NonFiniteSteps).

        Losses are means over the real answer tokens (or, by --loss_mean, over the answers) of all ranks and
        micro-batches. Returns metrics, which are means over tokens; None, on every rank alike, if there was no token
        to learn from.
        """
        device, masks = window[0].experience.input_ids.device, [micro.experience.answer_mask for micro in window]
        tokens = sum(mask.sum() for mask in masks)
        units = sum(ppo_math.loss_units(mask, self.args.loss_mean) for mask in masks)
        unsupervised_tokens = sum(self._unsupervised_tokens(micro) for micro in window)
        unsupervised_tokens = torch.tensor(float(unsupervised_tokens), device=device)
        counts = all_reduce_sum(torch.stack([tokens.float(), units.float(), unsupervised_tokens]))
        tokens, units, unsupervised_tokens = counts.tolist()
        if tokens == 0:
            self.skipped_updates += 1
            return None
        for micro in self.update.micro_batches(window):
            self._actor_backward(micro, tokens, units, unsupervised_tokens)
            if self.critic_model is not None:
                self._critic_backward(micro.experience, tokens, units)
        figures = self.update.step(is_dropped)
        norms = {name: math.nan for name, value in figures.items() if value is None}
        return figures | norms | {"actor_step_applied": self.actor_model.was_step_applied()}

    def _actor_backward(self, micro: MicroBatch, tokens: float, units: float, unsupervised_tokens: float) -> None:
        """The gradient of the policy's loss, and of the ptx loss where there is text for it.

        Args:
            tokens, units: answer tokens of the whole step, and what its losses are means over (``loss_units``).
        """
        batch, update = micro.experience, self.update
        mask, width = batch.answer_mask, batch.answer_width
        log_probs, entropies = self._answer_log_probs(
            self.actor_label_log_probs, batch.input_ids, batch.attention_mask, width, with_entropy=True
        )
        weights = ppo_math.loss_weights(mask, self.args.loss_mean)
        kl_loss = self._kl_loss_sum(log_probs, batch, weights)
        weights = weights * self._importance_weights(batch)
        policy = self.actor_loss_fn(log_probs, batch.log_probs, batch.advantages, mask, weights)
        loss = (policy.loss + kl_loss) / units
        update.backward(loss, "actor_loss", "actor", more=unsupervised_tokens > 0)
        update.record(
            clip_fraction=policy.clipped / tokens,
            approx_kl=policy.approx_kl / tokens,
            ratio=policy.ratio / tokens,
            entropy=(entropies * mask).sum() / tokens,
            kl_loss=kl_loss / units,
        )
        self._unsupervised_backward(micro, unsupervised_tokens)

    def _importance_weights(self, batch: Experience) -> torch.Tensor | float:
        """Of the policy loss: with --rollout_is_clip [B, A], without 1."""
        if self.args.rollout_is_clip is None:
            return 1.0
        pair = batch.scored_log_probs, batch.rollout_log_probs
        return ppo_math.truncated_importance_weights(*pair, batch.answer_mask, self.args.rollout_is_clip)

    def _kl_loss_sum(self, log_probs, batch: Experience, weights) -> torch.Tensor:
        """GRPO's penalty, a weighted sum over tokens: kl_ctl times the k3 estimate of KL(policy || reference)."""
        if self.args.advantage_estimator != "grpo":
            return log_probs.new_zeros(())
        kl = ppo_math.kl_per_token(log_probs, batch.ref_log_probs, "k3")
        return self.kl_controller.value * (kl * weights).sum()

    def _critic_backward(self, batch: Experience, tokens: float, units: float) -> None:
        values = self._answer_values(batch.input_ids, batch.attention_mask, batch.answer_width)
        weights = ppo_math.loss_weights(batch.answer_mask, self.args.loss_mean)
        value = self.critic_loss_fn(values, batch.values, batch.returns, batch.answer_mask, weights)
        self.update.backward(value.loss / units, "critic_loss", "critic")
        self.update.record(value_clip_fraction=value.clipped / tokens, value=value.value / tokens)

    def _unsupervised_tokens(self, micro: MicroBatch) -> int:
        return 0

    def _unsupervised_backward(self, micro: MicroBatch, tokens: float) -> None:
        self.update.record(unsupervised_loss=torch.zeros((), device=micro.experience.input_ids.device))

    def train(self) -> None:
        for engine in self.rlhf_engine.trained_engines().values():
            engine.train()

    def eval(self) -> None:
        for engine in self.rlhf_engine.trained_engines().values():  # the frozen ones never leave it
            engine.eval()


class DeepSpeedPPOTrainerUnsupervised(DeepSpeedPPOTrainer):
    """PPO-ptx (InstructGPT): the gradient of a language-model loss on plain text joins the same optimizer step."""

    def _unsupervised_tokens(self, micro: MicroBatch) -> int:
        return label_count(micro.unsupervised["labels"])

    def _unsupervised_backward(self, micro: MicroBatch, tokens: float) -> None:
        batch = to_device(micro.unsupervised, micro.experience.input_ids.device)
        inputs = model_inputs(self.actor_model.module, batch["input_ids"], batch["attention_mask"])
        loss = causal_lm_loss_sum(self.actor_label_log_probs, inputs, batch["labels"]) / tokens
        self.update.backward(loss, "unsupervised_loss", "actor", weight=self.args.unsup_coef)
