#!/usr/bin/env python
"""Step 2, reward model: teach a model to score answers, from pairs or rankings of them by people.

one process:    python main.py --model_name_or_path facebook/opt-125m --data_path local/demo --output_dir out
many:           deepspeed main.py --model_name_or_path facebook/opt-350m --zero_stage 0 --output_dir out

The loss is the mean over the prompts of an optimizer step, however they fall on ranks, micro-batches and accumulation,
and for a prompt the mean over its pairs of answers; the model is saved as a sequence-classification model with one
label, with the mean and standard deviation of its scores.
"""

import math
import sys
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.process.follow_launcher  # noqa: F401  (before what takes seconds to load)

# isort: split

import torch
from transformers import AutoModel

from utils import arguments, perf
from utils.data import batching, encoding, preparation
from utils.engine import build
from utils.engine.averages import MovingAverage
from utils.engine.nonfinite import NonFiniteSteps
from utils.engine.update import Update
from utils.model.loading import load_config
from utils.model.model_utils import check_model, create_critic_model
from utils.model.reward_model import pair_accuracy
from utils.planning.preflight import preflight
from utils.process.console import print_classic, progress, set_console
from utils.process.launch import init_distributed, run_main
from utils.process.ranks import agree, all_reduce_sum
from utils.process.seeds import set_random_seed
from utils.run import metrics, results
from utils.run.checkpoint import Checkpoints
from utils.run.console_lines import SupervisedConsole
from utils.run.evaluation import Evaluations
from utils.run.model_card import RunCard


def check_inputs(args) -> None:
    """Whether model and data are there and fit; what takes longest, the model's files, comes last."""
    agree(lambda: load_config(args.model_name_or_path, args.trust_remote_code))
    preparation.check_data_of_step(args, encoding.REWARD)
    check_model(AutoModel, args.model_name_or_path, args.trust_remote_code, lengths={"--max_seq_len": args.max_seq_len})


def load_data(args, tokenizer):
    """(training pairs, their sampler, their batches, the evaluation's batches)."""
    train_dataset, eval_dataset = preparation.datasets_of_step(args, tokenizer, encoding.REWARD, args.max_seq_len)
    collator = batching.DataCollatorReward(tokenizer.pad_token_id, args.max_seq_len, args.pad_to_max_length)
    sampler, train_loader = batching.make_train_loader(train_dataset, collator, args)
    eval_loader = batching.make_eval_loader(eval_dataset, collator, args.per_device_eval_batch_size)
    return train_dataset, sampler, train_loader, eval_loader


def load_model(args, tokenizer, ds_config):
    """The model to train, with a fresh value head and the loss that the flags ask for."""
    losses = dict(rm_loss=args.rm_loss, rm_margin=args.rm_margin, rm_center_coef=args.rm_center_coef)
    options = build.model_options(args, args.dropout)
    return create_critic_model(args.model_name_or_path, tokenizer, ds_config, **options, **losses)


@torch.no_grad()
def evaluate(engine, loader, device, iterations: int) -> dict[str, float]:
    """Means over all ranks' pairs: loss, accuracy (a tie is half right), scores; mean and std of all answers' scores.

    ``iterations`` batches of each rank; 0 for all. The pairs of a ranked list count as one together; each of its
    answers counts once.
    """
    engine.eval()
    # pairs, loss, right ones, chosen, rejected, answers, their scores, the squares; fp64: the std is a small difference
    sums = torch.zeros(8, device=device, dtype=torch.float64)
    batches = iterations or len(loader)
    for batch in progress(islice(loader, batches), "evaluating", batches):
        batch = batching.to_device(batch, device)
        outputs, weights = engine(**batch), batch["pair_weights"].double()
        chosen, rejected = outputs["chosen_mean_scores"].double(), outputs["rejected_mean_scores"].double()
        rows = [weights, pair_accuracy(chosen, rejected) * weights, chosen * weights, rejected * weights]
        one, other = batching.answer_shares(batch).unbind(1)
        rows += [one + other, chosen * one + rejected * other, chosen**2 * one + rejected**2 * other]
        pairs, *others = [row.sum() for row in rows]
        sums += torch.stack([pairs, outputs["loss"].double(), *others])
    engine.train()
    pairs, loss, right, chosen, rejected, answers, scores, squares = all_reduce_sum(sums).tolist()
    pairs, answers = max(pairs, 1), max(answers, 1)
    mean = scores / answers
    return {
        "loss": loss / pairs,
        "accuracy": right / pairs,
        "chosen_score": chosen / pairs,
        "rejected_score": rejected / pairs,
        "score_mean": mean,
        "score_std": math.sqrt(max(squares / answers - mean**2, 0.0)),
        "pairs": round(pairs, 3),  # thirds add up to almost 1
    }


