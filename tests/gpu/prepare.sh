#!/usr/bin/env bash
# Prepares the GPU check for a machine that reaches no package registry: fills .gpu/ (which git ignores) in the project's
# folder with wheels of what such a machine lacks. Run it where registries are, a GPU is not needed:
#
#   bash tests/gpu/prepare.sh          about 25 MB
#
# Then copy the project with .gpu/ to the machine and run there: bash .gpu/check.sh [smoke|bench]
#
# TARGET_PYTHON  version of Python over there (default 3.12)
# TARGET_CUDA    of its torch, as in 13.0 (default): the library of bitsandbytes that is kept
# PACKAGES       what it lacks beside deepspeed and bitsandbytes (default: what a plain image with torch and transformers lacks)
set -euo pipefail
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
kit="$project/.gpu"
set --
# shellcheck source=training_scripts/setup_env.sh
. "$project/training_scripts/setup_env.sh" # deepspeed's set-up imports torch
read -ra packages <<<"${PACKAGES:-transformers datasets hjson dill multiprocess pydantic pydantic_core annotated_types typing_extensions typing_inspection}"
rm -rf "$kit"
mkdir -p "$kit/wheels"

tested() { # tested NAME: as in "numpy==2.4.6", in the version of constraints.txt
    grep -ixE "${1//[_-]/[_-]}==.*" "$project/training_scripts/constraints.txt" || echo "$1"
}

fetch() { # fetch FOLDER PACKAGE: a wheel for the other machine
    local platform platforms=()
    for platform in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${platform}_x86_64"); done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
    python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version "${TARGET_PYTHON:-3.12}" "${platforms[@]}" --dest "$1" "$2"
}

for package in "${packages[@]}"; do
    fetch "$kit/wheels" "$(tested "$package")"
done
# DeepSpeed comes as source alone. Without operators, which it compiles where they are used, it is plain Python.
DS_BUILD_OPS=0 python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$kit/wheels" "$(tested deepspeed)"

scratch="$(mktemp -d)"
trap 'rm -r "$scratch"' EXIT
fetch "$scratch" bitsandbytes
python - "$scratch"/bitsandbytes-*.whl "$kit/wheels" "${TARGET_CUDA:-13.0}" <<'PYTHON'
"""Of the libraries for every CUDA keep one, and the CPU's."""
import sys
import zipfile
from pathlib import Path

source, target, cuda = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].replace(".", "")
kept = f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so"
with zipfile.ZipFile(source) as old, zipfile.ZipFile(target / source.name, "w", zipfile.ZIP_DEFLATED) as new:
    names = old.namelist()
    if not any(name.endswith(kept[0]) for name in names):
        sys.exit(f"error: {source.name} has no library for CUDA {sys.argv[3]}")
    left_out = {name for name in names if name.endswith(".so") and not name.endswith(kept)}
    for name in set(names) - left_out:
        data = old.read(name)
        if name.endswith("/RECORD"):
            lines = data.decode().splitlines(keepends=True)
            data = "".join(line for line in lines if line.split(",")[0] not in left_out).encode()
        new.writestr(name, data)
PYTHON
cp "$project/tests/gpu/offline.sh" "$kit/check.sh"
echo "$(find "$kit/wheels" -name '*.whl' | wc -l) wheels, $(du -sm "$kit" | cut -f1) MB in $kit"
