#!/usr/bin/env bash
# DPO: facebook/opt-350m, one GPU.
#   bash run_350m.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe dpo single_gpu "$@" -- \
    --data_path Dahoas/rm-static --model_name_or_path facebook/opt-350m --weight_decay 0.1 --dropout 0.0 \
    --learning_rate 1e-6 --warmup_ratio 0.1 --gradient_accumulation_steps 4 --zero_stage 0 --enable_tensorboard
