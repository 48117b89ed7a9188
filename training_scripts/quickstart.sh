#!/usr/bin/env bash
# The whole pipeline on a small world with a ground truth, in minutes on a laptop: a model of 1.5 million parameters made from
# scratch, SFT, reward model, PPO, and a judge that knows right from wrong. Nothing is downloaded but Python packages.
#
#   bash training_scripts/quickstart.sh [OUTPUT]         default: output/quickstart
#
# RANKS  processes to train with (default: the GPUs, or 2 on a CPU with two or more cores)
# SEED   of everything (default 1234)
# SFT_ROWS, PAIRS, PROMPTS   rows of the three steps (default 8000, 4000, 5120): fewer for a quick look
# ANSWERS   of each model to each held-out prompt, read by the judge (default 4)
# FROM   output folder of an earlier quickstart: its models of step 1 and 2 are taken, only step 3 runs
# PPO_FLAGS   more flags of step 3, in one string, as in "--ppo_epochs 4"; they win
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$(realpath -m "${1:-$project/output/quickstart}")"
seed="${SEED:-1234}"
started=$SECONDS
set -- # what is sourced below must not take them for its own

# shellcheck source=training_scripts/setup_env.sh
. "$project/training_scripts/setup_env.sh"
# shellcheck source=training_scripts/launch.sh
. "$project/training_scripts/launch.sh"
ranks="${RANKS:-$(count_ranks)}"
rows=$((ranks > 16 ? 1 : 16 / ranks)) # of a forward pass on each rank
answers=$((2 * rows))
mkdir -p "$output"

step() { # step NUMBER FLAGS...
    echo
    echo "=== step $1 ($((SECONDS - started)) s so far) ==="
    launch "$1" "$output/step$1" --overwrite_output_dir "${@:2}"
}

common=(--data_path local/demo --data_split "4,3,3" --data_output_path "$output/data" --dtype fp32 --seed "$seed" --console brief)

read -rd '' -a ppo_flags <<<"${PPO_FLAGS:-}" || true

if [ -n "${FROM:-}" ]; then
    for folder in base step1 step2; do ln -sfn "$(realpath "$FROM/$folder")" "$output/$folder"; done
else
    echo "=== base: a model from scratch ==="
    (cd "$project" && TQDM_DISABLE=1 python -m utils.demo.tiny_model --output "$output/base" --seed "$seed")

    step 1 "${common[@]}" \
        --model_name_or_path "$output/base" --max_seq_len 48 --per_device_train_batch_size "$rows" \
        --max_train_samples "${SFT_ROWS:-8000}" --learning_rate 2e-3 --num_train_epochs 2 --num_warmup_steps 20 \
        --no-group_by_length --log_interval 100

    step 2 "${common[@]}" \
        --model_name_or_path "$output/step1" --max_seq_len 48 --per_device_train_batch_size "$rows" \
        --learning_rate 5e-4 --num_train_epochs 1 --num_warmup_steps 10 --max_train_samples "${PAIRS:-4000}" --log_interval 50
fi

step 3 "${common[@]}" \
    --actor_model_name_or_path "$output/step1" --critic_model_name_or_path "$output/step2" \
    --max_prompt_seq_len 24 --max_answer_seq_len 40 --per_device_generation_batch_size $((2 * answers)) \
    --per_device_training_batch_size "$answers" --ppo_epochs 2 --actor_learning_rate 1e-4 --critic_learning_rate 3e-4 \
    --num_warmup_steps 5 --kl_ctl 0.05 --normalize_reward --missing_eos_penalty 0 --enable_ema --enable_hybrid_engine \
    --max_train_samples "${PROMPTS:-5120}" --log_interval 4 --sample_interval 40 ${ppo_flags[@]+"${ppo_flags[@]}"}

echo
echo "=== report ==="
python "$project/evaluation_scripts/demo_report.py" --output_dir "$output" --answers_per_prompt "${ANSWERS:-4}" --seconds $((SECONDS - started))
echo
echo "all of it took $((SECONDS - started)) s. Talk to the result:"
echo "    source ${VENV:-$project/.venv}/bin/activate"
echo "    python $project/inference/chatbot.py --path $output/step3/actor"
