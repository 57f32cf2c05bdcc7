#!/usr/bin/env bash
# What a batch job does: launch/multinode.sh on its nodes, and what comes before and after.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.bash
source "$HERE/common.bash"

usage() {
    cat <<'TEXT'
launch/slurm.sh [--nproc N] [--default KEY=VALUE ...] [--list] -- [ARGS ...]

Runs reshard with ARGS on the nodes of a Slurm job; the files of slurm/ end with it. Its exit code
is the program's: 0 done or already done, 1 failed, 2 refused, 143 stopped.
  --nproc N            ranks per node; default: its GPUs
  --default KEY=VALUE  for the program, unless ARGS say KEY, or name a --config
  --list               the first of ARGS is a file that names a checkpoint per line: SOURCE, or
                       SOURCE and TARGET, with blanks or (for names with blanks) a tab between.
                       A task of an array job takes the line of its number; empty lines and those
                       that begin with # do not count. Without a TARGET it is dst.path/NAME
  ARGS                 default: --src meta8 --dst tp4 (without paths: the demo)

Options from the environment of sbatch:
  RESHARD_REQUEUE=N    20: how often a job that is stopped before its time limit (SIGUSR1, as the
                       batch files ask Slurm for) is queued again, where it goes on; 0: never
  RESHARD_LOCAL=1      every node first copies its share of the files in src.path (or --src DIR) to
                       its own disk (launch/stage.sh), and the ranks read them there; removed at
                       the end. Files that are on the nodes' disks already need nothing but src.path
  RESHARD_SCRATCH=DIR  where to; default: $TMPDIR, else /tmp. The same path on every node
  RESHARD_STRIPE=N     stripes files of the target over N Lustre targets (-1: all). Files inherit
                       that from the directory that dst.path is in, so it is set there: the
                       directory must be new, empty, or striped like this already
  RESHARD_DRY_RUN=1    only print each node's command
  MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME    as launch/multinode.sh has it
TEXT
}

# --- the program's arguments ----------------------------------------------------------------------

has_key() { # KEY
    local word
    for word in "${arguments[@]}"; do
        [[ $word != "$1="* ]] || return 0
    done
    return 1
}

