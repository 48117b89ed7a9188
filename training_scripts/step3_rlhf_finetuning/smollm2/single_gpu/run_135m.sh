#!/usr/bin/env bash
# Step 3, PPO: an actor of HuggingFaceTB/SmolLM2-135M, one GPU.
#   bash run_135m.sh ACTOR CRITIC [ACTOR_ZERO_STAGE [CRITIC_ZERO_STAGE [OUTPUT [FLAGS...]]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 3 single_gpu "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --actor_zero_stage 0 --critic_zero_stage 0 \
    --enable_hybrid_engine --max_prompt_seq_len 512 --max_answer_seq_len 512 \
    --per_device_generation_batch_size 32 --per_device_training_batch_size 8 --gradient_accumulation_steps 4 \
    --actor_learning_rate 1e-6 --critic_learning_rate 5e-6 --num_warmup_steps 20 --kl_ctl 0.05 \
    --normalize_reward
