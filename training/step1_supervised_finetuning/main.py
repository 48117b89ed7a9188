#!/usr/bin/env python
"""Step 1, supervised finetuning: teach a pretrained language model to answer, from prompts and good answers.

one process:    python main.py --model_name_or_path facebook/opt-125m --data_path local/demo --output_dir out
many:           deepspeed main.py --model_name_or_path facebook/opt-1.3b --zero_stage 2 --output_dir out

The loss is the mean over the real tokens of an optimizer step, however they fall on ranks, micro-batches and
accumulation; every finished answer ends with one EOS that is learned like any other token.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from utils import arguments
from utils.data.batching import (
    DataCollatorPacked,
    DataCollatorSFT,
    PackedDataset,
    StepBatchSampler,
    accumulation_windows,
    count_batch,
    make_loader,
    to_device,
)
from utils.data.encoding import SFT
from utils.data.preparation import datasets_of_step
from utils.ds_utils import (
    TORCH_DTYPES,
    get_train_ds_config,
    initialize,
    merge_config_file,
    offloads_optimizer,
    with_batch_sizes,
)
from utils.engine.nonfinite import NonFiniteNumbers
from utils.engine.optimizer import get_optimizer_grouped_parameters, make_optimizer
from utils.engine.steps import drop_gradients, take_step
from utils.model.inputs import forward_accepts, sft_inputs
from utils.model.losses import LabelLogProbs, causal_lm_loss_sum, label_count
from utils.model.model_utils import adapt_model, check_model, create_hf_model, packing_of
from utils.model.soft_prompt import check_soft_prompt_inputs, make_soft_prompt_model, save_soft_prompt
from utils.model.tokenizer import load_hf_tokenizer
from utils.perf import Stopwatch, pace, print_throughput
from utils.planning.preflight import preflight
from utils.process.console import now, print_rank_0, progress
from utils.process.errors import UserError
from utils.process.launch import init_distributed, run_main
from utils.process.ranks import agree, all_reduce_sum
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank, get_world_size
from utils.run.checkpoint import Checkpoints
from utils.run.metrics import make_writer
from utils.run.results import save_hf_format, save_lora_adapters, save_quantised_model


def build_parser():
    parser = arguments.new_parser("Step 1: supervised finetuning of a causal language model on prompts and answers.")
    arguments.add_data_arguments(parser, step=1)
    arguments.add_supervised_arguments(parser, learning_rate=1e-3)
    arguments.add_soft_prompt_arguments(parser)
    arguments.add_run_arguments(parser, step=1)
    group = parser.add_argument_group("step 1")
    group.add_argument(
        "--mask_prompt", action="store_true", help="learn the answers only; off: prompts too, as published"
    )
    group.add_argument(
        "--packing",
        action="store_true",
        help="fill blocks of --max_seq_len with whole rows that do not see each other; a batch then counts blocks",
    )
    group.add_argument("--print_loss", action="store_true", help="print the loss of every step on every rank")
    return parser


@torch.no_grad()
def evaluate(engine, label_log_probs, loader, device) -> tuple[float, float]:
    """(perplexity, mean loss per token) over all evaluation tokens of all ranks."""
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in progress(loader, "evaluating"):
        batch = to_device(batch, device)
        loss_sum = causal_lm_loss_sum(label_log_probs, sft_inputs(engine.module, batch), batch["labels"])
        total += torch.stack([loss_sum.double(), total.new_tensor(label_count(batch["labels"]))])
    engine.train()
    loss_sum, tokens = all_reduce_sum(total.float()).tolist()
    loss = loss_sum / max(tokens, 1)
    return math.exp(min(loss, 700.0)), loss


def main():
    # 1. Arguments, processes, seeds
    args = build_parser().parse_args()
    device = init_distributed(args)
    if args.dry_run:
        return preflight(args, step=1)
    arguments.resolve_common(args)
    agree(lambda: arguments.check_output_dir(args.output_dir if get_rank() == 0 else None))
    arguments.check_supervised(args)
    arguments.check_soft_prompt(args)
    checkpoints = Checkpoints(args, "model_name_or_path")
    set_random_seed(args.seed)

    # 2. Tokenizer and data, after a look whether the model's files are all there and fit
    virtual = {} if args.soft_prompt is None else {"--num_virtual_tokens": args.num_virtual_tokens}
    lengths = virtual | {"--max_seq_len": args.max_seq_len}
    check_model(AutoModelForCausalLM, args.model_name_or_path, args.trust_remote_code, lengths=lengths)
    tokenizer = load_hf_tokenizer(
        args.model_name_or_path,
        add_special_tokens=args.end_of_conversation_token,
        trust_remote_code=args.trust_remote_code,
    )
    if args.soft_prompt is not None:
        check_soft_prompt_inputs(args, tokenizer)
    train_dataset, eval_dataset = datasets_of_step(args, tokenizer, SFT, args.max_seq_len)
    collator = DataCollatorSFT(tokenizer.pad_token_id, args.max_seq_len, args.mask_prompt, args.pad_to_max_length)
    eval_sampler = StepBatchSampler(eval_dataset.lengths, args.per_device_eval_batch_size, shuffle=False)
    eval_loader = make_loader(eval_dataset, eval_sampler, collator)
    if args.packing:
        train_dataset = PackedDataset(train_dataset, args.max_seq_len, args.seed)
        collator = DataCollatorPacked(tokenizer.pad_token_id, args.mask_prompt)
        print_rank_0(f"packing: {len(train_dataset)} blocks, {100 * train_dataset.fill:.1f} % of their tokens are real")
    sampler = StepBatchSampler(
        train_dataset.lengths,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        seed=args.seed,
        group_by_length=args.group_by_length,
    )
    train_loader = make_loader(train_dataset, sampler, collator)

    # 3. Model, optimizer, engine
    writer = make_writer(args, checkpoints.resumed)
    ds_config = get_train_ds_config(args.offload, args.dtype, args.zero_stage)
    ds_config = with_batch_sizes(
        merge_config_file(ds_config, args.deepspeed_config_overrides),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
    )
    model = create_hf_model(
        AutoModelForCausalLM,
        args.model_name_or_path,
        tokenizer,
        ds_config,
        dropout=args.dropout,
        dtype=TORCH_DTYPES[args.dtype],
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    if args.packing and not forward_accepts(model, "position_ids"):
        raise UserError(
            f"--packing: {type(model).__name__} takes no positions, so rows of a block cannot be kept apart"
        )
    if args.soft_prompt is not None:
        model = make_soft_prompt_model(model, tokenizer, args)
    adapt_model(model, args, gradient_checkpointing=args.gradient_checkpointing, packing=packing_of(args))
    groups = get_optimizer_grouped_parameters(model, args.weight_decay, args.lora_learning_rate)
    learning_rate = args.learning_rate if args.soft_prompt is None else args.soft_prompt_learning_rate
    optimizer = make_optimizer(groups, learning_rate, offloads_optimizer(ds_config), paged=args.paged_optimizer)
    steps_per_epoch = sampler.steps()
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.num_warmup_steps, args.num_train_epochs * steps_per_epoch
    )
    engine = initialize(model, ds_config, optimizer, scheduler)
    label_log_probs = LabelLogProbs(engine)
    nonfinite = NonFiniteNumbers(args.skip_nonfinite, sampler, checkpoints.save_before_step)
    checkpoints.resume(writer, train_dataset, {"model": engine}, nonfinite=nonfinite)

    def evaluate_and_report(epoch: int) -> None:
        print_rank_0(f"***** Evaluating perplexity, Epoch {epoch}/{args.num_train_epochs} *****")
        perplexity, loss = evaluate(engine, label_log_probs, eval_loader, device)
        print_rank_0(f"ppl: {perplexity}, loss: {loss}")
        writer.write(checkpoints.steps, {"perplexity": perplexity, "loss": loss}, "eval")

    # 4. Train
    print_rank_0("***** Running training *****")
    if checkpoints.resumed is None:
        evaluate_and_report(0)
    for epoch, first_step in checkpoints.epochs(args.num_train_epochs):
        print_rank_0(f"Beginning of Epoch {epoch + 1}/{args.num_train_epochs}, Total Micro Batches {len(train_loader)}")
        sampler.set_epoch(epoch, first_step)
        engine.train()
        watch = Stopwatch()
        windows = accumulation_windows(train_loader, args.gradient_accumulation_steps)
        bar = progress(windows, f"epoch {epoch + 1}/{args.num_train_epochs}", steps_per_epoch - first_step)
        for step, window in enumerate(bar, first_step):
            counts = torch.tensor([count_batch(batch) for batch in window], dtype=torch.float32, device=device).sum(0)
            learned, tokens, rows = all_reduce_sum(counts).tolist()
            step_loss = torch.zeros((), device=device)
            for i, batch in enumerate(window):
                is_last = i == len(window) - 1
                engine.set_gradient_accumulation_boundary(is_last)
                batch = to_device(batch, device)
                loss_sum = causal_lm_loss_sum(label_log_probs, sft_inputs(engine.module, batch), batch["labels"])
                loss = loss_sum / max(learned, 1)
                # DeepSpeed takes the mean of the ranks' gradients; the loss is already a share of the global mean.
                engine.backward(loss * get_world_size(), scale_wrt_gas=False)
                step_loss += loss.detach()
                if is_last:
                    mean_loss = all_reduce_sum(step_loss).item()
                    dropped = nonfinite.found({"model": {"loss": mean_loss}}, step)
                    if dropped:
                        drop_gradients(engine)
                grad_norm = take_step(engine)
            dropped = dropped or nonfinite.found({"model": {"gradient norm": grad_norm}}, step)
            if args.print_loss:
                print(
                    f"Time: {now()}, Epoch: {epoch}, Step: {step}, Rank: {get_rank()}, loss = {mean_loss}", flush=True
                )
            seconds = watch.lap()
            bar.note(pace(tokens, seconds))
            figures = {"loss": mean_loss, "lr": scheduler.get_last_lr()[0], "grad_norm": grad_norm}
            figures |= {"skipped_steps": nonfinite.skipped}
            if (step + 1) % args.log_interval == 0 or step + 1 == steps_per_epoch:
                figures |= print_throughput(engine, args, seconds, int(tokens), int(rows))
            writer.write(checkpoints.steps + 1, figures)
            checkpoints.end_step(epoch, step + 1)
        evaluate_and_report(epoch + 1)

    # 5. Save
    if args.output_dir is not None:
        print_rank_0("saving the final model ...")
        if args.soft_prompt is not None:
            save_soft_prompt(engine.module, tokenizer, Path(args.output_dir))
        elif args.quantize is not None:
            save_quantised_model(engine, tokenizer, args, args.model_name_or_path)
        else:
            save_hf_format(engine, tokenizer, args)
            if args.save_lora_adapters:
                save_lora_adapters(engine, tokenizer, args, args.model_name_or_path)
    checkpoints.finish()
    writer.close()


if __name__ == "__main__":
    run_main(main)
