#!/usr/bin/env bash
# Step 1, SFT: facebook/opt-1.3b, one node.
#   bash run_1.3b.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 1 single_node "$@" -- \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 --model_name_or_path facebook/opt-1.3b --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0 \
    --num_train_epochs 16 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 \
    --zero_stage 2 --enable_tensorboard
