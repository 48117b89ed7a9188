#!/usr/bin/env bash
# Step 1, SFT: facebook/opt-1.3b with LoRA, one GPU.
#   bash run_1.3b.sh [OUTPUT [ZERO_STAGE [FLAGS...]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 1 single_gpu "$@" -- \
    --data_path Dahoas/rm-static --model_name_or_path facebook/opt-1.3b --gradient_accumulation_steps 8 \
    --learning_rate 2e-5 --lora_dim 128 --lora_learning_rate 5e-4 --zero_stage 0 --enable_tensorboard
