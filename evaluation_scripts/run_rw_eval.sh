#!/usr/bin/env bash
# Scores of a reward model for pairs of answers.
#   bash run_rw_eval.sh REWARD_MODEL [flags of rw_eval.py, e.g. --data_path pairs.jsonl]
set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: bash $0 REWARD_MODEL [flags of rw_eval.py]" >&2
    exit 2
fi
reward_model=$1
shift

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" "$here/rw_eval.py" --model_name_or_path "$reward_model" "$@"
