#!/usr/bin/env bash
# Step 1, SFT: HuggingFaceTB/SmolLM2-1.7B, one GPU.
#   bash run_1.7b.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 1 single_gpu "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --model_name_or_path HuggingFaceTB/SmolLM2-1.7B \
    --zero_stage 0 --max_seq_len 1024 --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 --gradient_accumulation_steps 8 --learning_rate 1e-5 --num_warmup_steps 50 \
    --num_train_epochs 2 --mask_prompt --gradient_checkpointing
