#!/usr/bin/env bash
# DPO: meta-llama/Llama-2-7b-hf, one node.
#   bash run_llama2_7b.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"
recipe dpo single_node "$@" -- \
    --data_path Dahoas/rm-static --data_split 2,4,4 --model_name_or_path meta-llama/Llama-2-7b-hf \
    --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 9.65e-6 \
    --weight_decay 0.1 --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine \
    --num_warmup_steps 0 --gradient_checkpointing --zero_stage 3 --offload