def save(args, engine, tokenizer, card: RunCard, sub_folder: str = "", figures=None) -> None:
    """The model as it is to --output_dir or a folder in it, with the scale of its scores beside the weights."""
    config = engine.module.config
    config.reward_score_mean, config.reward_score_std = figures["score_mean"], figures["score_std"]
    results.save_trained_model(engine, tokenizer, args, args.model_name_or_path, sub_folder, card)


def main():
    # 1. Arguments, processes, seeds
    parser = arguments.build_parser(step=2)
    args = parser.parse_args()
    set_console(args.console)
    device = init_distributed(args)
    if args.dry_run:
        return preflight(args, step=2)
    given, checkpoints = args, Checkpoints(arguments.settle(args, step=2), "model_name_or_path")
    args = checkpoints.args
    arguments.write_run_config(parser, given, resumed=checkpoints.resumed is not None)
    set_random_seed(args.seed)

    # 2. Tokenizer and data, after a look whether all is there
    check_inputs(args)
    tokenizer = build.load_tokenizer(args, args.model_name_or_path)
    train_dataset, sampler, train_loader, eval_loader = load_data(args, tokenizer)
    card = RunCard.of(2, args, arguments.given_flags(parser, given), train_dataset)
    steps_per_epoch, total_steps = sampler.steps(), args.num_train_epochs * sampler.steps()

    # 3. Model, optimizer, engine
    writer = metrics.make_writer(args, checkpoints.resumed)
    ds_config = build.train_config(args)
    model = load_model(args, tokenizer, ds_config)
    engine = build.trained_engine(model, args, ds_config, total_steps, keep_trainable=["v_head.weight"])
    update, epoch_loss = Update({"model": engine}), MovingAverage()
    nonfinite = NonFiniteSteps(args.skip_nonfinite, sampler, checkpoints.save_before_step)
    console = SupervisedConsole(args, 2, total_steps)
    measure, save_to = partial(evaluate, engine, eval_loader, device), partial(save, args, engine, tokenizer, card)
    evaluations = Evaluations(args, 2, measure, console, writer, save_to, len(eval_loader))
    tracked = dict(nonfinite=nonfinite, epoch_loss=epoch_loss, evaluations=evaluations)
    checkpoints.resume(writer, train_dataset, {"model": engine}, **tracked)

    # 4. Train
    console.begin(len(train_dataset))
    evaluations.before_training(checkpoints.resumed)
    for epoch, first_step in checkpoints.epochs(args.num_train_epochs):
        console.epoch(epoch, len(train_loader))
        sampler.set_epoch(epoch, first_step)
        engine.train()
        watch = perf.Stopwatch()
        if first_step == 0:
            epoch_loss.reset()
        windows = batching.accumulation_windows(train_loader, args.gradient_accumulation_steps)
        bar = progress(windows, f"epoch {epoch + 1}/{args.num_train_epochs}", steps_per_epoch - first_step)
        for step, window in enumerate(bar, first_step):
            if evaluations.stopped:
                break
            pairs, tokens, answers = batching.count_window(window, batching.count_pairs, device)
            for batch in update.micro_batches(window):
                batch = batching.to_device(batch, device)
                outputs, weights = engine(**batch), batch["pair_weights"]
                update.backward(outputs["loss"] / pairs)
                chosen, rejected = outputs["chosen_mean_scores"].detach(), outputs["rejected_mean_scores"].detach()
                right, margin = pair_accuracy(chosen, rejected) * weights, (chosen - rejected) * weights
                update.record(accuracy=right.sum() / pairs, margin=margin.sum() / pairs)
            figures = update.step(partial(nonfinite.skip, step=step))
            if not update.dropped:
                epoch_loss.update(figures["loss"])
            seconds, steps = watch.lap(), checkpoints.steps + 1
            bar.note(perf.pace(tokens, seconds))
            figures |= {"skipped_steps": nonfinite.skipped}
            shows = (step + 1) % args.log_interval == 0 or step + 1 == steps_per_epoch
            writer.write(steps, figures | console.step(steps, figures, engine, seconds, tokens, answers, shows))
            evaluations.after_step(steps, epoch + 1)
            checkpoints.end_step(epoch, step + 1)
            watch.lap()
        print_classic(f"Epoch {epoch + 1}/{args.num_train_epochs} with loss {epoch_loss.mean}")
        if evaluations.stopped:
            break
        evaluations.after_epoch(checkpoints.steps, epoch + 1)
    evaluations.at_end(checkpoints.steps, epoch + 1)

    # 5. Save, with the scale of the scores from all pairs
    if args.output_dir is not None:
        console.saving()
        save_to(figures=evaluations.figures)
    checkpoints.finish()
    writer.close()
    console.end()


if __name__ == "__main__":
    run_main(main)
