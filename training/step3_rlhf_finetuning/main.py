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
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.process.follow_launcher  # noqa: F401  (before what takes seconds to load)

# isort: split

import numpy as np
from transformers import AutoModel, AutoModelForCausalLM

from training.step3_rlhf_finetuning.evaluation import HeldOutPrompts
from training.step3_rlhf_finetuning.experience import Experience, micro_batch_windows
from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer, DeepSpeedPPOTrainerUnsupervised
from training.step3_rlhf_finetuning.reporting import Reporter, StepTimes
from training.step3_rlhf_finetuning.rlhf_engine import DeepSpeedRLHFEngine
from utils import arguments, perf
from utils.data import batching, encoding, preparation
from utils.data.unsupervised import UnsupervisedBatches
from utils.engine import build
from utils.engine.nonfinite import NonFiniteSteps
from utils.engine.steps import moving_average
from utils.model.loading import load_config
from utils.model.model_utils import check_model
from utils.model.reward_functions import check_columns, check_weights, columns_wanted, load_reward_functions
from utils.model.reward_model import reward_scale
from utils.model.tokenizer import check_same_tokenizer
from utils.planning.preflight import preflight
from utils.process.console import print_classic, print_rank_0, progress, set_console
from utils.process.launch import init_distributed, run_main
from utils.process.ranks import agree
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank, get_world_size
from utils.run import metrics, results
from utils.run.checkpoint import Checkpoints
from utils.run.evaluation import Evaluations
from utils.run.model_card import RunCard


def check_inputs(args, reward_functions):
    """Whether models and data are there and fit; what takes longest, the models' files, comes last.

    Returns:
        the tokenizer, which is the same for both models

    Raises:
        UserError: what is missing, or a reward function asks for a column that the data lack.
    """
    actor, critic, code = args.actor_model_name_or_path, args.critic_model_name_or_path, args.trust_remote_code
    agree(lambda: [load_config(model, code) for model in (actor, critic) if model is not None])
    check_weights(reward_functions, args.reward_model_weight)
    check_columns(reward_functions, preparation.check_data_of_step(args, encoding.RLHF))
    tokenizer = build.load_tokenizer(args, actor)
    lengths = {"--max_prompt_seq_len": args.max_prompt_seq_len, "--max_answer_seq_len": args.max_answer_seq_len}
    if critic is not None:
        check_same_tokenizer(tokenizer, actor, critic, arguments.end_token(args), code, args.prompt_format)
        check_model(AutoModel, critic, code, trained_head=True, lengths=lengths)
        if args.normalize_reward:
            reward_scale(load_config(critic, code))
    check_model(AutoModelForCausalLM, actor, code, lengths=lengths)
    return tokenizer


def load_prompts(args, tokenizer, batch: arguments.RLHFBatchSizes, reward_functions):
    """(prompts, their sampler, batches of a round of generation, updates in an epoch, prompts to evaluate with).

    Raises:
        UserError: the data cannot be used.
    """
    print_classic(batch.explain())
    limit, wanted = args.max_prompt_seq_len, columns_wanted(reward_functions)
    prompts, held_out = preparation.datasets_of_step(args, tokenizer, encoding.RLHF, limit, keep_columns=wanted)
    sampler = batching.StepBatchSampler(
        prompts.lengths, batch.prompts_per_round, batch.rounds, seed=args.seed, drop_last=True
    )
    padding = dict(pad_token_id=tokenizer.pad_token_id, pad_to_max_length=args.pad_to_max_length)
    collator = batching.DataCollatorRLHF(args.max_prompt_seq_len, **padding)
    loader = batching.make_loader(prompts, sampler, collator)
    return prompts, sampler, loader, batch.updates(len(prompts), get_world_size()), held_out


def make_trainer(args, tokenizer, reward_functions, optimizer_steps: int) -> DeepSpeedPPOTrainer:
    """The trainer around the engines of all models, whose schedules run over ``optimizer_steps``."""
    paths = args.actor_model_name_or_path, args.critic_model_name_or_path
    rlhf_engine = DeepSpeedRLHFEngine(*paths, tokenizer, args, optimizer_steps)
    trainer_class = DeepSpeedPPOTrainerUnsupervised if args.unsupervised_dataset_name else DeepSpeedPPOTrainer
    return trainer_class(rlhf_engine, args, reward_functions)


def generate(trainer, prompt_batches, args, step: int, times: StepTimes, refuse) -> Experience:
    """Rounds of generation: answers of the current policy, seen by all four models."""
    rounds, copies = [], args.num_generations_per_prompt
    for prompt_batch in prompt_batches:
        prompt, mask = (prompt_batch[n].repeat_interleave(copies, dim=0) for n in ("prompt", "prompt_att_mask"))
        columns = prompt_batch.get("columns")
        if columns is not None:
            columns = [row for row in columns for _ in range(copies)]
        rounds.append(trainer.generate_experience(prompt, mask, step, refuse, columns))
        times.generate += trainer.generate_time
        times.gather += trainer.rlhf_engine.generator.gather_time
        times.generated_positions += trainer.generated_steps
    return Experience.concat(rounds, trainer.tokenizer.pad_token_id)


def judge(trainer, experience) -> dict[str, float]:
    """Rewards and advantages into the experience; what it was like."""
    trainer.compute_rewards(experience)
    trainer.get_advantages_and_returns(experience)
    return trainer.experience_metrics(experience)


