"""Step 1 as a script of the published manner writes it, from the published names alone.

deepspeed published_step1.py --model_name_or_path MODEL --data_path DATA --output_dir OUT --zero_stage 3
"""

import argparse
import math
import time

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from transformers import AutoModelForCausalLM, default_data_collator, get_scheduler

from utils.data.data_utils import create_prompt_dataset
from utils.ds_utils import get_train_ds_config
from utils.model.model_utils import causal_lm_model_to_fp32_loss, create_hf_model
from utils.module.lora import (
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.perf import print_throughput
from utils.utils import (
    get_all_reduce_mean,
    get_optimizer_grouped_parameters,
    load_hf_tokenizer,
    print_rank_0,
    save_hf_format,
    save_zero_three_model,
    set_random_seed,
    to_device,
)


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_path", nargs="*", required=True)
    parser.add_argument("--data_split", default="2,4,4")
    parser.add_argument("--sft_only_data_path", nargs="*", default=[])
    parser.add_argument("--data_output_path", required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--max_seq_len", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--lora_dim", type=int, default=0)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--local_rank", type=int, default=-1)
    return deepspeed.add_config_arguments(parser).parse_args()


def train_config(args, name):
    config = get_train_ds_config(
        offload=False, dtype="fp32", stage=args.zero_stage, enable_tensorboard=False, tb_path="", tb_name=name
    )
    config["train_micro_batch_size_per_gpu"] = args.per_device_train_batch_size
    config["train_batch_size"] = args.per_device_train_batch_size * torch.distributed.get_world_size()
    config["zero_optimization"]["reduce_bucket_size"] = 1_000_000  # DeepSpeed's own takes 2 GB
    return config


def main():
    args = parse_args()
    deepspeed.init_distributed()
    args.global_rank = torch.distributed.get_rank()
    device = torch.device(get_accelerator().current_device_name())
    set_random_seed(1234)
    torch.distributed.barrier()

    tokenizer = load_hf_tokenizer(args.model_name_or_path, fast_tokenizer=True, add_special_tokens=None)
    ds_config = train_config(args, "step1_model")
    model = create_hf_model(AutoModelForCausalLM, args.model_name_or_path, tokenizer, ds_config, dropout=0.0)
    causal_lm_model_to_fp32_loss(model)
    if args.lora_dim > 0:
        model = convert_linear_layer_to_lora(model, "layers.", args.lora_dim)
        model = only_optimize_lora_parameters(model)
        model = make_model_gradient_checkpointing_compatible(model)

    train_dataset, eval_dataset = create_prompt_dataset(
        args.local_rank,
        args.data_path,
        args.data_split,
        args.data_output_path,
        1,
        1234,
        tokenizer,
        args.max_seq_len,
        end_of_conversation_token=tokenizer.eos_token,
        sft_only_data_path=args.sft_only_data_path,
    )
    train_dataloader, eval_dataloader = (
        DataLoader(dataset, collate_fn=default_data_collator, sampler=sampler, batch_size=2)
        for dataset, sampler in (
            (train_dataset, DistributedSampler(train_dataset)),
            (eval_dataset, SequentialSampler(eval_dataset)),
        )
    )

    def evaluation(model):
        model.eval()
        losses = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                losses += model(**to_device(batch, device)).loss.float()
        return math.exp(get_all_reduce_mean(losses / len(eval_dataloader)).item())

    groups = get_optimizer_grouped_parameters(model, 0.0, args.learning_rate)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    steps = args.num_train_epochs * len(train_dataloader)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, _, lr_scheduler = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        args=args,
        config=ds_config,
        lr_scheduler=lr_scheduler,
        dist_init_required=True,
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    print_rank_0(f"ppl: {evaluation(model)}", args.global_rank)
    for _ in range(args.num_train_epochs):
        model.train()
        for batch in train_dataloader:
            start = time.time()
            loss = model(**to_device(batch, device), use_cache=False).loss
            model.backward(loss)
            model.step()
            if torch.distributed.get_rank() == 0:
                print_throughput(model.model, args, time.time() - start, args.global_rank)
        print_rank_0(f"ppl: {evaluation(model)}", args.global_rank)

    print_rank_0("saving the final model ...", args.global_rank)
    model = convert_lora_to_linear_layer(model)
    if args.global_rank == 0:
        save_hf_format(model, tokenizer, args)
    if args.zero_stage == 3:
        save_zero_three_model(model, args.global_rank, args.output_dir, zero_stage=args.zero_stage)


if __name__ == "__main__":
    main()
