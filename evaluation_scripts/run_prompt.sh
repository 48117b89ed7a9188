#!/usr/bin/env bash
# Answers of a baseline and of a finetuned model to the same prompts, one under the other.
#   bash run_prompt.sh BASELINE FINETUNED [flags of prompt_eval.py, e.g. --do_sample --output answers.html]
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: bash $0 BASELINE FINETUNED [flags of prompt_eval.py]" >&2
    exit 2
fi
baseline=$1
finetuned=$2
shift 2

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" "$here/prompt_eval.py" \
    --model_name_or_path_baseline "$baseline" --model_name_or_path_finetune "$finetuned" "$@"
