#!/usr/bin/env bash
# Sourced by the scripts here: how a step is started, on whatever the machine has. Expects project, output and started to be set.
#
# RANKS        processes to train with (default: the GPUs, or 2 on a CPU with two or more cores)
# MASTER_PORT  where they meet (default 29517)

# shellcheck disable=SC2154  # set by the script that sources this file
ranks="${RANKS:-$(python -c 'import os, torch; print(torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0))))')}"

step() { # step NAME SCRIPT FLAGS...: one step under the deepspeed launcher, its whole output in $output/NAME/training.log too
    local name="$1" script="$2"
    shift 2
    mkdir -p "$output/$name"
    echo
    echo "=== $name ($((SECONDS - started)) s so far) ==="
    deepspeed --num_gpus "$ranks" --master_port "${MASTER_PORT:-29517}" "$project/training/$script/main.py" \
        --output_dir "$output/$name" "$@" 2>&1 | grep --line-buffered -v -e '\[INFO\]' -e '\[WARNING\]' |
        tee "$output/$name/training.log"
}
