#!/usr/bin/env bash
# Step 1, SFT: sberbank-ai/mGPT, one node.
#   bash run_japanese.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"
recipe 1 single_node "$@" -- \
    --data_path mkqa-Japanese Cohere/miracl-ja-queries-22-12 lmqg/qg_jaquad lmqg/qag_jaquad --data_split 10,0,0 \
    --model_name_or_path sberbank-ai/mGPT --per_device_train_batch_size 8 --per_device_eval_batch_size 8 \
    --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0 --num_train_epochs 16 \
    --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --zero_stage 2
