#!/usr/bin/env bash
# Sets up the environment (once) and runs the tests in two processes.
#   bash tests/run.sh            all tests
#   bash tests/run.sh --fast     those of tests/unit alone, which start no process
#   bash tests/run.sh -k lora    other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=training_scripts/setup_env.sh
. training_scripts/setup_env.sh tests/requirements.txt
if [ "${1:-}" = --fast ]; then
    set -- tests/unit "${@:2}"
fi
exec python -m pytest --numprocesses 2 --no-loadscope-reorder --durations 15 "$@"
