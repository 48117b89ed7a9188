#!/usr/bin/env bash
# Step 1, SFT: Qwen/Qwen3-4B-Base, one node.
#   bash run_4b.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 1 single_node "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --model_name_or_path Qwen/Qwen3-4B-Base \
    --zero_stage 3 --max_seq_len 1024 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 2 --learning_rate 1e-5 --num_warmup_steps 50 --num_train_epochs 2 \
    --mask_prompt --gradient_checkpointing
