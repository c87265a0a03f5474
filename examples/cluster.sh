#!/usr/bin/env bash
# Start a run on several nodes with the deepspeed launcher, which reaches them by ssh:
#
#   bash examples/cluster.sh HOSTFILE [flags of pretrain_gpt_hyperrouter.py]
#
# HOSTFILE has a line "name slots=8" for each node. Every node sees this folder under the same path and has its environment
# (tools/setup_env.sh). What the workers need in their environment goes into ~/.deepspeed_env. Run the same command again after a
# failure: it goes on from the last complete checkpoint.
set -euo pipefail
hostfile=$(realpath "${1:?usage: bash examples/cluster.sh HOSTFILE [flags]}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source "$(bash tools/setup_env.sh)/bin/activate"

# Each rank keeps to its cores; NCCL fails rather than hangs when a peer is lost.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

exec deepspeed --hostfile "$hostfile" --num_nodes "$(grep -cE '^[^#[:space:]]' "$hostfile")" pretrain_gpt_hyperrouter.py \
  --config examples/cluster.yaml --load runs/cluster "$@"
