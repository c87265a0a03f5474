#!/usr/bin/env bash
# Start a run on several nodes with the deepspeed launcher, which reaches them by ssh:
#
#   bash examples/cluster.sh HOSTFILE [flags of pretrain_gpt_hyperrouter.py]
#
# HOSTFILE has a line "name slots=8" for each node. Every node sees this folder under the same path and has its environment
# (tools/setup_env.sh). The command continues from the last complete checkpoint of runs/cluster, so start it again after a failure.
# Exit status 6: the run was asked to stop, by Ctrl-C or a signal, and has saved; run the same command again to continue.
set -euo pipefail
hostfile=$(realpath "${1:?usage: bash examples/cluster.sh HOSTFILE [flags]}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source "$(bash tools/setup_env.sh)/bin/activate"

# The launcher hands the variables of this file to the workers, and no others: yours from ~/.deepspeed_env, and two of ours.
# Each rank keeps to its cores; NCCL fails rather than hangs when a peer is lost.
mkdir -p runs/cluster
{
  cat ~/.deepspeed_env 2>/dev/null || true
  echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}"
  echo "TORCH_NCCL_ASYNC_ERROR_HANDLING=1"
} >runs/cluster/workers.env
export DS_ENV_FILE=$PWD/runs/cluster/workers.env

exec deepspeed --hostfile "$hostfile" --num_nodes "$(grep -cE '^[^#[:space:]]' "$hostfile")" pretrain_gpt_hyperrouter.py \
  --config examples/cluster.yaml --load runs/cluster "$@"
