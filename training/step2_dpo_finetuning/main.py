#!/usr/bin/env python
"""Step 2, DPO: teach a language model which of two answers people prefer, without a reward model and without sampling.

one process:    python main.py --model_name_or_path sft --data_path local/demo --output_dir out
many:           deepspeed main.py --model_name_or_path sft --zero_stage 2 --output_dir out

It takes the place of steps 2 and 3: it starts from the model of step 1, reads the rows of step 2, and saves a language
model. The loss is the mean over the prompts of an optimizer step, however they fall on ranks, micro-batches and
accumulation, and for a prompt the mean over its pairs of answers. dpo_math.py holds the mathematics, reference.py what
the model is compared with.
"""

import sys
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils.process.follow_launcher  # noqa: F401  (before what takes seconds to load)

# isort: split

import torch
from transformers import AutoModelForCausalLM

from training.step2_dpo_finetuning.dpo_math import PreferenceLoss, Side, answer_lengths
from training.step2_dpo_finetuning.reference import Reference, batch_log_probs, make_reference
from utils import arguments, perf
from utils.arguments import DPO
from utils.data import batching, encoding, preparation
from utils.engine import build
from utils.engine.nonfinite import NonFiniteSteps
from utils.engine.update import Update
from utils.model.loading import load_config
from utils.model.losses import LabelLogProbs
from utils.model.model_utils import check_model, create_hf_model
from utils.planning.preflight import preflight
from utils.process.console import now, progress, set_console
from utils.process.launch import init_distributed, run_main
from utils.process.ranks import agree, all_reduce_sum
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank
from utils.run import metrics, results
from utils.run.checkpoint import Checkpoints
from utils.run.console_lines import SupervisedConsole
from utils.run.evaluation import Evaluations
from utils.run.model_card import RunCard


def check_inputs(args) -> None:
    """Whether model and data are there and fit; what takes longest, the model's files, comes last."""
    agree(lambda: load_config(args.model_name_or_path, args.trust_remote_code))
    preparation.check_data_of_step(args, encoding.REWARD)
    lengths = {"--max_seq_len": args.max_seq_len}
    check_model(AutoModelForCausalLM, args.model_name_or_path, args.trust_remote_code, lengths=lengths)


def load_data(args, tokenizer):
    """(training rows, evaluation rows, the sampler of the former, their batches, the evaluation's batches)."""
    rows = preparation.datasets_of_step(args, tokenizer, encoding.REWARD, args.max_seq_len)
    width = max(dataset.answers_per_row for dataset in rows)
    train = batching.NumberedRows(rows[0], 0, width)
    evaluation = batching.NumberedRows(rows[1], len(train) * width, width)
    collator = batching.DataCollatorDPO(tokenizer.pad_token_id, args.max_seq_len, args.pad_to_max_length)
    sampler, train_loader = batching.make_train_loader(train, collator, args)
    eval_loader = batching.make_eval_loader(evaluation, collator, args.per_device_eval_batch_size)
    return train, evaluation, sampler, train_loader, eval_loader


def compare(label_log_probs: LabelLogProbs, reference: Reference, loss: PreferenceLoss, batch: dict):
    """(loss of each pair [pairs], its figures by name): one pass of the policy over all answers of a batch."""
    ref_log_probs = reference(batch)  # first: what that pass needs is gone before the policy's keeps anything
    answers = batch_log_probs(label_log_probs, batch), ref_log_probs, answer_lengths(batch["labels"])
    chosen, rejected = (Side.of(which, *answers) for which in batch["pairs"].unbind(1))
    return loss(chosen, rejected), loss.figures(chosen, rejected)


@torch.no_grad()
def evaluate(engine, compare_answers, loader, device, iterations: int) -> dict[str, float]:
    """Means over all ranks' pairs, of so many batches of each (0: all); the pairs of a ranked list count as one."""
    engine.eval()
    sums: dict[str, torch.Tensor] = {}
    batches = iterations or len(loader)
    for batch in progress(islice(loader, batches), "evaluating", batches):
        batch = batching.to_device(batch, device)
        losses, figures = compare_answers(batch)
        weights = batch["pair_weights"].double()
        for name, values in {"loss": losses, **figures, "pairs": torch.ones_like(losses)}.items():
            sums[name] = sums.get(name, 0.0) + (values * weights).sum()
    engine.train()
    totals = dict(zip(sums, all_reduce_sum(torch.stack(list(sums.values()))).tolist(), strict=True))
    pairs = totals.pop("pairs")
    means = {name: total / max(pairs, 1) for name, total in totals.items()}
    return means | {"pairs": round(pairs, 3)}  # thirds add up to almost 1


