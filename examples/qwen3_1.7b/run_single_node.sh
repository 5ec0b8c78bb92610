#!/usr/bin/env bash
# Trains Qwen3-1.7B with OPSD on one node. Arguments are passed on as Hydra overrides:
#
#   GPUS_PER_NODE=4 examples/qwen3_1.7b/run_single_node.sh output_dir=/data/runs/first train.steps=50
#
# GPUS_PER_NODE  GPUs to use (4)
# DRY_RUN=1      print the command and the composed configuration, and start nothing; needs no GPU
set -euo pipefail

gpus_per_node="${GPUS_PER_NODE:-4}"
overrides=(experiment=qwen3_1.7b_opsd "$@")
command=(torchrun --standalone --nproc-per-node "$gpus_per_node" -m opsd_megatron.train "${overrides[@]}")

# Megatron-Core overlaps tensor-parallel communication with compute by the order in which kernels are queued; one
# hardware queue keeps that order on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '# command:'
    printf ' %q' "${command[@]}"
    printf '\n# configuration:\n'
    exec python -m opsd_megatron.train --cfg job "${overrides[@]}"
fi
exec "${command[@]}"
