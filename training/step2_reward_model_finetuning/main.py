#!/usr/bin/env python
"""Step 2, reward model: teach a model to score answers, from pairs of which people liked one better.

one process:    python main.py --model_name_or_path facebook/opt-125m --data_path local/demo --output_dir out
many:           deepspeed main.py --model_name_or_path facebook/opt-350m --zero_stage 0 --output_dir out

The loss is the mean over the pairs of an optimizer step, however they fall on ranks, micro-batches and accumulation;
the model is saved as a sequence-classification model with one label, with the mean and standard deviation of its
scores.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModel, get_scheduler

from utils import arguments
from utils.data.batching import (
    DataCollatorReward,
    StepBatchSampler,
    accumulation_windows,
    make_loader,
    to_device,
)
from utils.data.encoding import REWARD
from utils.data.preparation import datasets_of_step
from utils.ds_utils import (
    TORCH_DTYPES,
    get_train_ds_config,
    initialize,
    merge_config_file,
    offloads_optimizer,
    with_batch_sizes,
)
from utils.engine.averages import MovingAverage
from utils.engine.nonfinite import NonFiniteNumbers
from utils.engine.optimizer import get_optimizer_grouped_parameters, make_optimizer
from utils.engine.steps import drop_gradients, take_step
from utils.model.model_utils import adapt_model, check_model, create_critic_model, packing_of
from utils.model.reward_model import pair_accuracy
from utils.model.tokenizer import load_hf_tokenizer
from utils.perf import Stopwatch, pace, print_throughput
from utils.planning.preflight import preflight
from utils.process.console import print_rank_0, progress
from utils.process.launch import init_distributed, run_main
from utils.process.ranks import agree, all_reduce_sum
from utils.process.seeds import set_random_seed
from utils.process.world import get_rank, get_world_size
from utils.run.checkpoint import Checkpoints
from utils.run.metrics import make_writer
from utils.run.results import save_hf_format, save_lora_adapters, save_quantised_model


def build_parser():
    parser = arguments.new_parser("Step 2: a reward model from pairs of a chosen and a rejected answer.")
    arguments.add_data_arguments(parser, step=2)
    arguments.add_supervised_arguments(parser, learning_rate=5e-5)
    arguments.add_run_arguments(parser, step=2)
    group = parser.add_argument_group("step 2")
    arguments.add_num_padding_argument(group)
    group.add_argument(
        "--rm_loss",
        choices=["per_token", "end_token"],
        default="end_token",
        help="compare the pair at its ends (InstructGPT), or at every token that differs (per_token, published)",
    )
    group.add_argument(
        "--rm_margin",
        type=arguments.non_negative_float,
        default=0.0,
        help="margin subtracted from chosen - rejected inside the sigmoid, in units of the score (Llama 2); 0 for off",
    )
    group.add_argument(
        "--rm_center_coef",
        type=arguments.non_negative_float,
        default=0.0,
        help="weight of (chosen + rejected end score)^2 in the loss, which keeps the scores around 0, as in 0.01; "
        "0 for off",
    )
    group.add_argument(
        "--eval_interval", type=int, default=0, help="evaluate every so many optimizer steps; 0 after epochs only"
    )
    group.add_argument("--eval_iters", type=int, default=100, help="evaluation batches per rank; 0 for all")
    return parser


@torch.no_grad()
def evaluate(engine, loader, device, iterations: int) -> dict[str, float]:
    """Means over all ranks' pairs: loss, accuracy (a tie is half right), scores; mean and std of all their scores."""
    engine.eval()
    # pairs, loss, right ones, chosen, rejected, all scores, their squares; fp64, since the std is a small difference
    sums = torch.zeros(7, device=device, dtype=torch.float64)
    total = min(len(loader), iterations or len(loader))
    for i, batch in enumerate(progress(loader, "evaluating", total)):
        if i == total:
            break
        batch = to_device(batch, device)
        outputs, weights = engine(**batch), batch["pair_weights"].double()
        chosen, rejected = outputs["chosen_mean_scores"].double(), outputs["rejected_mean_scores"].double()
        rows = [weights, pair_accuracy(chosen, rejected) * weights, chosen * weights, rejected * weights]
        rows += [(chosen + rejected) * weights, (chosen**2 + rejected**2) * weights]
        pairs, *others = [row.sum() for row in rows]
        sums += torch.stack([pairs, outputs["loss"].double(), *others])
    engine.train()
    pairs, loss, right, chosen, rejected, scores, squares = all_reduce_sum(sums).tolist()
    pairs = max(pairs, 1)
    mean = scores / (2 * pairs)
    return {
        "loss": loss / pairs,
        "accuracy": right / pairs,
        "chosen_score": chosen / pairs,
        "rejected_score": rejected / pairs,
        "score_mean": mean,
        "score_std": math.sqrt(max(squares / (2 * pairs) - mean**2, 0.0)),
        "pairs": pairs,
    }


