#!/usr/bin/env bash
# Does step 3 make a model more right? Sums in two steps in GSM8K's form. A small model is finetuned on the working of people who
# err in 40 % of the sums, and errs as they do; then it learns by reinforcement from sums of which it is told alone whether its
# final number is right. No reward model.
#
#   bash training_scripts/arithmetic.sh [OUTPUT]         default: output/arithmetic
#
# SEEDS      of the runs (default "1 2 3")
# SFT_ROWS, PROMPTS   rows of step 1 and prompts of step 3 (default 8000, 1600)
# NAME, RL_FLAGS   folder of step 3 in OUTPUT/seed_SEED (default step3), and more flags of it, as in "--kl_ctl 0.02"; they win
# RANKS      processes to train with (default: the GPUs, or 2 on a CPU with two or more cores)
#
# A step that is done is not run again (its run says so in OUTPUT/seed_SEED/STEP/done).
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$(realpath -m "${1:-$project/output/arithmetic}")"
set -- # what is sourced below must not take them for its own
# shellcheck source=training_scripts/setup_env.sh
. "$project/training_scripts/setup_env.sh"
# shellcheck source=training_scripts/launch.sh
. "$project/training_scripts/launch.sh"
ranks="${RANKS:-$(count_ranks)}"
name="${NAME:-step3}"
read -rd '' -a rl_flags <<<"${RL_FLAGS:-}" || true
cd "$project"

step() { # step NUMBER FOLDER FLAGS...
    if [ -f "$2/done" ]; then return; fi
    launch "$1" "$2" --overwrite_output_dir --data_output_path "$output/data" --dtype fp32 --seed "$seed" --console brief \
        "${@:3}"
    touch "$2/done"
}

[ -d "$output/rows" ] || python -m utils.demo.arithmetic --output "$output/rows"
for seed in ${SEEDS:-1 2 3}; do
    folder="$output/seed_$seed" started=$SECONDS
    [ -d "$folder/base" ] || TQDM_DISABLE=1 python -m utils.demo.tiny_model --output "$folder/base" --seed "$seed"
    step 1 "$folder/step1" --model_name_or_path "$folder/base" --data_path "$output/rows/taught" --data_split 1,0,0 \
        --max_seq_len 72 --mask_prompt --per_device_train_batch_size $((16 / ranks)) --max_train_samples "${SFT_ROWS:-8000}" \
        --num_train_epochs 3 --learning_rate 2e-3 --num_warmup_steps 20 --log_interval 100
    step 3 "$folder/$name" --actor_model_name_or_path "$folder/step1" --data_path "$output/rows/asked" --data_split 0,0,1 \
        --reward_function utils/demo/arithmetic.py:exact --reward_model_weight 0 --missing_eos_penalty 0 \
        --advantage_estimator grpo --no-scale_group_rewards --drop_groups_without_spread --num_generations_per_prompt 8 \
        --max_prompt_seq_len 40 --max_answer_seq_len 40 --per_device_generation_batch_size $((256 / ranks)) \
        --per_device_training_batch_size $((64 / ranks)) --ppo_epochs 2 --actor_learning_rate 3e-4 --num_warmup_steps 5 \
        --kl_ctl 0 --enable_hybrid_engine --max_train_samples "${PROMPTS:-1600}" --log_interval 5 --sample_interval 0 \
        ${rl_flags[@]+"${rl_flags[@]}"}
    echo "=== seed $seed, $((SECONDS - started)) s: 200 questions that no step has seen; mean of exact is what is right ==="
    python evaluation_scripts/prompt_eval.py --model_name_or_path_baseline "$folder/step1" \
        --model_name_or_path_finetune "$folder/$name/actor" --prompts_file "$output/rows/asked/eval.jsonl" \
        --judge_function utils/demo/arithmetic.py:exact utils/demo/arithmetic.py:working \
        --do_sample --top_k 0 --num_return_sequences 4 --max_new_tokens 40 --batch_size 100 \
        --jsonl "$folder/$name/answers.jsonl" >"$folder/$name/answers.txt"
    grep -a -A 9 "^judge " "$folder/$name/answers.txt"
done
