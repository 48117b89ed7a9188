#!/usr/bin/env bash
# Step 3, PPO: an actor of OPT-30B with LoRA, one node.
#   bash run_30b_lora.sh ACTOR CRITIC [ACTOR_ZERO_STAGE [CRITIC_ZERO_STAGE [OUTPUT [FLAGS...]]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../../launch.sh"
recipe 3 single_node "$@" -- \
    --data_path Dahoas/rm-static --data_split 2,4,4 --per_device_generation_batch_size 4 \
    --per_device_training_batch_size 4 --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 \
    --max_prompt_seq_len 256 --actor_learning_rate 5e-4 --critic_learning_rate 5e-6 --num_train_epochs 1 \
    --lr_scheduler_type cosine --gradient_accumulation_steps 1 --actor_gradient_checkpointing \
    --actor_dropout 0.0 --num_warmup_steps 100 --actor_zero_stage 3 --critic_zero_stage 3 --actor_lora_dim 128 \
    --enable_hybrid_engine --actor_lora_module_name decoder.layers.
