#!/usr/bin/env bash
# Sets up the environment (once) and runs the tests in two processes.
#   bash tests/run.sh            all tests but those marked trl, vllm and nightly
#   bash tests/run.sh --fast     those of tests/unit alone, which start no process
#   bash tests/run.sh --vllm     those of vLLM, in an environment of their own (.venv-vllm, 4 GB)
#   bash tests/run.sh -k lora    other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vllm_environment() { # vLLM wants another transformers than constraints.txt names
    local venv="${VENV:-.venv-vllm}" torch
    if [ ! -e "$venv/.complete" ]; then
        torch="$(sed -n 's/^torch==//p' training_scripts/constraints.txt)"
        echo "set-up: making $venv with vLLM for CPUs"
        rm -rf "$venv"
        "${PYTHON:-python3}" -m venv "$venv"
        export PIP_DISABLE_PIP_VERSION_CHECK=1
        "$venv/bin/pip" install --quiet "torch==$torch+cpu" 2>/dev/null ||
            "$venv/bin/pip" install --quiet "torch==$torch" --index-url https://download.pytorch.org/whl/cpu
        "$venv/bin/pip" install --quiet -r requirements.txt -r tests/requirements.txt -r tests/requirements-vllm.txt
        # They come along built for another torch, break its import, and nothing here needs them.
        "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
        touch "$venv/.complete"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
}

if [ "${1:-}" = --vllm ]; then
    vllm_environment
    exec python -m pytest -n 0 -m vllm tests/vllm --durations 5 "${@:2}"
fi
# shellcheck source=training_scripts/setup_env.sh
. training_scripts/setup_env.sh tests/requirements.txt
if [ "${1:-}" = --fast ]; then
    set -- tests/unit "${@:2}"
fi
exec python -m pytest --numprocesses 2 --no-loadscope-reorder --durations 15 "$@"
