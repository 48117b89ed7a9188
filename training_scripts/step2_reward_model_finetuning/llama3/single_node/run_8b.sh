#!/usr/bin/env bash
# Step 2, reward model: meta-llama/Llama-3.1-8B, one node.
#   bash run_8b.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 2 single_node "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --model_name_or_path meta-llama/Llama-3.1-8B \
    --zero_stage 3 --max_seq_len 1024 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 2 --learning_rate 9e-6 --num_warmup_steps 50 --num_train_epochs 1 \
    --gradient_checkpointing