value_of() { # KEY: the last one counts
    local word found=
    for word in "${arguments[@]}"; do
        [[ $word != "$1="* ]] || found=${word#*=}
    done
    echo "$found"
}

source_spec() { # what --src says; the last one counts
    local word before='' found=
    for word in "${arguments[@]}"; do
        [[ $before != --src ]] || found=$word
        [[ $word != --src=* ]] || found=${word#*=}
        before=$word
    done
    echo "$found"
}

set_key() { # KEY VALUE
    local word kept=()
    for word in "${arguments[@]}"; do
        [[ $word == "$1="* ]] || kept+=("$word")
    done
    arguments=("${kept[@]}" "$1=$2")
}

# The line of the list that is this task's becomes the program's source and target.
take_line() {
    local list=${arguments[0]-} task=${SLURM_ARRAY_TASK_ID-} lines line source target
    [[ -f $list && -r $list ]] ||
        refuse "\`$list\` is no list: the first argument is a file with one checkpoint per line"
    mapfile -t lines < <(tr -d '\r' <"$list" | grep -vE '^[[:space:]]*(#|$)')
    ((${#lines[@]})) || refuse "\`$list\` names no checkpoint: give one per line"
    if [[ -z $task ]] || ((task < 1 || task > ${#lines[@]})); then
        refuse "array task ${task:-(none)}, but \`$list\` names ${#lines[@]} checkpoints:" \
            "submit with --array=1-${#lines[@]}"
    fi
    line=${lines[task - 1]}
    if [[ $line == *$'\t'* ]]; then
        IFS=$'\t' read -r source target <<<"$line"
    else
        read -r source target <<<"$line"
    fi
    arguments=("${arguments[@]:1}")
    if [[ -z $target ]]; then
        has_key dst.path ||
            refuse "\`$list\`: checkpoint $task has no target: name it behind the source," \
                "or give dst.path=DIR, below which each gets its own name"
        target=$(value_of dst.path)/$(basename "$source")
    fi
    set_key dst.path "$target"
    if [[ $(source_spec) ]]; then
        set_key src.path "$source"
    else
        arguments=(--src "$source" "${arguments[@]}")
    fi
    echo "checkpoint $task of ${#lines[@]}: $source -> $target"
}

add_defaults() {
    local item
    [[ " ${arguments[*]} " != *" --config"[\ =]* ]] || return 0
    for item in "${defaults[@]}"; do
        has_key "${item%%=*}" || arguments+=("$item")
    done
}

# --- steps of the job -----------------------------------------------------------------------------

# Ends the step under way by SIGTERM to its processes: a signal to srun itself would kill them.
# Slurm may lose it while they are about to start, even without an error; a second one is harmless.
tell() {
    while [[ $pid ]] && kill -0 "$pid" 2>/dev/null; do
        scancel --signal=TERM "$step" 2>/dev/null || true
        sleep 1
    done
}

# Runs a command on every node and returns the highest of its exit codes. USR1 ends it, whenever it
# comes: before it is begun here, between the lines, or in `wait`, which returns then.
run_step() { # COMMAND ...
    pid='' step=$job.$steps
    steps=$((steps + 1))
    ((!stopping)) || return 143
    # When one node fails the others get a minute to end by themselves: killed at once, they would
    # turn the exit code into 143.
    srun --kill-on-bad-exit=0 --wait=60 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@" &
    pid=$!
    ((!stopping)) || tell
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    wait "$pid" # again: bash remembers the code, where the first may have told of the signal
}

# New directories and files take their striping over from the one they are made in.
stripe() { # COUNT
    local target folder found
    target=$(value_of dst.path)
    [[ $target ]] || refuse "RESHARD_STRIPE: no dst.path to stripe"
    target=${target%/} folder=$(dirname "${target%/}")
    if ! command -v lfs >/dev/null; then
        echo "reshard: RESHARD_STRIPE: no \`lfs\` on this node, so nothing is striped"
        return
    fi
    mkdir -p "$folder"
    [[ $(lfs getstripe -d -c "$folder" 2>/dev/null) != "$1" ]] || return 0
    found=$(find "$folder" -mindepth 1 -maxdepth 1 ! -name "$(basename "$target")*" -printf '%f\n' -quit)
    [[ -z $found ]] ||
        refuse "RESHARD_STRIPE: \`$folder\` holds other files (\`$found\`), which it would change for" \
            "too: give the target a directory of its own, or run lfs setstripe -c $1 $folder"
    lfs setstripe -c "$1" "$folder" || refuse "RESHARD_STRIPE: lfs setstripe -c $1 $folder failed"
}

# Each node copies its share of the source; the ranks read the copies, since src.path counts more
# than a directory behind --src.
stage() {
    local source
    source=$(value_of src.path)
    [[ $source ]] || source=$(source_spec)
    [[ -d $source ]] ||
        refuse "RESHARD_LOCAL: \`$source\` is no directory to copy: give src.path=DIR or --src DIR"
    local_copy=${RESHARD_SCRATCH:-${TMPDIR:-/tmp}}/reshard-$SLURM_JOB_ID
    set_key src.path "$local_copy"
    run_step "$HERE/stage.sh" ${dry_run:+--dry-run} "$source" "$local_copy"
}

discard_copies() {
    [[ -z $local_copy || $dry_run ]] || srun rm -rf -- "$local_copy" || true
}

# Queues a job again that was stopped in time; 0 and 2 are results that would come again, but a
# service that was stopped ends with 0.
requeue() { # CODE
    local limit=${RESHARD_REQUEUE:-20} restarts=${SLURM_RESTART_COUNT:-0}
    ((stopping && $1 != 2)) || return 0
    (($1 != 0)) || [[ ${arguments[0]} == serve ]] || return 0
    if ((restarts >= limit)); then
        echo "reshard: stopped before the time limit, and not queued again (RESHARD_REQUEUE=$limit);" \
            "the same command goes on"
        return
    fi
    echo "reshard: stopped before the time limit; queued again ($((restarts + 1)) of $limit)"
    scontrol requeue "$job" || echo "reshard: the job could not be queued again" >&2
}

# --- the job --------------------------------------------------------------------------------------

nproc='' list='' defaults=()
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --nproc) nproc=$2; shift 2 ;;
        --default) defaults+=("$2"); shift 2 ;;
        --list) list=1; shift ;;
        --) shift; break ;;
        *) refuse "launch/slurm.sh: \`$1\`? --help says how it is used" ;;
    esac
done
[[ ${SLURM_JOB_ID-} ]] || refuse "not in a Slurm job: submit a file of slurm/, or use launch/local.sh"

# Of an array, the id of the first task to be submitted is that of all; this names one task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
stopping=0 steps=0 step='' pid='' local_copy='' dry_run=${RESHARD_DRY_RUN:+1}
[[ ${RESHARD_DRY_RUN-} != 0 ]] || dry_run=
trap 'stopping=1; tell' USR1

arguments=("$@")
[[ -z $list ]] || take_line
((${#arguments[@]})) || arguments=(--src meta8 --dst tp4)
add_defaults
[[ -z ${RESHARD_STRIPE-} || $dry_run ]] || stripe "$RESHARD_STRIPE"

code=0
[[ ${RESHARD_LOCAL:-0} == 0 ]] || stage || code=$?
if ((code == 0)); then
    run_step "$HERE/multinode.sh" ${dry_run:+--dry-run} ${nproc:+--nproc "$nproc"} -- \
        "${arguments[@]}" || code=$?
fi
discard_copies
requeue "$code"
exit "$code"
