#!/usr/bin/env bash
# Trains an experiment on several nodes. Run it on every node, with the same arguments (Hydra overrides):
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/qwen3/run_multi_node.sh output_dir=/shared/runs/first
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 examples/qwen3/run_multi_node.sh output_dir=/shared/runs/first
#
# EXPERIMENT     file of opsd_megatron/configs/experiment/ (qwen3_1.7b_opsd), the same on every node
# NNODES         nodes
# NODE_RANK      0 on the node that MASTER_ADDR names, another number on each other one (SLURM_NODEID where unset)
# MASTER_ADDR    name or address of node 0, reachable from all nodes
# MASTER_PORT    a port that is free there (29500)
# GPUS_PER_NODE  GPUs to use on each node (8)
# DRY_RUN=1      print the command and the composed configuration, and start nothing; needs no GPU
#
# SIGTERM or SIGUSR1 to this script, on every node, ends the run after the step it is in, which is saved
# (docs/multinode.md).
set -euo pipefail

: "${NNODES:?set it to the number of nodes}"
: "${MASTER_ADDR:?set it to the name or address of node 0}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
: "${NODE_RANK:?set it to 0 on the node that MASTER_ADDR names, and to 1, 2, ... on the others}"
master_port="${MASTER_PORT:-29500}"
gpus_per_node="${GPUS_PER_NODE:-8}"

# Names an error where bash would speak of an "unbound variable" and torchrun would wait for nodes that never come.
check_number() { # NAME VALUE SMALLEST
    if ! [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || (($2 < $3)); then
        echo "error: $1=$2 must be a whole number from $3 up" >&2
        exit 2
    fi
}
check_number NNODES "$NNODES" 1
check_number NODE_RANK "$NODE_RANK" 0
check_number MASTER_PORT "$master_port" 1
check_number GPUS_PER_NODE "$gpus_per_node" 1
if ((NODE_RANK >= NNODES)); then
    echo "error: NODE_RANK=$NODE_RANK must be below NNODES=$NNODES; the first node is 0" >&2
    exit 2
fi

# Said outright, since torchrun's own guess (does MASTER_ADDR name this machine?) fails behind some network set-ups.
is_host=$((NODE_RANK == 0 ? 1 : 0))

overrides=("experiment=${EXPERIMENT:-qwen3_1.7b_opsd}" "$@")
command=(
    torchrun
    --nnodes "$NNODES"
    --nproc-per-node "$gpus_per_node"
    --rdzv-backend c10d
    --rdzv-endpoint "$MASTER_ADDR:$master_port"
    --rdzv-id "opsd-$MASTER_ADDR-$master_port"
    --rdzv-conf "is_host=$is_host"
    -m opsd_megatron.train "${overrides[@]}"
)

# Megatron-Core overlaps tensor-parallel communication with compute by the order in which kernels are queued; one
# hardware queue keeps that order on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '# command:'
    printf ' %q' "${command[@]}"
    printf '\n# not checked: mesh, model, data; this does (a model named on the Hub is downloaded):'
    printf ' %q' python -m opsd_megatron.train --check "$((NNODES * gpus_per_node))" "${overrides[@]}"
    printf '\n# configuration:\n'
    exec python -m opsd_megatron.train --cfg job "${overrides[@]}"
fi

# A job of its own (-m), which leaves SIGINT alone as a plain background job would not; torchrun ignores SIGUSR1.
set -m
(
    trap '' USR1
    exec "${command[@]}"
) &
launcher=$!
# Told to stop, the ranks save after the step they are in. They are told past torchrun, which kills them 30 seconds after
# a signal of its own. A second SIGTERM is passed on to torchrun.
# shellcheck disable=SC2329 # the traps call both
tell() {
    interrupted=1
    kill "-$1" "$launcher" 2>/dev/null || true # torchrun may have ended just now
}
# shellcheck disable=SC2329
stop() {
    interrupted=1
    trap 'tell TERM' TERM
    if ! command -v pkill >/dev/null; then
        echo "warning: no pkill here (package procps): torchrun gives the ranks 30 seconds" >&2
        tell TERM
    fi
    pkill -USR1 -P "$launcher" || true # none yet, or none any more
}
trap stop TERM USR1
trap 'tell INT' INT
trap 'tell HUP' HUP
# A signal ends `wait` with a status above 128 while torchrun goes on. Just as torchrun ends, bash may lose its status
# (5.2 says 255).
while true; do
    interrupted=0
    wait "$launcher" && status=0 || status=$?
    ((interrupted)) || break
done
exit "$status"
