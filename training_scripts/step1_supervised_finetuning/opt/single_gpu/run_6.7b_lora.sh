#!/usr/bin/env bash
# Step 1, SFT: facebook/opt-6.7b with LoRA, one GPU.
#   bash run_6.7b_lora.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 1 single_gpu "$@" -- \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 --model_name_or_path facebook/opt-6.7b --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 1e-3 --weight_decay 0 --num_train_epochs 16 \
    --gradient_accumulation_steps 16 --lr_scheduler_type cosine --num_warmup_steps 0 --gradient_checkpointing \
    --zero_stage 0 --lora_dim 128 --lora_module_name decoder.layers.