def save(args, engine, tokenizer, card: RunCard, sub_folder: str = "", figures=None) -> None:
    """The model as it is to --output_dir or a folder in it; ``figures`` have no place there."""
    results.save_trained_model(engine, tokenizer, args, args.model_name_or_path, sub_folder, card)


def main():
    # 1. Arguments, processes, seeds
    parser = arguments.build_parser(DPO)
    args = parser.parse_args()
    set_console(args.console)
    device = init_distributed(args)
    if args.dry_run:
        return preflight(args, DPO)
    given, checkpoints = args, Checkpoints(arguments.settle(args, DPO), "model_name_or_path")
    args = checkpoints.args
    arguments.write_run_config(parser, given, resumed=checkpoints.resumed is not None)
    set_random_seed(args.seed)

    # 2. Tokenizer and data, after a look whether all is there
    check_inputs(args)
    tokenizer = build.load_tokenizer(args, args.model_name_or_path)
    train_rows, eval_rows, sampler, train_loader, eval_loader = load_data(args, tokenizer)
    card = RunCard.of(DPO, args, arguments.given_flags(parser, given), train_rows.dataset)
    steps_per_epoch, total_steps = sampler.steps(), args.num_train_epochs * sampler.steps()

    # 3. The policy's engine, and the reference
    writer = metrics.make_writer(args, checkpoints.resumed)
    ds_config, options = build.train_config(args), build.model_options(args, args.dropout)
    model = create_hf_model(AutoModelForCausalLM, args.model_name_or_path, tokenizer, ds_config, **options)
    engine = build.trained_engine(model, args, ds_config, total_steps)
    label_log_probs, update = LabelLogProbs(engine), Update({"model": engine})
    reference = make_reference(args, label_log_probs, tokenizer, (train_rows, eval_rows), device)
    compare_answers = partial(compare, label_log_probs, reference, PreferenceLoss.of(args))
    nonfinite = NonFiniteSteps(args.skip_nonfinite, sampler, checkpoints.save_before_step)
    console = SupervisedConsole(args, DPO, total_steps)
    measure = partial(evaluate, engine, compare_answers, eval_loader, device)
    save_to = partial(save, args, engine, tokenizer, card)
    evaluations = Evaluations(args, DPO, measure, console, writer, save_to, len(eval_loader))
    checkpoints.resume(writer, train_rows.dataset, {"model": engine}, nonfinite=nonfinite, evaluations=evaluations)

    # 4. Train
    console.begin(len(train_rows))
    evaluations.before_training(checkpoints.resumed)
    for epoch, first_step in checkpoints.epochs(args.num_train_epochs):
        console.epoch(epoch, len(train_loader))
        sampler.set_epoch(epoch, first_step)
        engine.train()
        watch = perf.Stopwatch()
        windows = batching.accumulation_windows(train_loader, args.gradient_accumulation_steps)
        bar = progress(windows, f"epoch {epoch + 1}/{args.num_train_epochs}", steps_per_epoch - first_step)
        for step, window in enumerate(bar, first_step):
            if evaluations.stopped:
                break
            pairs, tokens, answers = batching.count_window(window, batching.count_pairs, device)
            for batch in update.micro_batches(window):
                batch = batching.to_device(batch, device)
                losses, figures = compare_answers(batch)
                shares = batch["pair_weights"].double() / pairs
                update.backward((losses * shares).sum().float())
                update.record(**{name: (values * shares).sum() for name, values in figures.items()})
            figures = update.step(partial(nonfinite.skip, step=step))
            if args.print_loss:
                place = f"Time: {now()}, Epoch: {epoch}, Step: {step}, Rank: {get_rank()}"
                print(f"{place}, loss = {figures['loss']}", flush=True)
            seconds, steps = watch.lap(), checkpoints.steps + 1
            bar.note(perf.pace(tokens, seconds))
            figures |= {"skipped_steps": nonfinite.skipped}
            shows = (step + 1) % args.log_interval == 0 or step + 1 == steps_per_epoch
            writer.write(steps, figures | console.step(steps, figures, engine, seconds, tokens, answers, shows))
            evaluations.after_step(steps, epoch + 1)
            checkpoints.end_step(epoch, step + 1)
            watch.lap()
        if evaluations.stopped:
            break
        evaluations.after_epoch(checkpoints.steps, epoch + 1)
    evaluations.at_end(checkpoints.steps, epoch + 1)

    # 5. Save
    if args.output_dir is not None:
        console.saving()
        save_to()
    checkpoints.finish()
    writer.close()
    console.end()


if __name__ == "__main__":
    run_main(main)
