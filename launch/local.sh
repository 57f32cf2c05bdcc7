#!/usr/bin/env bash
# Starts reshard on this machine.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.bash
source "$HERE/common.bash"

usage() {
    cat <<'TEXT'
launch/local.sh [--dry-run] [NPROC] [ARGS ...]

Starts reshard with ARGS on NPROC ranks of this machine.
  NPROC      default: one per GPU; without GPUs one per core, at most 8
  ARGS       default: --src meta8 --dst tp4 (without paths: the demo)
  --dry-run  only print the command
TEXT
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
    ranks=$(default_ranks)
fi
exec "$HERE/multinode.sh" ${dry_run:+--dry-run} --nnodes 1 --nproc "$ranks" -- "$@"
