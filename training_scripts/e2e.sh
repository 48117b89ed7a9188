#!/usr/bin/env bash
# The three steps one after another; a step that is done is not run again (OUTPUT/STEP/done says so).
#
#   bash training_scripts/e2e.sh OUTPUT [FLAGS...]      FLAGS go to all three steps, as in --data_path my/pairs --dtype bf16
#
# ACTOR_MODEL, REWARD_MODEL   what steps 1 and 2 start from (default facebook/opt-1.3b and facebook/opt-350m, as published)
# STAGE                       ZeRO stage of every model (default 2)
# SFT_FLAGS, REWARD_FLAGS, PPO_FLAGS   more flags of one step, in one string
# RANKS, HOSTFILE, MASTER_PORT, LAUNCHER_ARGS, DRY_RUN   as launch.sh says
if [ $# -lt 1 ] || [[ "$1" == -* ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
output="$1"
shift
set -euo pipefail
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
hostfile="${HOSTFILE:-}"
stage="${STAGE:-2}"

step() { # step NUMBER FOLDER FLAGS...
    if [ -f "$output/$2/done" ]; then
        echo "=== step $1: $output/$2 is done, not run again ===" >&2
        return
    fi
    echo "=== step $1 ($SECONDS s so far) ===" >&2
    # Checkpoints there are not removed for who forgets --resume auto: the step refuses, and says so.
    local again=(--overwrite_output_dir)
    [ -e "$output/$2/checkpoints/latest" ] && again=()
    launch "$1" "$output/$2" "${again[@]}" "${@:3}"
    if [ -z "${DRY_RUN:-}" ]; then touch "$output/$2/done"; fi
}

read -rd '' -a sft <<<"${SFT_FLAGS:-}" || true
read -rd '' -a reward <<<"${REWARD_FLAGS:-}" || true
read -rd '' -a ppo <<<"${PPO_FLAGS:-}" || true
step 1 actor --console brief --model_name_or_path "${ACTOR_MODEL:-facebook/opt-1.3b}" --zero_stage "$stage" "$@" "${sft[@]}"
step 2 reward --console brief --model_name_or_path "${REWARD_MODEL:-facebook/opt-350m}" --zero_stage "$stage" "$@" "${reward[@]}"
step 3 rlhf --console brief --actor_model_name_or_path "$output/actor" --critic_model_name_or_path "$output/reward" \
    --actor_zero_stage "$stage" --critic_zero_stage "$stage" --enable_hybrid_engine "$@" "${ppo[@]}"