def main():
    # 1. Arguments, processes, seeds
    args = build_parser().parse_args()
    device = init_distributed(args)
    if args.dry_run:
        return preflight(args, step=2)
    arguments.resolve_common(args)
    agree(lambda: arguments.check_output_dir(args.output_dir if get_rank() == 0 else None))
    arguments.check_supervised(args)
    arguments.warn_num_padding(args)
    checkpoints = Checkpoints(args, "model_name_or_path")
    set_random_seed(args.seed)

    # 2. Tokenizer and data, after a look whether the model's files are all there and fit
    lengths = {"--max_seq_len": args.max_seq_len}
    check_model(AutoModel, args.model_name_or_path, args.trust_remote_code, lengths=lengths)
    tokenizer = load_hf_tokenizer(
        args.model_name_or_path,
        add_special_tokens=args.end_of_conversation_token,
        trust_remote_code=args.trust_remote_code,
    )
    train_dataset, eval_dataset = datasets_of_step(args, tokenizer, REWARD, args.max_seq_len)
    collator = DataCollatorReward(tokenizer.pad_token_id, args.max_seq_len, args.pad_to_max_length)
    sampler = StepBatchSampler(
        train_dataset.lengths,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        seed=args.seed,
        group_by_length=args.group_by_length,
    )
    train_loader = make_loader(train_dataset, sampler, collator)
    eval_loader = make_loader(
        eval_dataset, StepBatchSampler(eval_dataset.lengths, args.per_device_eval_batch_size, shuffle=False), collator
    )

    # 3. Model, optimizer, engine
    writer = make_writer(args, checkpoints.resumed)
    ds_config = get_train_ds_config(args.offload, args.dtype, args.zero_stage)
    ds_config = with_batch_sizes(
        merge_config_file(ds_config, args.deepspeed_config_overrides),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
    )
    model = create_critic_model(
        args.model_name_or_path,
        tokenizer,
        ds_config,
        dropout=args.dropout,
        dtype=TORCH_DTYPES[args.dtype],
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        rm_loss=args.rm_loss,
        rm_margin=args.rm_margin,
        rm_center_coef=args.rm_center_coef,
    )
    adapt_model(
        model,
        args,
        gradient_checkpointing=args.gradient_checkpointing,
        keep_trainable=["v_head.weight"],
        packing=packing_of(args),
    )
    groups = get_optimizer_grouped_parameters(model, args.weight_decay, args.lora_learning_rate)
    optimizer = make_optimizer(groups, args.learning_rate, offloads_optimizer(ds_config), paged=args.paged_optimizer)
    steps_per_epoch = sampler.steps()
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.num_warmup_steps, args.num_train_epochs * steps_per_epoch
    )
    engine = initialize(model, ds_config, optimizer, scheduler)
    nonfinite = NonFiniteNumbers(args.skip_nonfinite, sampler, checkpoints.save_before_step)
    epoch_loss = MovingAverage()
    checkpoints.resume(writer, train_dataset, {"model": engine}, nonfinite=nonfinite, epoch_loss=epoch_loss)

    def evaluate_and_report(epoch: int, iterations: int, steps: int) -> dict[str, float]:
        print_rank_0(f"***** Evaluating reward, Epoch {epoch}/{args.num_train_epochs} *****")
        figures = evaluate(engine, eval_loader, device, iterations)
        print_rank_0(
            f"chosen_last_scores (higher is better) : {figures['chosen_score']}, "
            f"rejected_last_scores (lower is better) : {figures['rejected_score']}, "
            f"acc (higher is better) : {figures['accuracy']}"
        )
        writer.write(steps, figures, "eval")
        return figures

    # 4. Train
    print_rank_0("***** Running training *****")
    if checkpoints.resumed is None:
        evaluate_and_report(0, args.eval_iters, 0)
    for epoch, first_step in checkpoints.epochs(args.num_train_epochs):
        print_rank_0(f"Beginning of Epoch {epoch + 1}/{args.num_train_epochs}, Total Micro Batches {len(train_loader)}")
        sampler.set_epoch(epoch, first_step)
        engine.train()
        watch = Stopwatch()
        if first_step == 0:
            epoch_loss.reset()
        windows = accumulation_windows(train_loader, args.gradient_accumulation_steps)
        bar = progress(windows, f"epoch {epoch + 1}/{args.num_train_epochs}", steps_per_epoch - first_step)
        for step, window in enumerate(bar, first_step):
            counts = [
                sum(float(batch["pair_weights"].sum()) for batch in window),
                sum(int(batch["attention_mask"].sum()) for batch in window),
            ]
            pairs, tokens = all_reduce_sum(torch.tensor(counts, device=device)).tolist()
            sums = torch.zeros(3, device=device)  # loss, right pairs, margin
            for i, batch in enumerate(window):
                is_last = i == len(window) - 1
                engine.set_gradient_accumulation_boundary(is_last)
                batch = to_device(batch, device)
                outputs, weights = engine(**batch), batch["pair_weights"]
                loss = outputs["loss"] / pairs
                # DeepSpeed takes the mean of the ranks' gradients; the loss is already a share of the global mean.
                engine.backward(loss * get_world_size(), scale_wrt_gas=False)
                chosen, rejected = outputs["chosen_mean_scores"].detach(), outputs["rejected_mean_scores"].detach()
                right, margin = pair_accuracy(chosen, rejected) * weights, (chosen - rejected) * weights
                sums += torch.stack([loss.detach(), right.sum() / pairs, margin.sum() / pairs])
                if is_last:
                    mean_loss, accuracy, mean_margin = all_reduce_sum(sums).tolist()
                    dropped = nonfinite.found({"model": {"loss": mean_loss}}, step)
                    if dropped:
                        drop_gradients(engine)
                grad_norm = take_step(engine)
            dropped = dropped or nonfinite.found({"model": {"gradient norm": grad_norm}}, step)
            if not dropped:
                epoch_loss.update(mean_loss)
            seconds = watch.lap()
            bar.note(pace(tokens, seconds))
            figures = {"loss": mean_loss, "accuracy": accuracy, "margin": mean_margin}
            figures |= {"lr": scheduler.get_last_lr()[0], "grad_norm": grad_norm, "skipped_steps": nonfinite.skipped}
            if (step + 1) % args.log_interval == 0 or step + 1 == steps_per_epoch:
                figures |= print_throughput(engine, args, seconds, int(tokens), int(2 * pairs))
            steps = checkpoints.steps + 1
            writer.write(steps, figures)
            if args.eval_interval and steps % args.eval_interval == 0:
                evaluate_and_report(epoch + 1, args.eval_iters, steps)
            checkpoints.end_step(epoch, step + 1)
            watch.lap()
        print_rank_0(f"Epoch {epoch + 1}/{args.num_train_epochs} with loss {epoch_loss.mean}")
        iterations = 0 if epoch + 1 == args.num_train_epochs else args.eval_iters
        last_figures = evaluate_and_report(epoch + 1, iterations, checkpoints.steps)

    # 5. Save, with the scale of the scores beside the weights
    if args.output_dir is not None:
        print_rank_0("saving model ...")
        model.config.reward_score_mean, model.config.reward_score_std = (
            last_figures["score_mean"],
            last_figures["score_std"],
        )
        if args.quantize is not None:
            save_quantised_model(engine, tokenizer, args, args.model_name_or_path)
        else:
            save_hf_format(engine, tokenizer, args)
            if args.save_lora_adapters:
                save_lora_adapters(engine, tokenizer, args, args.model_name_or_path)
    checkpoints.finish()
    writer.close()


if __name__ == "__main__":
    run_main(main)