def update_models(trainer, args, skip, experience, batch, shuffler, unsupervised) -> list[dict]:
    """Optimizer steps of actor and critic from --ppo_epochs passes, the average behind them; the figures of each."""
    losses, engines = [], trainer.rlhf_engine
    if args.drop_groups_without_spread:
        experience = experience.of_groups_with_spread()
    for _ in range(args.ppo_epochs):
        for window in micro_batch_windows(experience, batch, shuffler, unsupervised):
            loss = trainer.train_rlhf(window, skip)
            if loss is not None:
                losses.append(loss)
                if args.enable_ema and loss["actor_step_applied"]:
                    moving_average(engines.actor, engines.actor_ema, args.ema_decay)
    return losses


def save(args, rlhf_engine, tokenizer, card: RunCard, sub_folder: str = "", figures=None) -> None:
    """Each trained model, and the average of the actor, to its folder under --output_dir, or under a folder in it."""
    if args.output_dir is None:
        return
    print_classic("saving model ...")
    actor_path, critic_path = args.actor_model_name_or_path, args.critic_model_name_or_path
    for name, engine, start in (
        ("actor", rlhf_engine.actor, actor_path),
        ("critic", rlhf_engine.critic, critic_path),
        ("actor_ema", rlhf_engine.actor_ema, actor_path),
    ):
        if engine is not None:
            results.save_trained_model(engine, tokenizer, args, start, str(Path(sub_folder) / name), card)


def main():
    # 1. Arguments, processes, seeds
    parser = arguments.build_parser(step=3)
    args = parser.parse_args()
    set_console(args.console)
    device = init_distributed(args)
    if args.dry_run:
        return preflight(args, step=3)
    given, args = args, arguments.settle(args, step=3)
    reward_functions = load_reward_functions(args.reward_function)
    checkpoints = Checkpoints(args, "actor_model_name_or_path", "critic_model_name_or_path")
    args, batch = checkpoints.args, arguments.RLHFBatchSizes.of(checkpoints.args)
    arguments.write_run_config(parser, given, resumed=checkpoints.resumed is not None)
    set_random_seed(args.seed)

    # 2. Tokenizer and prompts, after a look whether all is there
    tokenizer = check_inputs(args, reward_functions)
    prompts, sampler, loader, updates, held_out = load_prompts(args, tokenizer, batch, reward_functions)
    card = RunCard.of(3, args, arguments.given_flags(parser, given), prompts)
    unsupervised = UnsupervisedBatches(args, tokenizer) if args.unsupervised_dataset_name else None

    # 3. The engines and the trainer
    writer = metrics.make_writer(args, checkpoints.resumed)
    total = args.num_train_epochs * updates
    trainer = make_trainer(args, tokenizer, reward_functions, total * args.ppo_epochs * batch.steps_per_pass)
    set_random_seed(args.seed + 1000 * get_rank())  # from here on ranks sample different answers
    shuffler, engines = np.random.default_rng([args.seed, get_rank()]), trainer.rlhf_engine
    reporter = Reporter(args, engines, trainer, writer, total)
    save_to = partial(save, args, engines, tokenizer, card)
    watched = HeldOutPrompts(held_out, args, trainer, reporter, device)
    evaluations = Evaluations(args, 3, watched.measure, watched, writer, save_to, len(watched))
    nonfinite = NonFiniteSteps(args.skip_nonfinite, sampler, checkpoints.save_before_step)
    tracked = dict(trainer=trainer, reporter=reporter, shuffler=shuffler, nonfinite=nonfinite, evaluations=evaluations)
    tracked |= {"unsupervised": unsupervised} if unsupervised else {}
    checkpoints.resume(writer, prompts, engines.trained_engines(), engines.averages(), **tracked)

    # 4. Train
    reporter.begin(len(prompts))
    evaluations.before_training(checkpoints.resumed)
    stop_after = args.test_stop_step if args.enable_test_mode else math.inf
    for epoch, first_update in checkpoints.epochs(args.num_train_epochs):
        print_classic(f"Beginning of Epoch {epoch + 1}/{args.num_train_epochs}, Total Generation Batches {len(loader)}")
        sampler.set_epoch(epoch, first_update)
        batches = iter(loader)
        bar = progress(range(first_update, updates), f"epoch {epoch + 1}/{args.num_train_epochs}")
        for update in bar:
            if (step := checkpoints.steps) >= stop_after or evaluations.stopped:
                break
            # 4a. Experience: answers of the current policy, seen by all four models
            watch, times = perf.Stopwatch(), StepTimes()
            prompt_batches = (batching.to_device(next(batches), device) for _ in range(batch.rounds))
            experience = generate(trainer, prompt_batches, args, step, times, partial(nonfinite.refuse, step=update))

            # 4b. Rewards and advantages, once
            figures = judge(trainer, experience)
            times.experience = watch.lap()

            # 4c. Updates: several passes, each in a fresh order; the KL weight for the next step
            skip = partial(nonfinite.skip, step=update)
            losses = update_models(trainer, args, skip, experience, batch, shuffler, unsupervised)
            trainer.kl_controller.update(figures["kl"], int(figures["used_answers"]))
            times.training = watch.lap()

            # 4d. Report
            figures |= {"skipped_steps": nonfinite.skipped}
            bar.note(perf.pace(reporter.report(epoch, step, experience, figures, losses, times), times.total))
            evaluations.after_step(step + 1, epoch + 1)
            checkpoints.end_step(epoch, update + 1)
        if checkpoints.steps >= stop_after or evaluations.stopped:
            break
    evaluations.at_end(checkpoints.steps, epoch + 1)

    # 5. Save
    save_to()
    if checkpoints.steps >= stop_after:  # a test is not the whole run
        checkpoints.complete()
        print_rank_0(f"test mode: stopped after {checkpoints.steps} steps (--test_stop_step)")
    else:
        checkpoints.finish()
    writer.close()
    reporter.end()


if __name__ == "__main__":
    run_main(main)
