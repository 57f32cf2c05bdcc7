#!/usr/bin/env bash
# Starts reshard on this machine.
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/local.sh [--dry-run] [NPROC] [ARGS ...]

Starts reshard with ARGS on NPROC ranks of this machine.
  NPROC      default: one per GPU; without GPUs one per core, at most 8
  ARGS       default: --src meta8 --dst tp4 (without paths: the demo)
  --dry-run  only print the command
TEXT
}

gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

cores() {
    nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
}

dry_run=
case ${1-} in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1; shift ;;
esac

if [[ ${1-} =~ ^[1-9][0-9]*$ ]]; then
    ranks=$1
    shift
else
    ranks=$(gpus)
    if ((ranks == 0)); then
        ranks=$(cores)
        ranks=$((ranks < 8 ? ranks : 8))
    fi
fi
(($#)) || set -- --src meta8 --dst tp4

command=("$(dirname "${BASH_SOURCE[0]}")/torchrun" --nproc "$ranks" -m reshard "$@")
if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
