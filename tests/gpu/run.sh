#!/usr/bin/env bash
# Checks this machine's GPUs with the project, from versions to throughput, and ends with one table.
#
#   bash tests/gpu/run.sh            everything
#   bash tests/gpu/run.sh smoke      does it work: the three steps in every precision, under every launcher; a few minutes
#   bash tests/gpu/run.sh bench      how fast is it: tokens per second, MFU, memory against the estimate
#
# OUT       folder of results.md and results.json (default output/gpu_check)
# WORK      folder of logs, models and runs, about 20 GB in bench (default OUT/work)
# LIMIT     seconds for all of it: what does not fit is skipped and says so (default 3600)
# ONLY      a regular expression: the stages whose whole name it matches
# TOGETHER  stages of smoke that run side by side (default: by the cores)
# TINY=1    toy sizes, on a CPU too: does the check itself work
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
arguments=("$@")
set -- # what is sourced must not take them for its own
if ! command -v deepspeed >/dev/null; then # no environment is active that has the project's packages
    # shellcheck source=training_scripts/setup_env.sh
    . "$project/training_scripts/setup_env.sh"
fi
exec python "$project/tests/gpu/check.py" "${arguments[@]+"${arguments[@]}"}"
