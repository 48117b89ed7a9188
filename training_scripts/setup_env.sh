#!/usr/bin/env bash
# Makes .venv in the project's folder with what requirements.txt names, in the versions that were tested (constraints.txt;
# Python 3.10 gets what it can have); a second run finds it done and returns at once.
# Source it (". training_scripts/setup_env.sh") to have the environment active, or run it to only make it.
# Arguments: more requirement files or packages (tests/requirements.txt, say). The system's Python is never touched.
#
# VENV    another folder for the environment
# PYTHON  the Python (3.10 or newer) to make it with

_half_made() { # _half_made VENV: whether a set-up that was killed has left it so; one that works there is waited for
    local pid told=
    while pid="$(cat "$1/.unfinished" 2>/dev/null)" && [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; do
        if [ -z "$told" ]; then echo "set-up: waiting for process $pid, which works on $1"; fi
        told=1
        sleep 1
    done
    # pip takes a package for installed of which half of the files are there.
    [ -e "$1/.unfinished" ] || { [ -e "$1/pyvenv.cfg" ] && [ ! -e "$1/bin/activate" ]; }
}

_make_environment() ( # _make_environment PROJECT VENV FILES...: in a shell of its own, which a Ctrl-C ends
    project="$1" venv="$2"
    shift 2
    trap 'exit 130' INT TERM
    if _half_made "$venv"; then
        if [ -e "$venv/bin/activate" ] && [ ! -e "$venv/.made_here" ]; then
            echo "error: a set-up that was killed left $venv half-made; it is not of this script's making: delete it, or set VENV" >&2
            exit 1
        fi
        echo "set-up: $venv was left half-made by a set-up that was killed: making it anew"
        rm -rf "$venv"
    fi
    wanted="$(cat "$project/requirements.txt" "$project/training_scripts/constraints.txt" "$@" | cksum) $*"
    if [ -x "$venv/bin/python" ] && grep -qxF "$wanted" "$venv/.installed" 2>/dev/null; then
        exit 0
    fi
    mkdir -p "$venv" || exit 1
    echo "$BASHPID" >"$venv/.unfinished" # until all is there, or pip has said why not
    code=0
    _install "$project" "$venv" "$@" && echo "$wanted" >>"$venv/.installed" || code=1
    rm -f "$venv/.unfinished"
    exit $code
)

_install() { # _install PROJECT VENV FILES...
    local project="$1" venv="$2" file arguments=(-r "$1/requirements.txt") tested="$1/training_scripts/constraints.txt"
    local torch_version
    local -x PIP_DISABLE_PIP_VERSION_CHECK=1
    torch_version="$(sed -n 's/^torch==//p' "$tested")"
    shift 2
    if [ ! -x "$venv/bin/python" ]; then
        echo "set-up: creating $venv"
        touch "$venv/.made_here"
        "${PYTHON:-python3}" -m venv "$venv" || return 1
    fi
    if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
        echo "note: there is no C++ compiler, without which --offload and --compile_generation do not work; all else does (apt-get install g++)"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate" || return 1
    if ! python -c 'import torch' 2>/dev/null; then
        if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidia0 ]; then
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
    if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        # The torch that is there stays, whichever it is.
        { grep -v '^torch==' "$tested" && python -W ignore -c 'import torch; print(f"torch=={torch.__version__}")'; } >"$venv/constraints.txt"
        arguments+=(-c "$venv/constraints.txt")
    fi
    for file in "$@"; do arguments+=(-r "$file"); done
    python -m pip install --quiet "${arguments[@]}" || return 1
    echo "set-up: done, $(du -sh "$venv" | cut -f1) in $venv"
}

_setup_environment() {
    local project venv python
    project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="${VENV:-$project/.venv}"
    python="${PYTHON:-python3}"

    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: Python 3.10 or newer is needed; set PYTHON to one (found: $("$python" --version 2>&1))" >&2
        return 1
    fi
    _make_environment "$project" "$venv" "$@" || return 1
    # shellcheck disable=SC1091
    . "$venv/bin/activate" || return 1

    # Operators that DeepSpeed builds at first use: built here they belong to this environment alone.
    export TORCH_EXTENSIONS_DIR="$venv/torch_extensions"
}

_setup_environment "$@" || {
    echo "set-up failed: see the messages above; it goes on where it stopped when run again" >&2
    # shellcheck disable=SC2317
    return 1 2>/dev/null || exit 1
}
