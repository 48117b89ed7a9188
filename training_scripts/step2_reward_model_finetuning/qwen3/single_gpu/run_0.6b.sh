#!/usr/bin/env bash
# Step 2, reward model: Qwen/Qwen3-0.6B-Base, one GPU.
#   bash run_0.6b.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 2 single_gpu "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --model_name_or_path Qwen/Qwen3-0.6B-Base \
    --zero_stage 0 --max_seq_len 1024 --per_device_train_batch_size 16 --per_device_eval_batch_size 16 \
    --gradient_accumulation_steps 4 --learning_rate 9e-6 --num_warmup_steps 50 --num_train_epochs 1
