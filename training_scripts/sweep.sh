#!/usr/bin/env bash
# A few steps of training under every combination of ZeRO stage, offload and LoRA (step 3: and the hybrid engine), then one table.
#
#   bash training_scripts/sweep.sh 1 MODEL OUTPUT [FLAGS...]            2 and dpo likewise
#   bash training_scripts/sweep.sh 3 ACTOR CRITIC OUTPUT [FLAGS...]
#
# FLAGS come last and hold for all of them, as in --data_path my/pairs --per_device_train_batch_size 4.
# A combination that is done is not run again; one that fails is told in the table and in its training.log. Models are not kept.
#
# STAGES   "0 1 2 3"      OFFLOAD  "off on"      LORA  "0 64" (ranks, 0 for none)      HYBRID  "off on" (step 3)
# STEPS    steps of training each (default 8)
# RANKS, MASTER_PORT, LAUNCHER_ARGS, DRY_RUN   as launch.sh says
number="${1:-}"
models=1
[ "$number" = 3 ] && models=2
if [[ ! "$number" =~ ^([123]|dpo)$ ]] || [ $# -lt $((2 + models)) ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
set -euo pipefail
paths=("${@:2:models}")
output="${*:2+models:1}"
flags=("${@:3+models}")
set --
# shellcheck source=training_scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
activate_environment
ranks="${RANKS:-$(count_ranks)}"
steps_of_each="${STEPS:-8}"

one() { # one NAME FLAGS...
    local folder="$output/$1"
    if [ -z "${DRY_RUN:-}" ] && [ -f "$folder/done" ]; then return; fi
    echo "=== $1 ===" >&2
    if launch "$number" "$folder" --overwrite_output_dir "${@:2}" --max_eval_samples 8 "${flags[@]}" >&3 && [ -z "${DRY_RUN:-}" ]; then
        find "$folder" -name "*.safetensors" -delete # speed is what was asked
        touch "$folder/done"
    fi
}

exec 3>&1
[ -n "${DRY_RUN:-}" ] || exec 3>/dev/null # the table is what counts; training.log has the rest
set +e
for stage in ${STAGES:-0 1 2 3}; do
    for offload in ${OFFLOAD:-off on}; do
        [ "$offload" = on ] && [ "$stage" = 0 ] && continue # there is nothing ZeRO manages to offload
        for lora in ${LORA:-0 64}; do
            name="zero${stage}_offload-${offload}_lora-${lora}"
            common=()
            [ "$offload" = on ] && common+=(--offload)
            if [ "$number" = 3 ]; then
                common+=(--actor_model_name_or_path "${paths[0]}" --critic_model_name_or_path "${paths[1]}")
                common+=(--actor_zero_stage "$stage" --critic_zero_stage "$stage" --enable_test_mode --test_stop_step "$steps_of_each")
                common+=(--actor_lora_dim "$lora" --critic_lora_dim "$lora")
                for hybrid in ${HYBRID:-off on}; do
                    more=()
                    [ "$hybrid" = on ] && more=(--enable_hybrid_engine)
                    one "${name}_hybrid-${hybrid}" "${common[@]}" "${more[@]}"
                done
            else
                common+=(--model_name_or_path "${paths[0]}" --zero_stage "$stage" --lora_dim "$lora" --log_interval 1)
                common+=(--max_train_samples "$((steps_of_each * ranks * 4))" --per_device_train_batch_size 4)
                one "$name" "${common[@]}"
            fi
        done
    done
done
[ -n "${DRY_RUN:-}" ] || python "$project/evaluation_scripts/sweep_report.py" "$output"
