#!/usr/bin/env bash
# Step 3, PPO: an actor of OPT-1.3B with LoRA, one GPU.
#   bash run_1.3b.sh ACTOR CRITIC [ACTOR_ZERO_STAGE [CRITIC_ZERO_STAGE [OUTPUT [FLAGS...]]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 3 single_gpu "$@" -- \
    --data_path Dahoas/rm-static --actor_zero_stage 0 --critic_zero_stage 0 --gradient_accumulation_steps 2 \
    --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --num_warmup_steps 100 \
    --actor_lora_dim 128 --enable_hybrid_engine --actor_gradient_checkpointing --actor_dropout 0.0
