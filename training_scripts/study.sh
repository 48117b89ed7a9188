#!/usr/bin/env bash
# Does step 3 learn, whatever the seed and the way? The quickstart with several seeds, then step 3 of each in other ways
# from the same SFT and reward models, and one table of it all.
#
#   bash training_scripts/study.sh [OUTPUT]         default: output/study
#
# SEEDS      of the runs (default "1234 1 2 3 4")
# VARIANTS   other ways, by the names below (default: all but right, which rewards something else)
# VARIANT_SEEDS   which seeds they run with (default: all of SEEDS)
# RANKS, ANSWERS   as in quickstart.sh (ANSWERS: 8)
#
# A run that is done is not run again (OUTPUT/RUN/summary.json says so).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
output="$(realpath -m "${1:-$here/../output/study}")"
seeds="${SEEDS:-1234 1 2 3 4}"

flags() { # flags VARIANT: what it changes in the quickstart's step 3
    local lora="--actor_lora_dim 32 --actor_lora_scaling 64 --actor_lora_learning_rate 1e-3 --only_optimize_lora"
    local group="--num_generations_per_prompt 4 --max_train_samples 1280 --num_warmup_steps 5"
    case "$1" in
    ppo_epochs_4) echo "--ppo_epochs 4" ;;
    lora) echo "$lora" ;;
    zero3_2_ranks) echo "--actor_zero_stage 3 --critic_zero_stage 3 --per_device_generation_batch_size 32 --per_device_training_batch_size 16" ;;
    rloo) echo "--advantage_estimator rloo $group" ;;
    grpo) echo "--advantage_estimator grpo --kl_ctl 0.2 $group" ;;
    dr_grpo) echo "--advantage_estimator grpo --no-scale_group_rewards $group" ;;
    right) # what is right is rewarded, by the world's own judge, and nothing else; no reward model
        echo "--advantage_estimator grpo --no-scale_group_rewards --drop_groups_without_spread --num_generations_per_prompt 8" \
            "--reward_function utils/demo/judge.py:right --reward_model_weight 0 --no-normalize_reward" \
            "--missing_eos_penalty 0.5 --generation_batches 4" \
            "--max_train_samples 1920 --num_warmup_steps 5 --ppo_epochs 1 --actor_learning_rate 2e-4 --kl_ctl 0.02"
        ;;
    *) echo "error: no variant $1" >&2 && return 1 ;;
    esac
}

run() { # run NAME SEED [VARIANT]
    if [ -f "$output/$1/summary.json" ]; then return; fi
    echo "=== $1 ($SECONDS s so far) ==="
    mkdir -p "$output/$1"
    local change="" from="" ranks="${RANKS:-}"
    if [ -n "${3:-}" ]; then change="$(flags "$3")" from="$output/seed_$2"; fi
    if [ "${3:-}" = zero3_2_ranks ]; then ranks=2; fi
    SEED="$2" FROM="$from" PPO_FLAGS="$change" RANKS="$ranks" ANSWERS="${ANSWERS:-8}" \
        bash "$here/quickstart.sh" "$output/$1" >"$output/$1/log" 2>&1 || {
        tail -n 20 "$output/$1/log" >&2
        echo "error: $1 failed; its output is in $output/$1/log" >&2
        exit 1
    }
}

for seed in $seeds; do run "seed_$seed" "$seed"; done
for variant in ${VARIANTS-ppo_epochs_4 lora zero3_2_ranks rloo grpo dr_grpo}; do
    for seed in ${VARIANT_SEEDS:-$seeds}; do run "${variant}_$seed" "$seed" "$variant"; done
done
# shellcheck source=training_scripts/launch.sh
. "$here/launch.sh"
activate_environment
python "$here/../evaluation_scripts/study_report.py" "$output"
