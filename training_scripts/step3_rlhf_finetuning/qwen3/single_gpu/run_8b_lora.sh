#!/usr/bin/env bash
# Step 3, PPO: an actor of Qwen/Qwen3-8B-Base with LoRA, one GPU.
#   bash run_8b_lora.sh ACTOR CRITIC [ACTOR_ZERO_STAGE [CRITIC_ZERO_STAGE [OUTPUT [FLAGS...]]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 3 single_gpu "$@" -- \
    --data_path Dahoas/full-hh-rlhf --data_split 2,4,4 --actor_zero_stage 0 --critic_zero_stage 0 \
    --enable_hybrid_engine --max_prompt_seq_len 512 --max_answer_seq_len 512 \
    --per_device_generation_batch_size 32 --per_device_training_batch_size 2 --gradient_accumulation_steps 16 \
    --actor_learning_rate 1e-5 --critic_learning_rate 5e-6 --num_warmup_steps 20 --kl_ctl 0.05 \
    --normalize_reward --actor_gradient_checkpointing --critic_gradient_checkpointing --actor_lora_dim 64 \
    --actor_lora_scaling 128 --actor_lora_module_name all-linear --actor_lora_learning_rate 0.0002 \
    --critic_lora_dim 64 --critic_lora_scaling 128 --critic_lora_module_name all-linear \
    --critic_lora_learning_rate 0.0002 --only_optimize_lora
