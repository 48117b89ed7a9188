"""What a person sees of step 3: console lines and a metrics row for each step, tables of sampled answers."""

from dataclasses import dataclass

import numpy as np
import torch

from training.step3_rlhf_finetuning.diagnostics import Diagnostics
from training.step3_rlhf_finetuning.experience import Experience
from utils.engine.averages import ExponentialMovingAverage, MovingAverage
from utils.perf import print_throughput_step3
from utils.process.console import is_brief, print_brief, print_classic, print_rank_0
from utils.process.ranks import all_reduce_sum
from utils.run.console_lines import TimeLeft, command, rounded, short_path


@dataclass
class StepTimes:
    """Seconds of one step, and the token positions its sampling loop went through."""

    experience: float = 0.0  # generation included
    generate: float = 0.0
    gather: float = 0.0  # of generate: weights gathered, or handed to vLLM
    training: float = 0.0
    generated_positions: int = 0

    @property
    def total(self) -> float:
        return self.experience + self.training


ALGORITHMS = {"gae": "PPO", "rloo": "RLOO", "grpo": "GRPO"}  # --advantage_estimator -> what people call it
LARGE_GAP = 0.05  # nats on average between the sampler's log-probs and a scoring pass's


class Reporter:
    """The console lines and the metrics row of each step, and what is said at the start and the end.

    Args:
        total_steps: updates of the whole run.
    """

    def __init__(self, args, rlhf_engine, trainer, writer, total_steps: int):
        self.args, self.engine, self.trainer, self.writer = args, rlhf_engine, trainer, writer
        self.samples_per_second, self.score = MovingAverage(), ExponentialMovingAverage()
        self._diagnostics = Diagnostics(args)
        self._total, self._left, self._gap_told = total_steps, TimeLeft(), False

    def state_dict(self) -> dict:
        return {
            "samples_per_second": self.samples_per_second.state_dict(),
            "score": self.score.state_dict(),
            "diagnostics": self._diagnostics.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.samples_per_second.load_state_dict(state["samples_per_second"])
        self.score.load_state_dict(state["score"])
        if "diagnostics" in state:  # checkpoints of earlier versions have none
            self._diagnostics.load_state_dict(state["diagnostics"])

    def begin(self, prompts: int) -> None:
        args = self.args
        judges = [args.critic_model_name_or_path] if args.reward_model_weight else []
        judges += [function.name for function in self.trainer.reward_functions]
        print_brief(
            f"step 3, reinforcement learning: {args.actor_model_name_or_path} answers {prompts:,} prompts, "
            f"{' and '.join(judges)} {'score' if len(judges) > 1 else 'scores'} the answers, and "
            f"{ALGORITHMS[args.advantage_estimator]} makes better ones likelier, in {self._total:,} steps"
        )
        print_classic(f"***** Running training (total iterations = {self._total}) *****")

    def report(self, epoch, step, experience, metrics, losses, times: StepTimes) -> int:
        """``metrics`` of the experience, ``losses`` of its updates; an update without a usable answer has none.

        Returns:
            answer tokens over all ranks
        """
        tokens = experience.attention_mask.sum(), experience.attention_mask[:, experience.prompt_width :].sum()
        rows = torch.tensor(len(experience), device=experience.input_ids.device)
        all_tokens, answer_tokens, rows = all_reduce_sum(torch.stack([*tokens, rows])).tolist()
        names = losses[0] if losses else ()
        averaged = {name: float(np.mean([loss[name] for loss in losses])) for name in names}
        if metrics["used_answers"]:
            self.score.update(metrics["score"])
        self._left.step(times.total)
        self._print_first_lines(epoch, step, averaged, rows, times)
        throughput = print_throughput_step3(
            self.engine.actor,
            self.engine.critic,
            self.args,
            times.total,
            times.experience,
            times.training,
            rows=rows,
            prompt_tokens=all_tokens - answer_tokens,
            answer_tokens=answer_tokens,
            generate_time=times.generate,
            generated_steps=times.generated_positions,
        )
        rates = self._learning_rates(losses)
        self._print_last_lines(step, metrics, averaged, rates, times)
        if not losses:
            print_rank_0(f"step {step}: no answer to learn from in the whole batch, no update")
        gap = metrics.get("rollout_log_prob_gap", 0.0)
        if gap > LARGE_GAP and not self._gap_told:
            self._gap_told = True
            print_rank_0(
                f"step {step}: the sampler's log-probs lie {gap:.3f} nats on average from the policy's "
                "(rollout_log_prob_gap in metrics.jsonl), by so much are updates off-policy: --rollout_is_clip 2 "
                "weighs tokens by it, --hybrid_engine_backend own samples with the policy's kernels"
            )
        for line in self._diagnostics.update(metrics):
            print_rank_0(f"step {step + 1}: {line}")
        if self.args.sample_interval and step % self.args.sample_interval == 0:
            shown = self.args.samples_shown, self.args.num_generations_per_prompt
            samples = sample_rows(experience, self.trainer.tokenizer, *shown)
            print_rank_0(sample_table(samples))
            self.writer.write_samples(step + 1, samples)
        print_classic("-" * 85)
        run = {
            "updates": len(losses),
            "skipped_updates": self.trainer.skipped_updates,
            **rates,
            "seconds": times.total,
            "generate_seconds": times.generate,
            "gather_seconds": times.gather,
            "training_seconds": times.training,
        }
        self.writer.write(step + 1, metrics | averaged | throughput | run)  # as all rows: steps that are done
        return answer_tokens

    def _print_first_lines(self, epoch: int, step: int, averaged: dict, rows: int, times: StepTimes) -> None:
        """The classic lines before those of the throughput."""

        def share(seconds):
            return f"{100 * seconds / times.total:.2f}%"

        others = times.experience - times.generate
        print_classic(
            f"|E2E latency={times.total:.2f}s |Gather latency={times.gather:.2f}s ({share(times.gather)}) "
            f"|Generate time={times.generate:.2f}s ({share(times.generate)}) "
            f"|Training time={times.training:.2f}s ({share(times.training)}) |Others={others:.2f} ({share(others)})"
            f"|CurSamplesPerSec={rows / times.total:.2f} "
            f"|AvgSamplesPerSec={self.samples_per_second.update(rows / times.total):.2f}"
        )
        print_classic(
            f"Epoch: {epoch} | Step: {step} | PPO Epoch: {self.args.ppo_epochs} | "
            f"Actor Loss: {averaged.get('actor_loss', 0.0)} | Critic Loss: {averaged.get('critic_loss', 0.0)} | "
            f"Unsupervised Loss: {averaged.get('unsupervised_loss', 0.0)}"
        )

    def _print_last_lines(self, step: int, metrics: dict, averaged: dict, rates: dict, times: StepTimes) -> None:
        """The classic lines after those of the throughput, or the brief line of every --log_interval steps."""
        print_classic(
            f"Average reward score: {metrics['score']} | EMA reward score: {self.score.get()}\n"
            f"KL to the reference: {metrics['kl']:.3f} nats per answer | EOS rate: {metrics['eos_rate']:.2f} | "
            f"Answer length: {metrics['answer_length']:.1f}"
        )
        print_classic(" | ".join(f"{name[:-3].title()} Learning Rate: {rate:.6g}" for name, rate in rates.items()))
        if (step + 1) % self.args.log_interval and step + 1 != self._total:
            return
        parts = [f"step {step + 1}/{self._total}", _brief_figures(metrics)]
        parts += [f"critic {rounded(averaged['critic_loss'])}"] if "critic_loss" in averaged else []
        parts += [f"{times.total:.1f} s", f"left {self._left.text(self._total - step - 1)}"]
        parts += [f"skipped {metrics['skipped_steps']}"] if metrics.get("skipped_steps") else []
        print_brief("  ".join(parts))

    def _learning_rates(self, losses) -> dict[str, float]:
        """Of the last update of the step; without one, of that to come."""
        engines = self.engine.trained_engines()
        return {f"{name}_lr": losses[-1][f"{name}_lr"] if losses else engines[name].get_lr()[0] for name in engines}

    def evaluating(self, steps: int, epoch: int) -> None:
        print_classic(f"***** Evaluating answers, Epoch {epoch}/{self.args.num_train_epochs} *****")

    def evaluated(self, steps: int, epoch: int, figures: dict, samples: list[dict]) -> None:
        """The line of an evaluation, and a few of its answers."""
        answers = int(figures["used_answers"] + figures["unused_answers"])
        when = f"evaluation after step {steps}" if steps else "evaluation before training"
        print_rank_0(f"{when}: {_brief_figures(figures)}  ({answers} answers to prompts that are not trained on)")
        print_rank_0(sample_table(samples))
        self.writer.write_samples(steps, [row | {"evaluation": True} for row in samples])

    def end(self) -> None:
        """Where the result is, and what to do with it."""
        if is_brief() and self.args.output_dir is not None:
            folder = short_path(f"{self.args.output_dir}/actor")
            print_rank_0(f"the model is in {folder}. To talk to it:")
            print_rank_0(command("inference/chatbot.py", "--path", folder))


def _brief_figures(metrics: dict) -> str:
    return (
        f"score {metrics['score']:.2f}  kl {metrics['kl']:.2f}  eos {metrics['eos_rate']:.2f}  "
        f"length {metrics['answer_length']:.1f}"
    )


def sample_rows(experience: Experience, tokenizer, count: int, group_size: int = 1) -> list[dict]:
    """The first answers of this rank: the prompt's number in the step, which its ``group_size`` answers share, prompt,
    answer, score, KL to the reference in nats, tokens, whether it ended."""
    kl = ((experience.log_probs - experience.ref_log_probs) * experience.answer_mask).sum(1).tolist()
    rows = []
    for i in range(min(count, len(experience))):
        real = experience.attention_mask[i].bool()
        ids, width = experience.input_ids[i], experience.prompt_width
        answer = ids[width:][real[width:]]
        rows.append(
            {
                "group": i // group_size,
                "prompt": tokenizer.decode(ids[:width][real[:width]], skip_special_tokens=True),
                "answer": tokenizer.decode(answer, skip_special_tokens=True),
                "score": experience.scores[i].item(),
                "kl": kl[i],
                "tokens": len(answer),
                "ended": bool(experience.ended[i]),
                "trained": bool(experience.answer_mask[i].any()),
            }
        )
    return rows


def sample_table(rows: list[dict], width: int = 100) -> str:
    """One line per answer: the end of the prompt, the beginning of the answer, and its figures."""
    text = width - 30
    prompt_width, answer_width = text * 2 // 5, text - text * 2 // 5
    lines = [f"{'prompt':<{prompt_width}}  {'answer':<{answer_width}} {'score':>7} {'KL':>7} {'tokens':>6} end"]
    for row in rows:
        prompt = _one_line(row["prompt"])
        prompt = prompt if len(prompt) <= prompt_width else "…" + prompt[len(prompt) - prompt_width + 1 :]
        answer = _one_line(row["answer"])
        answer = answer if len(answer) <= answer_width else answer[: answer_width - 1] + "…"
        score = f"{row['score']:7.2f}" if row["trained"] else "   left"
        lines.append(
            f"{prompt:<{prompt_width}}  {answer:<{answer_width}} {score} {row['kl']:7.2f} {row['tokens']:>6} "
            f"{'yes' if row['ended'] else 'no'}"
        )
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
