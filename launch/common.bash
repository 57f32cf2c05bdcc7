# What the scripts of launch/ share. To be sourced.

refuse() {
    echo "reshard: $*" >&2
    exit 2
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

# One per GPU; without GPUs one per core, at most 8.
default_ranks() {
    local found
    found=$(gpus)
    if ((found == 0)); then
        found=$(cores)
        found=$((found < 8 ? found : 8))
    fi
    echo "$found"
}
