#!/usr/bin/env bash
# Makes .venv in the project's folder with what requirements.txt names, in the versions that were tested (constraints.txt;
# Python 3.10 gets what it can have); a second run finds it done and returns at once.
# Source it (". training_scripts/setup_env.sh") to have the environment active, or run it to only make it.
# Arguments: more requirement files or packages (tests/requirements.txt, say). The system's Python is never touched.
#
# VENV    another folder for the environment
# PYTHON  the Python (3.10 or newer) to make it with

_setup_environment() {
    local project venv python torch_version stamp wanted tested
    project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${VENV:-$project/.venv}"
    python="${PYTHON:-python3}"
    tested="$project/training_scripts/constraints.txt"
    torch_version="$(sed -n 's/^torch==//p' "$tested")"

    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: Python 3.10 or newer is needed; set PYTHON to one (found: $("$python" --version 2>&1))" >&2
        return 1
    fi
    if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
        echo "error: a C++ compiler is needed, for DeepSpeed's operators (Debian, Ubuntu: apt-get install g++)" >&2
        return 1
    fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "set-up: creating $venv"
        "$python" -m venv "$venv" || return 1
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate" || return 1

    # Operators that DeepSpeed builds at first use: built here they belong to this environment alone.
    export TORCH_EXTENSIONS_DIR="$venv/torch_extensions"

    wanted="$(cat "$project/requirements.txt" "$tested" "$@" | cksum) $*"
    stamp="$venv/.installed"
    touch "$stamp"
    if grep -qxF "$wanted" "$stamp"; then
        return 0
    fi

    if ! python -c 'import torch' 2>/dev/null; then
        if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
            # The default build for Linux carries several GB of CUDA libraries that are of no use here. A CPU build at hand
            # (a wheel folder that pip is set up with) is taken first, then PyTorch's own index of CPU builds.
            echo "set-up: installing torch $torch_version, CPU build"
            python -m pip install --quiet "torch==$torch_version+cpu" 2>/dev/null ||
                python -m pip install --quiet "torch==$torch_version" --index-url https://download.pytorch.org/whl/cpu ||
                return 1
        else
            echo "set-up: installing torch $torch_version"
            python -m pip install --quiet "torch==$torch_version" || return 1
        fi
    fi
    echo "set-up: installing $(basename "$project")'s requirements"
    local file arguments=(-r "$project/requirements.txt")
    if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        # The torch that is there stays, whichever it is.
        { grep -v '^torch==' "$tested" && python -c 'import torch; print(f"torch=={torch.__version__}")'; } >"$venv/constraints.txt"
        arguments+=(-c "$venv/constraints.txt")
    fi
    for file in "$@"; do arguments+=(-r "$file"); done
    python -m pip install --quiet "${arguments[@]}" || return 1
    echo "$wanted" >>"$stamp"
    echo "set-up: done, $(du -sh "$venv" | cut -f1) in $venv"
}

_setup_environment "$@" || {
    echo "set-up failed: see the messages above; it goes on where it stopped when run again" >&2
    # shellcheck disable=SC2317
    return 1 2>/dev/null || exit 1
}
