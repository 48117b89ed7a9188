"""Step 2 as a script of the published manner writes it, from the published names alone; flags as published_step1.py."""

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from published_step1 import parse_args, train_config
from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from transformers import get_scheduler

from utils.data.data_utils import DataCollatorReward, create_prompt_dataset
from utils.model.model_utils import create_critic_model
from utils.module.lora import (
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
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


def evaluation_reward(model, dataloader, device):
    """(share of right pairs, mean score of the chosen answers)"""
    model.eval()
    right, pairs, scores = 0, 0, 0.0
    for batch in dataloader:
        with torch.no_grad():
            outputs = model(**to_device(batch, device))
        chosen, rejected = outputs["chosen_mean_scores"], outputs["rejected_mean_scores"]
        right, pairs = right + (chosen > rejected).sum(), pairs + len(chosen)
        scores += chosen.mean().float()
    return get_all_reduce_mean(right / pairs).item(), get_all_reduce_mean(scores / len(dataloader)).item()


def main():
    args = parse_args()
    deepspeed.init_distributed()
    args.global_rank = torch.distributed.get_rank()
    device = torch.device(get_accelerator().current_device_name())
    set_random_seed(1234)

    tokenizer = load_hf_tokenizer(args.model_name_or_path, fast_tokenizer=True)
    ds_config = train_config(args, "step2_model")
    rm_model = create_critic_model(
        args.model_name_or_path,
        tokenizer,
        ds_config,
        0,
        dropout=0.0,
        zero_stage=args.zero_stage,
        compute_fp32_loss=True,
    )
    if args.lora_dim > 0:
        rm_model = convert_linear_layer_to_lora(rm_model, "layers.", args.lora_dim)
        rm_model = only_optimize_lora_parameters(rm_model, ["v_head.weight"])
        rm_model = make_model_gradient_checkpointing_compatible(rm_model)
    train_dataset, eval_dataset = create_prompt_dataset(
        args.local_rank,
        args.data_path,
        args.data_split,
        args.data_output_path,
        2,
        1234,
        tokenizer,
        args.max_seq_len,
    )
    data_collator = DataCollatorReward()
    train_dataloader, eval_dataloader = (
        DataLoader(dataset, collate_fn=data_collator, sampler=sampler, batch_size=args.per_device_train_batch_size)
        for dataset, sampler in (
            (train_dataset, DistributedSampler(train_dataset)),
            (eval_dataset, SequentialSampler(eval_dataset)),
        )
    )

    groups = get_optimizer_grouped_parameters(rm_model, 0.0, args.learning_rate)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    steps = args.num_train_epochs * len(train_dataloader)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    rm_model, optimizer, _, lr_scheduler = deepspeed.initialize(
        model=rm_model, optimizer=optimizer, args=args, config=ds_config, lr_scheduler=lr_scheduler
    )
    if args.gradient_checkpointing:
        rm_model.gradient_checkpointing_enable()

    print_rank_0("acc: {}, score: {}".format(*evaluation_reward(rm_model, eval_dataloader, device)), args.global_rank)
    for _ in range(args.num_train_epochs):
        rm_model.train()
        mean_loss = 0
        for batch in train_dataloader:
            outputs = rm_model(**to_device(batch, device), use_cache=False)
            rm_model.backward(outputs["loss"])
            rm_model.step()
            mean_loss += outputs["loss"].item()
        print_rank_0(f"mean loss: {mean_loss / len(train_dataloader)}", args.global_rank)
    print_rank_0("acc: {}, score: {}".format(*evaluation_reward(rm_model, eval_dataloader, device)), args.global_rank)

    print_rank_0("saving model ...", args.global_rank)
    rm_model = convert_lora_to_linear_layer(rm_model)
    if args.global_rank == 0:
        save_hf_format(rm_model, tokenizer, args)
    if args.zero_stage == 3:
        save_zero_three_model(rm_model, args.global_rank, args.output_dir, zero_stage=args.zero_stage)


if __name__ == "__main__":
    main()
