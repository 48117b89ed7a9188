#!/usr/bin/env bash
# Step 1, SFT: google/gemma-2-2b with LoRA, one GPU.
#   bash run_2b_lora.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 1 single_gpu "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --model_name_or_path google/gemma-2-2b \
    --zero_stage 0 --max_seq_len 1024 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 \
    --gradient_accumulation_steps 8 --learning_rate 2e-4 --num_warmup_steps 50 --num_train_epochs 2 \
    --mask_prompt --gradient_checkpointing --lora_dim 64 --lora_scaling 128 --lora_module_name all-linear \
    --only_optimize_lora --lora_learning_rate 0.0002
