#!/usr/bin/env bash
# Sets up the environment (once) and runs the tests; arguments go to pytest, as in: bash tests/run.sh -k lora
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=training_scripts/setup_env.sh
. training_scripts/setup_env.sh tests/requirements.txt
exec python -m pytest "$@"
