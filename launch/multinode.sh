#!/usr/bin/env bash
# Starts this node's part of reshard on several nodes.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.bash
source "$HERE/common.bash"

usage() {
    cat <<'TEXT'
launch/multinode.sh [OPTIONS] [--] [ARGS ...]

Starts reshard with ARGS on this node, one of several. Run it once on each, with the same ARGS:

    launch/multinode.sh --nnodes 2 --node-rank 0 --master 10.0.0.1 --nproc 8 ARGS   # on 10.0.0.1
    launch/multinode.sh --nnodes 2 --node-rank 1 --master 10.0.0.1 --nproc 8 ARGS   # on the other
    srun --ntasks-per-node=1 launch/multinode.sh ARGS       # in a Slurm job, which tells the rest

The nodes meet by torchrun's c10d rendezvous, which node 0 hosts.
  --nnodes N            default: those of the Slurm step, else 1
  --node-rank R         0 to N-1; default: Slurm's
  --master ADDR[:PORT]  node 0, as the others reach it; default: $MASTER_ADDR and $MASTER_PORT,
                        else the address that Slurm has of its first node. PORT: 20000 + job id
                        modulo 10000; without Slurm 29500
  --nproc N             ranks of this node; default: $SLURM_GPUS_ON_NODE, $SLURM_CPUS_PER_TASK,
                        else one per GPU; without GPUs one per core, at most 8
  --local-addr ADDR     this node, as the others reach it; default: its address on the way to ADDR
  --id NAME             the same on all nodes; default: Slurm's job and its restarts
  --dry-run             only print the command
  ARGS                  default: --src meta8 --dst tp4 (without paths: the demo)

GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use. Node names need not resolve: on
a node whose own name does not, or only to itself, GLOO_SOCKET_IFNAME becomes the network of its
address. torchrun is launch/torchrun, with the Python of .venv in the repository if there is one,
else with that of the torchrun on PATH.
TEXT
}

# The address that Slurm has of a node; it need not be what the node calls itself.
slurm_address() { # NODE
    scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

first_address() { # NAME: what it resolves to; an address stays what it is
    getent ahosts "$1" | awk 'NR == 1 { print $1 }' || true
}

own_address() { # OTHER: this node's address on the way there; nothing where that is not to be told
    local other
    other=$(first_address "$1")
    [[ $other ]] || return 0
    { ip -o route get "$other" 2>/dev/null || true; } | sed -n 's/.* src \([^ ]*\).*/\1/p'
}

network_of() { # ADDRESS
    { ip -o addr show to "$1" 2>/dev/null || true; } | awk 'NR == 1 { print $2 }'
}

# Whether others could find this node by its own name: what Gloo asks for first.
has_a_name() {
    local address
    address=$(first_address "$(uname -n)")
    [[ $address && $address != 127.* && $address != ::1 ]]
}

number() { # OPTION VALUE LEAST
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        refuse "$1: \`$2\` is not a number from $3 on"
    fi
}

# --- what is given, then what Slurm says ----------------------------------------------------------

nnodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}} node_rank=${SLURM_NODEID-} dry_run=
master=${MASTER_ADDR-} port=${MASTER_PORT-} nproc='' local_addr='' id=''
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry_run=1; shift; continue ;;
        --nnodes | --node-rank | --master | --nproc | --local-addr | --id)
            (($# > 1)) || refuse "$1: give a value; --help says more"
            option=$1 value=$2
            shift 2
            ;;
        --nnodes=* | --node-rank=* | --master=* | --nproc=* | --local-addr=* | --id=*)
            option=${1%%=*} value=${1#*=}
            shift
            ;;
        --) shift; break ;;
        *) break ;;
    esac
    case $option in
        --nnodes) nnodes=$value ;;
        --node-rank) node_rank=$value ;;
        --master)
            [[ $value =~ ^(\[([^]]+)\]|([^]:[]+))(:([0-9]+))?$ ]] ||
                refuse "--master: \`$value\` is not ADDR or ADDR:PORT"
            master=${BASH_REMATCH[2]}${BASH_REMATCH[3]} port=${BASH_REMATCH[5]:-$port}
            ;;
        --nproc) nproc=$value ;;
        --local-addr) local_addr=$value ;;
        --id) id=$value ;;
    esac
done
(($#)) || set -- --src meta8 --dst tp4

nproc=${nproc:-${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_PER_TASK:-$(default_ranks)}}}
number --nproc "$nproc" 1
number --nnodes "$nnodes" 1
if ((${SLURM_STEP_NUM_TASKS:-1} > ${SLURM_STEP_NUM_NODES:-1})); then
    ((SLURM_PROCID == 0)) || exit 2
    refuse "$SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes, but torchrun starts the" \
        "ranks; use srun --ntasks-per-node=1"
fi

# --- the command ----------------------------------------------------------------------------------

command=()
if ((nnodes > 1)); then
    [[ $node_rank ]] || refuse "--node-rank: which of the $nnodes nodes is this? 0 to $((nnodes - 1))"
    number --node-rank "$node_rank" 0
    ((node_rank < nnodes)) || refuse "--node-rank: $node_rank, but nodes are 0 to $((nnodes - 1))"
    nodes=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST-}}
    if [[ -z $master && $nodes ]]; then
        master=$(slurm_address "$(scontrol show hostnames "$nodes" | sed -n 1p)")
    fi
    [[ $master ]] || refuse "--master: give the address of node 0, or set MASTER_ADDR"
    port=${port:-${SLURM_JOB_ID:+$((20000 + SLURM_JOB_ID % 10000))}}
    number MASTER_PORT "${port:=29500}" 1
    local_addr=${local_addr:-$(own_address "$master")}
    if [[ -z ${GLOO_SOCKET_IFNAME-} && $local_addr ]] && ! has_a_name; then
        network=$(network_of "$local_addr")
        [[ -z $network ]] || command+=(env "GLOO_SOCKET_IFNAME=$network")
    fi
fi

torchrun=${HERE%/*}/.venv/bin/torchrun
[[ -x $torchrun ]] || torchrun=$(command -v torchrun || true)
python=${torchrun%/*}/python
[[ -z $torchrun || ! -x $python ]] || command+=("$python")
command+=("$HERE/torchrun")
if ((nnodes > 1)); then
    [[ $master != *:* ]] || master="[$master]"
    # A torchrun that an earlier start of the job left behind must not join. The others may come
    # minutes before node 0, where Python is read over a network.
    id=${id:-${SLURM_JOB_ID:+$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}}}
    command+=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$master:$port"
        --rdzv-id "${id:-reshard}" --rdzv-conf "is_host=$((node_rank == 0)),read_timeout=180"
        ${local_addr:+--local-addr "$local_addr"})
fi
command+=(--nproc "$nproc" -m reshard "$@")
if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
