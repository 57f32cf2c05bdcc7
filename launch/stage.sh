#!/usr/bin/env bash
# Copies this node's share of a checkpoint to a disk of its own.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.bash
source "$HERE/common.bash"
COPIES=4 # at a time

usage() {
    cat <<'TEXT'
launch/stage.sh [--dry-run] SOURCE DIR

Copies this node's share of the files below SOURCE to DIR: of the weights (.safetensors, .pth, .pt,
.bin, .distcp, .gguf) in the order of their names every N-th, where N nodes do the same; of the
small files all. Times are kept, since they tell whether a source is the one that a job began
with. A file that is there already, of the same size and time, is not copied again.
Run it by srun, with one task per node.
  --dry-run  only print the names of the files
TEXT
}

# Of the names on standard input those that this node takes.
share() {
    awk -v node="${SLURM_NODEID:-0}" -v nodes="${SLURM_STEP_NUM_NODES:-1}" \
        '!/\.(safetensors|pth|pt|bin|distcp|gguf)$/ || n++ % nodes == node'
}

copy() { # FILE: under a name of its own until it is whole
    local from=$SOURCE/$1 to=$DIR/$1
    [[ "$(stat -Lc '%s %y' "$from")" != "$(stat -c '%s %y' "$to" 2>/dev/null)" ]] || return 0
    mkdir -p "$(dirname "$to")"
    cp -pL -- "$from" "$to.part"
    mv -- "$to.part" "$to"
}

dry_run=
case ${1-} in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1; shift ;;
esac
(($# == 2)) || refuse "launch/stage.sh: give a directory and where to copy it; --help says more"
SOURCE=$1 DIR=$2
[[ -d $SOURCE ]] || refuse "\`$SOURCE\` is no directory"

files=$(cd "$SOURCE" && find -L . -type f -printf '%P\n' | LC_ALL=C sort | share)
if [[ $dry_run ]]; then
    printf '%s\n' "$files"
    exit 0
fi
umask 077
mkdir -p "$DIR"
export SOURCE DIR
export -f copy
# shellcheck disable=SC2016  # expanded by each of the shells
xargs -d '\n' -r -P "$COPIES" -I FILE bash -euc 'copy "$1"' copy FILE <<<"$files"
