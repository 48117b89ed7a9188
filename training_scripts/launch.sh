#!/usr/bin/env bash
# Sourced by the scripts here: how a step is started, on whatever the machine has.
#
# launch STEP OUTPUT FLAGS...   one step under the deepspeed launcher; its whole output also in OUTPUT/training.log
# recipe STEP MACHINE ARGUMENTS... -- FLAGS...   the same with a recipe's flags and its user's positional arguments
#
# RANKS        processes per node (default: the GPUs, or 2 on a CPU with two or more cores; of a single_gpu recipe 1)
# CUDA_VISIBLE_DEVICES   the GPUs to take, by number, as in 2,3 (default: all); empty: the CPU
# MASTER_PORT  where they meet (default 29517, or on a single node the first free port above it)
# HOSTFILE     of a multi_node recipe: a line "HOST slots=GPUS" per node, the first node first (default /job/hostfile)
# LAUNCHER_ARGS  more arguments of the deepspeed launcher, as in "--no_ssh --node_rank 0 --master_addr 10.0.0.1"
# DRY_RUN=1    print the command, run nothing

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
steps=("" step1_supervised_finetuning step2_reward_model_finetuning step3_rlhf_finetuning)

count_ranks() { # 8 for a command that is only printed
    [ -n "${DRY_RUN:-}" ] && echo 8 && return
    python3 -c 'import os, torch; print(torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0))))'
}

activate_environment() { # the project's own, unless there is one with deepspeed already
    if [ -z "${DRY_RUN:-}" ] && ! command -v deepspeed >/dev/null; then
        set -- # what is sourced must not take them for its own
        # shellcheck source=training_scripts/setup_env.sh
        . "$project/training_scripts/setup_env.sh"
    fi
}

chosen_gpus() { # chosen_gpus [COUNT]: of those that CUDA_VISIBLE_DEVICES names all, or the first ones
    local gpus count="${1:-}"
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    if [[ ! "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
        echo "error: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: the deepspeed launcher takes GPUs by number, as in 2,3" >&2
        return 1
    elif [ "${count:=${#gpus[@]}}" -gt ${#gpus[@]} ]; then
        echo "error: $count ranks, and CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#gpus[@]} GPU(s); each rank needs one" >&2
        return 1
    fi
    (IFS=, && echo "${gpus[*]:0:count}")
}

sees_gpus() {
    [ -n "${DRY_RUN:-}" ] || python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

free_port() { # the default, or where another program has it the next that is free
    local port=29517
    if [ -z "${DRY_RUN:-}" ]; then
        port="$(python3 "$project/utils/process/free_port.py" "$port")" || return
        if [ "$port" != 29517 ]; then echo "port 29517 is taken: the ranks meet at $port" >&2; fi
    fi
    echo "$port"
}

launch() { # launch STEP OUTPUT FLAGS...
    local step="$1" output="$2" log=training.log command more port="${MASTER_PORT:-}" where=("${RANKS:-${ranks:-}}") start=(deepspeed)
    shift 2
    activate_environment || return
    read -rd '' -a more <<<"${LAUNCHER_ARGS:-}" || true
    if [ -n "${hostfile:-}" ]; then
        if [ -z "${DRY_RUN:-}" ] && [ ! -s "$hostfile" ]; then
            echo "error: $hostfile is missing or empty: set HOSTFILE to a file with a line 'HOST slots=GPUS' per node" >&2
            exit 1
        fi
        where=(--hostfile "$hostfile") port="${port:-29517}"
        # What ssh starts on a node has the interpreter of this one, but not the programs beside it (ninja, say).
        if [ -n "${VIRTUAL_ENV:-}" ]; then where+=(--venv_script "$VIRTUAL_ENV/bin/activate"); fi
    elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && sees_gpus; then
        # DeepSpeed's --num_gpus would take the first GPUs of the machine, whoever works on them.
        where=(--include "localhost:$(chosen_gpus "${where[0]}")") || exit 1
        start=(env -u CUDA_VISIBLE_DEVICES deepspeed)
    else
        where=(--num_gpus "${where[0]:-$(count_ranks)}")
    fi
    [[ " ${more[*]-} " =~ " --node_rank " ]] && port="${port:-29517}" # the same on all nodes
    [ -n "$port" ] || port="$(free_port)" || exit 1
    # The launcher's own words are about itself; errors of it stay, and all that the ranks say.
    command=("${start[@]}" "${where[@]}" --master_port "$port" --log_level error "${more[@]}"
        "$project/training/${steps[step]}/main.py" --output_dir "$output" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    # Nodes that are started one by one may share the folder. And one that has nothing to say is not one that failed.
    [[ " ${more[*]-} " =~ " --node_rank "([1-9][0-9]*)" " ]] && log="training.node${BASH_REMATCH[1]}.log"
    mkdir -p "$output"
    # A Ctrl-C is for the ranks, which save and say so; the script ends with them, and who shows it last of all.
    trap 'exit 130' INT
    (trap '' INT && exec "${command[@]}") 2>&1 |
        {
            trap '' INT
            grep --line-buffered -v 'Setting accelerator to CPU. If you have GPU' || [ $? = 1 ] # said before any level is set
        } |
        (trap '' INT && exec tee "$output/$log")
}

_recipe_usage() { # the comment at the head of the recipe
    sed -n '2,3s/^# //p' "$0" >&2
    echo "The flags of the recipe may be followed by your own, which win: FLAGS... as in --num_train_epochs 1" >&2
    exit 2
}

recipe() { # recipe STEP MACHINE ARGUMENTS... -- FLAGS...
    set -euo pipefail
    local step="$1" machine="$2" arguments=() given=() output flag
    shift 2
    while [ "$1" != -- ]; do
        # Positional arguments come first; from the first flag on all is the user's own.
        if [ ${#given[@]} -gt 0 ] || [[ "$1" == -* ]]; then given+=("$1"); else arguments+=("$1"); fi
        shift
    done
    shift
    if [[ " ${given[*]-} " =~ " --help "|" -h " ]]; then _recipe_usage; fi
    if [ "$step" = 3 ]; then
        [ ${#arguments[@]} -ge 2 ] && [ ${#arguments[@]} -le 5 ] || _recipe_usage
        set -- --actor_model_name_or_path "${arguments[0]}" --critic_model_name_or_path "${arguments[1]}" "$@"
        for flag in 2:--actor_zero_stage 3:--critic_zero_stage; do
            if [ -n "${arguments[${flag%%:*}]-}" ]; then set -- "$@" "${flag#*:}" "${arguments[${flag%%:*}]}"; fi
        done
        output="${arguments[4]:-./output/step$step}"
    else
        [ ${#arguments[@]} -le 2 ] || _recipe_usage
        if [ -n "${arguments[1]-}" ]; then set -- "$@" --zero_stage "${arguments[1]}"; fi
        output="${arguments[0]:-./output/step$step}"
    fi
    case "$machine" in
    single_gpu) ranks=1 ;;
    multi_node)
        hostfile="${HOSTFILE:-/job/hostfile}"
        ;;
    esac
    launch "$step" "$output" "$@" ${given[@]+"${given[@]}"}
}
