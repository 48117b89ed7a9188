#!/usr/bin/env bash
# Step 2, reward model: Qwen/Qwen3-4B-Base with LoRA, one GPU.
#   bash run_4b_lora.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 2 single_gpu "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --model_name_or_path Qwen/Qwen3-4B-Base \
    --zero_stage 0 --max_seq_len 1024 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 16 --learning_rate 1e-4 --num_warmup_steps 50 --num_train_epochs 1 \
    --gradient_checkpointing --lora_dim 64 --lora_scaling 128 --lora_module_name all-linear --only_optimize_lora \
    --lora_learning_rate 0.0002
