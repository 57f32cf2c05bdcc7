#!/usr/bin/env bash
# TorchTitan's own reading of a checkpoint, in a virtual environment of its own:
#     tests/real/titan.sh [STEP_DIR HF_DIR]
# Without a pair it only makes the environment, where tests/test_titan_adapter.py looks for it.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${TITAN_VENV:-$ROOT/.venv-titan}

# What importing torchtitan's Llama 3 and its checkpoint manager takes; all that it declares is more.
WITH_DEPENDENCIES=(numpy safetensors torch)
ALONE=(docstring_parser==0.18.0 spmd_types==0.2.3 torchtitan==0.3.0 triton==3.9.0 tyro==1.0.17)
MADE=$VENV/.made-from

if ! printf '%s\n' "${ALONE[@]}" | cmp --silent - "$MADE"; then
    echo "installing TorchTitan into $VENV" >&2
    read -ra FLAGS <<<"${PIP_FLAGS:-}"
    INSTALL=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check
        -c "$ROOT/constraints.txt" ${FLAGS[@]+"${FLAGS[@]}"})
    "${PYTHON:-python3}" -m venv "$VENV"
    "${INSTALL[@]}" "${WITH_DEPENDENCIES[@]}"
    "${INSTALL[@]}" --no-deps "${ALONE[@]}"
    printf '%s\n' "${ALONE[@]}" >"$MADE"
fi

case $# in
0) ;;
2) exec "$VENV/bin/python" "$ROOT/tests/real/titan_adapter.py" "$@" ;;
*) echo "usage: $0 [STEP_DIR HF_DIR]" >&2 && exit 2 ;;
esac
