#!/usr/bin/env bash
# DPO: facebook/opt-350m, one node.
#   bash run_350m.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe dpo single_node "$@" -- \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 --model_name_or_path facebook/opt-350m --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 --max_seq_len 512 --learning_rate 5e-5 --weight_decay 0.1 --dropout 0.0 \
    --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 \
    --zero_stage 0
