#!/usr/bin/env bash
# Step 3, PPO: an actor of Llama-2 7B with LoRA, one node.
#   bash run_llama2_7b_mixz.sh ACTOR CRITIC [ACTOR_ZERO_STAGE [CRITIC_ZERO_STAGE [OUTPUT [FLAGS...]]]]
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"
recipe 3 single_node "$@" -- \
    --data_path Dahoas/rm-static --data_split 2,4,4 --per_device_generation_batch_size 1 \
    --per_device_training_batch_size 1 --generation_batches 1 --ppo_epochs 1 --max_answer_seq_len 256 \
    --max_prompt_seq_len 256 --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_weight_decay 0.1 \
    --critic_weight_decay 0.1 --num_train_epochs 1 --lr_scheduler_type cosine --gradient_accumulation_steps 1 \
    --actor_gradient_checkpointing --critic_gradient_checkpointing --offload_reference_model --actor_dropout 0.0 \
    --num_warmup_steps 100 --actor_zero_stage 3 --critic_zero_stage 3 --enable_mixed_precision_lora \
    --actor_lora_dim 64 --critic_lora_dim 64 --critic_lora_module_name layers. --actor_lora_module_name layers.
