#!/usr/bin/env python
"""Step 3, RLHF: improve the model of step 1 with PPO against the reward model of step 2.

one process:    python main.py --actor_model_name_or_path sft --critic_model_name_or_path reward
                --data_path local/demo --output_dir out
many:           deepspeed main.py --actor_model_name_or_path sft --critic_model_name_or_path reward
                --actor_zero_stage 2 --output_dir out

Rollouts are samples; advantages are computed once per experience; every loss is the mean over the real answer tokens
of an optimizer step, however they fall on ranks, micro-batches and accumulation. ppo_math.py holds the mathematics.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from training.step3_rlhf_finetuning.experience import Experience
from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer, DeepSpeedPPOTrainerUnsupervised, MicroBatch
from training.step3_rlhf_finetuning.reporting import sample_rows, sample_table
from training.step3_rlhf_finetuning.rlhf_engine import DeepSpeedRLHFEngine
from utils import arguments
from utils.data.batching import (
    DataCollatorRLHF,
    DataCollatorSFT,
    StepBatchSampler,
    make_loader,
    to_device,
)
from utils.data.encoding import RLHF
from utils.data.preparation import datasets_of_step
from utils.data.unsupervised import get_unsupervised_data
from utils.engine.averages import ExponentialMovingAverage, MovingAverage
from utils.engine.nonfinite import NonFiniteNumbers
from utils.engine.steps import moving_average
from utils.model.loading import load_config
from utils.model.model_utils import check_model
from utils.model.reward_functions import load_reward_functions
from utils.model.reward_model import reward_scale
from utils.model.tokenizer import check_same_tokenizer, load_hf_tokenizer
from utils.perf import Stopwatch, pace, print_throughput_step3
from utils.planning.preflight import preflight
from utils.process.console import print_rank_0, progress
from utils.process.errors import UserError
from utils.process.launch import init_distributed, run_main
from utils.process.ranks import agree, all_reduce_sum
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank, get_world_size
from utils.run.checkpoint import Checkpoints
from utils.run.metrics import make_writer
from utils.run.results import save_hf_format, save_lora_adapters


def build_parser():
    parser = arguments.new_parser("Step 3: PPO with an actor, a reference, a critic and a reward model.")
    arguments.add_data_arguments(parser, step=3)
    arguments.add_rlhf_arguments(parser)
    arguments.add_run_arguments(parser, step=3)
    return parser


class UnsupervisedBatches:
    """Endless micro-batches of plain text, each rank reading its own share in a seeded order.

    Attributes:
        taken: batches handed out, which is the whole state: the order of each pass follows from its number.
    """

    def __init__(self, args, tokenizer):
        self._blocks = get_unsupervised_data(args, tokenizer)
        self._collator = DataCollatorSFT(tokenizer.pad_token_id, args.max_prompt_seq_len + args.max_answer_seq_len)
        self._seed, self._rows = args.seed, args.per_device_training_batch_size * get_world_size()
        self._pass, self._order, self.taken = None, None, 0

    def state_dict(self) -> dict:
        return {"taken": self.taken, "blocks": len(self._blocks)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError: the text was another one."""
        if state.get("blocks") != len(self._blocks):
            raise ValueError(
                f"--unsupervised_dataset_name gives {len(self._blocks)} blocks, {state.get('blocks')} then"
            )
        self.taken = int(state["taken"])

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        passes, place = divmod(self.taken, -(-len(self._blocks) // self._rows))
        if passes != self._pass:
            order = np.random.default_rng([self._seed, 1, passes]).permutation(len(self._blocks))
            self._pass, self._order = passes, np.resize(order, -(-len(order) // self._rows) * self._rows)
        self.taken += 1
        rows = self._order.reshape(-1, self._rows)[place, get_rank() :: get_world_size()]
        return self._collator([self._blocks[i] | {"answer_spans": [], "answers_only": False} for i in rows])


def micro_batch_windows(experience: Experience, batch: "arguments.RLHFBatchSizes", generator, unsupervised):
    """One pass over the experience in a fresh order: lists of the micro-batches of one optimizer step."""
    order = torch.from_numpy(generator.permutation(len(experience))).to(experience.input_ids.device)
    for window in order.split(batch.micro_batch * batch.accumulation):
        yield [
            MicroBatch(experience[rows], next(unsupervised) if unsupervised else None)
            for rows in window.split(batch.micro_batch)
        ]


def main():
    # 1. Arguments, processes, seeds
    args = build_parser().parse_args()
    device = init_distributed(args)
    if args.dry_run:
        return preflight(args, step=3)
    arguments.resolve_common(args)
    batch = arguments.check_rlhf(args)
    agree(lambda: arguments.check_output_dir(args.output_dir if get_rank() == 0 else None))
    arguments.warn_num_padding(args)
    reward_functions = load_reward_functions(args.reward_function)
    checkpoints = Checkpoints(args, "actor_model_name_or_path", "critic_model_name_or_path")
    set_random_seed(args.seed)
    print_rank_0(batch.explain())

    # 2. Tokenizer and prompts, after a look whether both models' files are all there and fit
    tokenizer = load_hf_tokenizer(
        args.actor_model_name_or_path,
        add_special_tokens=args.end_of_conversation_token,
        trust_remote_code=args.trust_remote_code,
    )
    lengths = {"--max_prompt_seq_len": args.max_prompt_seq_len, "--max_answer_seq_len": args.max_answer_seq_len}
    if args.critic_model_name_or_path is not None:
        check_same_tokenizer(
            tokenizer,
            args.actor_model_name_or_path,
            args.critic_model_name_or_path,
            args.end_of_conversation_token,
            args.trust_remote_code,
        )
        check_model(
            AutoModel, args.critic_model_name_or_path, args.trust_remote_code, trained_head=True, lengths=lengths
        )
        if args.normalize_reward:
            reward_scale(load_config(args.critic_model_name_or_path, args.trust_remote_code))
    check_model(AutoModelForCausalLM, args.actor_model_name_or_path, args.trust_remote_code, lengths=lengths)
    prompts, _ = datasets_of_step(args, tokenizer, RLHF, args.max_prompt_seq_len)
    sampler = StepBatchSampler(prompts.lengths, batch.prompts_per_round, batch.rounds, seed=args.seed, drop_last=True)
    loader = make_loader(
        prompts, sampler, DataCollatorRLHF(tokenizer.pad_token_id, args.max_prompt_seq_len, args.pad_to_max_length)
    )
    updates = len(loader) // batch.rounds  # rounds of generation that fill no update are dropped
    if updates == 0:
        raise UserError(
            f"{len(prompts)} prompts do not fill one update of {batch.rounds} x {sampler.rows_per_pass} prompts; "
            "lower --per_device_generation_batch_size or --gradient_accumulation_steps, or give more data"
        )
    unsupervised = UnsupervisedBatches(args, tokenizer) if args.unsupervised_dataset_name else None

    # 3. The engines and the trainer
    writer = make_writer(args, checkpoints.resumed)
    optimizer_steps = args.num_train_epochs * updates * args.ppo_epochs * batch.steps_per_pass
    rlhf_engine = DeepSpeedRLHFEngine(
        args.actor_model_name_or_path, args.critic_model_name_or_path, tokenizer, args, optimizer_steps
    )
    trainer_class = DeepSpeedPPOTrainerUnsupervised if unsupervised else DeepSpeedPPOTrainer
    trainer = trainer_class(rlhf_engine, args, reward_functions)
    set_random_seed(args.seed + 1000 * get_rank())  # from here on ranks sample different answers
    shuffler = np.random.default_rng([args.seed, get_rank()])
    reporter = Reporter(args, rlhf_engine, trainer, writer)
    nonfinite = NonFiniteNumbers(args.skip_nonfinite, sampler, checkpoints.save_before_step)
    averages = {"actor_ema": (rlhf_engine.actor_ema, rlhf_engine.actor)} if args.enable_ema else {}
    tracked = dict(trainer=trainer, reporter=reporter, shuffler=shuffler, nonfinite=nonfinite)
    tracked |= {"unsupervised": unsupervised} if unsupervised else {}
    checkpoints.resume(writer, prompts, rlhf_engine.trained_engines(), averages, **tracked)

    # 4. Train
    print_rank_0(f"***** Running training (total iterations = {args.num_train_epochs * updates}) *****")
    step, stop_after = checkpoints.steps, args.test_stop_step if args.enable_test_mode else math.inf
    for epoch, first_update in checkpoints.epochs(args.num_train_epochs):
        print_rank_0(f"Beginning of Epoch {epoch + 1}/{args.num_train_epochs}, Total Generation Batches {len(loader)}")
        sampler.set_epoch(epoch, first_update)
        batches = iter(loader)
        bar = progress(range(first_update, updates), f"epoch {epoch + 1}/{args.num_train_epochs}")
        for update in bar:
            if step >= stop_after:
                break
            # 4a. Experience: answers of the current policy, seen by all four models
            watch, times, rounds = Stopwatch(), StepTimes(), []
            for _ in range(batch.rounds):
                prompt_batch = to_device(next(batches), device)
                prompt, prompt_mask = (
                    prompt_batch[name].repeat_interleave(args.num_generations_per_prompt, dim=0)
                    for name in ("prompt", "prompt_att_mask")
                )
                refuse = partial(nonfinite.refuse, step=update)
                experience = trainer.generate_experience(prompt, prompt_mask, step, refuse)
                rounds.append(experience)
                times.generate += trainer.generate_time
                times.generated_positions += trainer.generated_steps
            experience = Experience.concat(rounds, tokenizer.pad_token_id)

            # 4b. Rewards and advantages, once; the KL weight for the next step
            trainer.compute_rewards(experience)
            trainer.get_advantages_and_returns(experience)
            metrics = trainer.experience_metrics(experience)
            trainer.kl_controller.update(metrics["kl"], int(metrics["used_answers"]))
            times.experience = watch.lap()

            # 4c. Updates: several passes, each in a fresh order
            losses = []
            for _ in range(args.ppo_epochs):
                for window in micro_batch_windows(experience, batch, shuffler, unsupervised):
                    loss = trainer.train_rlhf(window, partial(nonfinite.found, step=update))
                    if loss is not None:
                        losses.append(loss)
                        if args.enable_ema and loss["actor_step_applied"]:
                            moving_average(
                                rlhf_engine.actor,
                                rlhf_engine.actor_ema,
                                args.ema_decay,
                                zero_stage=args.actor_zero_stage,
                            )
            times.training = watch.lap()

            # 4d. Report
            metrics["skipped_steps"] = nonfinite.skipped
            answer_tokens = reporter.report(epoch, step, experience, metrics, losses, times)
            bar.note(pace(answer_tokens, times.total))
            step += 1
            checkpoints.end_step(epoch, update + 1)
        if step >= stop_after:
            print_rank_0(f"test mode: stopping after {step} steps (--test_stop_step)")
            break

    # 5. Save
    if args.output_dir is not None:
        print_rank_0("saving model ...")
        actor_path, critic_path = args.actor_model_name_or_path, args.critic_model_name_or_path
        for name, engine, start in (
            ("actor", rlhf_engine.actor, actor_path),
            ("critic", rlhf_engine.critic, critic_path),
            ("actor_ema", rlhf_engine.actor_ema, actor_path),
        ):
            if engine is not None:
                save_hf_format(engine, tokenizer, args, sub_folder=name)
                if args.save_lora_adapters:
                    save_lora_adapters(engine, tokenizer, args, start, sub_folder=name)
    if step < stop_after:  # a test is not the whole run
        checkpoints.finish()
    writer.close()


@dataclass
class StepTimes:
    """Seconds of one step, and the token positions its sampling loop went through."""

    experience: float = 0.0  # generation included
    generate: float = 0.0
    training: float = 0.0
    generated_positions: int = 0

    @property
    def total(self) -> float:
        return self.experience + self.training


class Reporter:
    """The console lines and the metrics row of each step."""

    def __init__(self, args, rlhf_engine, trainer, writer):
        self.args, self.engine, self.trainer, self.writer = args, rlhf_engine, trainer, writer
        self.samples_per_second, self.score = MovingAverage(), ExponentialMovingAverage()

    def state_dict(self) -> dict:
        return {"samples_per_second": self.samples_per_second.state_dict(), "score": self.score.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.samples_per_second.load_state_dict(state["samples_per_second"])
        self.score.load_state_dict(state["score"])

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

        def share(seconds):
            return f"{100 * seconds / times.total:.2f}%"

        others = times.experience - times.generate
        print_rank_0(
            f"|E2E latency={times.total:.2f}s |Gather latency=0.00s (0.00%) "
            f"|Generate time={times.generate:.2f}s ({share(times.generate)}) "
            f"|Training time={times.training:.2f}s ({share(times.training)}) |Others={others:.2f} ({share(others)})"
            f"|CurSamplesPerSec={rows / times.total:.2f} "
            f"|AvgSamplesPerSec={self.samples_per_second.update(rows / times.total):.2f}"
        )
        print_rank_0(
            f"Epoch: {epoch} | Step: {step} | PPO Epoch: {self.args.ppo_epochs} | "
            f"Actor Loss: {averaged.get('actor_loss', 0.0)} | Critic Loss: {averaged.get('critic_loss', 0.0)} | "
            f"Unsupervised Loss: {averaged.get('unsupervised_loss', 0.0)}"
        )
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
        print_rank_0(
            f"Average reward score: {metrics['score']} | EMA reward score: {self.score.get()}\n"
            f"KL to the reference: {metrics['kl']:.3f} nats per answer | EOS rate: {metrics['eos_rate']:.2f} | "
            f"Answer length: {metrics['answer_length']:.1f}"
        )
        if not losses:
            print_rank_0(f"step {step}: no usable answer in the whole batch, no update")
        if self.args.sample_interval and step % self.args.sample_interval == 0:
            samples = sample_rows(experience, self.trainer.tokenizer, self.args.samples_shown)
            print_rank_0(sample_table(samples))
            self.writer.write_samples(step, samples)
        print_rank_0("-" * 85)
        run = {
            "updates": len(losses),
            "skipped_updates": self.trainer.skipped_updates,
            **{f"{name}_lr": engine.get_lr()[0] for name, engine in self.engine.trained_engines().items()},
            "seconds": times.total,
            "generate_seconds": times.generate,
            "training_seconds": times.training,
        }
        self.writer.write(step, metrics | averaged | throughput | run)
        return answer_tokens


if __name__ == "__main__":
    run_main(main)
