#!/usr/bin/env bash
# The batch files of slurm/ under a real Slurm of two nodes, which runs on this machine for as long
# as the tests take: in namespaces of its own (processes, network, mounts, host name), so that
# nothing listens outside, and nothing outlives it.
#
# Needs root and Debian's packages of Slurm and munge, which are installed where they are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH=$PATH:/usr/sbin:/sbin

skip() {
    echo "slurm-test: skipped: $*"
    exit 0
}

# Installs packages whose services must not start; the file is Debian's way to say so.
install() {
    local policy=/usr/sbin/policy-rc.d code=0
    echo "slurm-test: installing $*" >&2
    [[ ! -e $policy ]] || policy=
    [[ -z $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"; }
    {
        DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet update &&
            DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet --yes \
                --no-install-recommends install "$@"
    } </dev/null >/dev/null 2>&1 || code=$?
    [[ -z $policy ]] || rm -f "$policy"
    return "$code"
}

declare -A COMMANDS=([munge]=munged [slurmctld]=slurmctld [slurmd]=slurmd [slurm-client]=sbatch)
missing=()
for package in "${!COMMANDS[@]}"; do
    command -v "${COMMANDS[$package]}" >/dev/null || missing+=("$package")
done

[[ $(uname -s) == Linux ]] || skip "Slurm runs on Linux only"
((EUID == 0)) || skip "needs root, as slurmd does"
if ((${#missing[@]})); then
    command -v apt-get >/dev/null || skip "no ${missing[*]}, and no apt-get to install them"
    install "${missing[@]}" || skip "apt-get could not install ${missing[*]}"
fi
APART=(unshare --mount --net --uts --ipc --pid --fork --kill-child --mount-proc)
"${APART[@]}" true 2>/dev/null || skip "no namespaces of its own: unshare is not permitted"

WORK=$(mktemp -d -t reshard-slurm-XXXXXX)
chmod 755 "$WORK" # munged wants everybody to reach its socket
trap 'rm -rf "$WORK" || { sleep 1 && rm -rf "$WORK"; }' EXIT
trap 'kill -KILL "$apart"; wait; exit 143' HUP INT TERM
"${APART[@]}" python -m tests.slurm "$WORK" "$@" &
apart=$!
wait "$apart"
