#!/usr/bin/env bash
# The GPU check on a machine that reaches no package registry. prepare.sh puts this file and wheels into .gpu/; then, in the
# project's folder: bash .gpu/check.sh [smoke|bench]. Everything is made in WORK, nothing is installed into the machine's Python.
#
# BASE_PYTHON  the Python that has torch (default: python3)
# OUT          folder of results.md, results.json and logs.tgz (default /tmp/gpu_check)
# WORK         folder of the environment, models, runs (default /tmp/gpu_check_work)
# LIMIT, ONLY, TOGETHER, TINY   as of tests/gpu/run.sh; LIMIT counts the set-up too
set -uo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$project" || exit 1
export OUT="${OUT:-/tmp/gpu_check}" WORK="${WORK:-/tmp/gpu_check_work}"
export VENV="$WORK/venv" # where the project's own scripts look for an environment
mkdir -p "$OUT" "$WORK"
base="${BASE_PYTHON:-$(command -v python3)}"
if [ ! -f "$VENV/.installed" ]; then # an environment over the machine's packages, in which those of the wheels come first
    "$base" -m venv --without-pip "$VENV" || exit 1
    site="$("$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])')"
    "$base" -c 'import site; print("\n".join(site.getsitepackages()))' >"$site/of_the_machine.pth"
    "$base" -m pip --python "$VENV/bin/python" install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --ignore-installed .gpu/wheels/*.whl || exit 1
    # As training_scripts/setup_env.sh notes what it has installed: it will find it all done.
    echo "$(cat requirements.txt training_scripts/constraints.txt | cksum) " >"$VENV/.installed"
fi
# shellcheck disable=SC1091
. "$VENV/bin/activate"
PATH="$PATH:$(dirname "$base")" # ninja and torchrun of the machine
export PATH TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
echo "the environment is there after $SECONDS s"
[ -z "${LIMIT:-}" ] || export LIMIT=$((LIMIT - SECONDS))
bash tests/gpu/run.sh "$@"
code=$?
tar -C "$WORK" -czf "$OUT/logs.tgz" logs
echo "all of it took $SECONDS s"
exit $code
