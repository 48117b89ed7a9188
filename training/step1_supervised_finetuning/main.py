#!/usr/bin/env python
"""Step 1, supervised finetuning: teach a pretrained language model to answer, from prompts and good answers.

one process:    python main.py --model_name_or_path facebook/opt-125m --data_path local/demo --output_dir out
many:           deepspeed main.py --model_name_or_path facebook/opt-1.3b --zero_stage 2 --output_dir out

The loss is the mean over the real tokens of an optimizer step, however they fall on ranks, micro-batches and
accumulation; every finished answer ends with one EOS that is learned like any other token.
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

from utils import arguments, perf
from utils.data import batching, encoding, preparation
from utils.engine import build
from utils.engine.nonfinite import NonFiniteSteps
from utils.engine.update import Update
from utils.model import soft_prompt
from utils.model.inputs import sft_inputs
from utils.model.loading import load_config
from utils.model.losses import LabelLogProbs, causal_lm_loss_sum, label_count, perplexity_of
from utils.model.model_utils import check_model, create_hf_model
from utils.model.packing import choose_packing, refuse_state
from utils.planning.preflight import preflight
from utils.process.console import now, print_rank_0, progress, set_console
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
    preparation.check_data_of_step(args, encoding.SFT)
    virtual = {} if args.soft_prompt is None else {"--num_virtual_tokens": args.num_virtual_tokens}
    lengths = virtual | {"--max_seq_len": args.max_seq_len}
    check_model(AutoModelForCausalLM, args.model_name_or_path, args.trust_remote_code, lengths=lengths)


def load_data(args, tokenizer):
    """(training rows, their sampler, their batches, the evaluation's batches)."""
    train_dataset, eval_dataset = preparation.datasets_of_step(args, tokenizer, encoding.SFT, args.max_seq_len)
    collator = batching.DataCollatorSFT(
        tokenizer.pad_token_id, args.max_seq_len, args.mask_prompt, args.pad_to_max_length
    )
    eval_loader = batching.make_eval_loader(eval_dataset, collator, args.per_device_eval_batch_size)
    if args.packing:
        train_dataset = batching.PackedDataset(train_dataset, args.max_seq_len, args.seed)
        collator = batching.DataCollatorPacked(tokenizer.pad_token_id, args.mask_prompt)
        print_rank_0(f"packing: {len(train_dataset)} blocks, {100 * train_dataset.fill:.1f} % of their tokens are real")
    sampler, train_loader = batching.make_train_loader(train_dataset, collator, args)
    return train_dataset, sampler, train_loader, eval_loader


def load_model(args, tokenizer, ds_config):
    """The language model to train, behind a soft prompt where the flags ask for one."""
    options = build.model_options(args, args.dropout)
    model = create_hf_model(AutoModelForCausalLM, args.model_name_or_path, tokenizer, ds_config, **options)
    if args.packing:
        refuse_state(model)
    return model if args.soft_prompt is None else soft_prompt.make_soft_prompt_model(model, tokenizer, args)


@torch.no_grad()
def evaluate(engine, label_log_probs, loader, device, iterations: int) -> dict[str, float]:
    """Perplexity and mean loss per token over the tokens of all ranks, of so many batches of each; 0 for all."""
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    batches = iterations or len(loader)
    for batch in progress(islice(loader, batches), "evaluating", batches):
        batch = batching.to_device(batch, device)
        loss_sum = causal_lm_loss_sum(label_log_probs, sft_inputs(engine.module, batch), batch["labels"])
        total += torch.stack([loss_sum.double(), total.new_tensor(label_count(batch["labels"]))])
    engine.train()
    loss_sum, tokens = all_reduce_sum(total.float()).tolist()
    loss = loss_sum / max(tokens, 1)
    return {"perplexity": perplexity_of(loss), "loss": loss}


def save(args, engine, tokenizer, card: RunCard, sub_folder: str = "", figures=None) -> None:
    """The model as it is, or its soft prompt, to --output_dir or a folder in it; ``figures`` have no place there."""
    if args.soft_prompt is not None:
        results.save_trained_soft_prompt(engine, tokenizer, args, sub_folder, card)
    else:
        results.save_trained_model(engine, tokenizer, args, args.model_name_or_path, sub_folder, card)


def main():
    # 1. Arguments, processes, seeds
    parser = arguments.build_parser(step=1)
    args = parser.parse_args()
    set_console(args.console)
    device = init_distributed(args)
    if args.dry_run:
        return preflight(args, step=1)
    given, checkpoints = args, Checkpoints(arguments.settle(args, step=1), "model_name_or_path")
    args = checkpoints.args
    arguments.write_run_config(parser, given, resumed=checkpoints.resumed is not None)
    set_random_seed(args.seed)

    # 2. Tokenizer and data, after a look whether all is there
    check_inputs(args)
    tokenizer = build.load_tokenizer(args, args.model_name_or_path)
    if args.soft_prompt is not None:
        soft_prompt.check_soft_prompt_inputs(args, tokenizer)
    train_dataset, sampler, train_loader, eval_loader = load_data(args, tokenizer)
    card = RunCard.of(1, args, arguments.given_flags(parser, given), train_dataset)
    steps_per_epoch, total_steps = sampler.steps(), args.num_train_epochs * sampler.steps()

    # 3. Model, optimizer, engine
    writer = metrics.make_writer(args, checkpoints.resumed)
    ds_config = build.train_config(args)
    model = load_model(args, tokenizer, ds_config)
    learning_rate = args.learning_rate if args.soft_prompt is None else args.soft_prompt_learning_rate
    engine = build.trained_engine(model, args, ds_config, total_steps, learning_rate=learning_rate)
    label_log_probs, update = LabelLogProbs(engine), Update({"model": engine})
    packing = choose_packing(label_log_probs) if args.packing else ""
    nonfinite = NonFiniteSteps(args.skip_nonfinite, sampler, checkpoints.save_before_step)
    console = SupervisedConsole(args, 1, total_steps)
    measure = partial(evaluate, engine, label_log_probs, eval_loader, device)
    save_to = partial(save, args, engine, tokenizer, card)
    evaluations = Evaluations(args, 1, measure, console, writer, save_to, len(eval_loader))
    checkpoints.resume(writer, train_dataset, {"model": engine}, nonfinite=nonfinite, evaluations=evaluations)

    # 4. Train
    console.begin(len(train_dataset.dataset if args.packing else train_dataset))  # packed ones have blocks
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
            learned, tokens, rows = batching.count_window(window, batching.count_batch, device)
            for batch in update.micro_batches(window):
                batch = batching.to_device(batch, device)
                inputs = sft_inputs(engine.module, batch, packing)
                loss_sum = causal_lm_loss_sum(label_log_probs, inputs, batch["labels"])
                update.backward(loss_sum / max(learned, 1))
            figures = update.step(partial(nonfinite.skip, step=step))
            if args.print_loss:
                place = f"Time: {now()}, Epoch: {epoch}, Step: {step}, Rank: {get_rank()}"
                print(f"{place}, loss = {figures['loss']}", flush=True)
            seconds, steps = watch.lap(), checkpoints.steps + 1
            bar.note(perf.pace(tokens, seconds))
            figures |= {"skipped_steps": nonfinite.skipped}
            shows = (step + 1) % args.log_interval == 0 or step + 1 == steps_per_epoch
            writer.write(steps, figures | console.step(steps, figures, engine, seconds, tokens, rows, shows))
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
