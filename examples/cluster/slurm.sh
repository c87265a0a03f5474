#!/usr/bin/env bash
# Train under Slurm, and continue after a time limit, a failure or a lost node. Submit this script in the project folder:
#
#   sbatch --nodes 8 --gpus-per-node 8 examples/cluster/slurm.sh [flags of pretrain_gpt_hyperrouter.py]
#   sbatch examples/cluster/slurm.sh --mock-data               # a trial on one node without data, with or without GPUs
#
# srun starts one rank for each GPU of a node. Without --config, the run uses examples/cluster.yaml on the Megatron engine. Its folder is
# the value of --run-dir, or else run_dir of the settings, or else runs/cluster. Five minutes before the time limit, Slurm sends SIGTERM
# to the ranks. The run then saves and stops with status 6, and the job goes back into the queue. The job also goes back after a failure,
# unless a restart cannot help because of the settings, the data or the installation (`mhr status` decides).
#
# Environment variables:
#   RANKS_PER_NODE      number of ranks on each node; default: the number of GPUs, else 1
#   ENGINE              the engine: deepspeed or megatron
#   LAUNCHER=torchrun   start one task per node instead of one per rank
#   DOCTOR=1            check the machines with mhr doctor first
#   CONTAINER_IMAGE     run the ranks in this container image (Slurm with the pyxis plugin)
#   MASTER_ADDR         address of the first node; needed if the name of this node does not resolve to the right address
#SBATCH --job-name=hyperrouter
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

# Slurm runs a copy of this file, so the project is the folder from which the job was submitted, or the folder of the original file.
root=${SLURM_SUBMIT_DIR:-$PWD}
if [ ! -f "$root/pretrain_gpt_hyperrouter.py" ]; then
  original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
  root=$(cd "$(dirname "$original")/../.." && pwd)
fi
cd "$root"
if [ -z "${CONTAINER_IMAGE:-}" ] && [ -z "${VIRTUAL_ENV:-}" ]; then
  # shellcheck source=/dev/null
  source "$(bash tools/setup_env.sh)/bin/activate"
fi

gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
nodes=${SLURM_JOB_NUM_NODES:-1}
cores=$((${SLURM_CPUS_ON_NODE:-$ranks} / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 8 ? 8 : cores > 0 ? cores : 1))}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export PYTHONUNBUFFERED=1

# shellcheck source=examples/cluster/run_folder.sh
source examples/cluster/run_folder.sh "$@"
given=" ${*//_/-} " # the program takes --mock_data for --mock-data
settings=(--run-dir "$run_dir" "${load[@]}")
[ -z "${ENGINE:-}" ] || settings+=(--engine "$ENGINE")
if [[ $given != *" --config"* ]]; then
  [ -n "${ENGINE:-}" ] || settings+=(--engine megatron)
  if [ "$gpus" -gt 0 ]; then
    settings+=(--config examples/cluster.yaml)
  else # a model that a few cores can train; with an even number of ranks, each pair of ranks shares its experts
    settings+=(--config examples/quickstart.yaml --expert-model-parallel-size "$((ranks * nodes % 2 == 0 ? 2 : 1))")
  fi
fi
if [[ $given == *" --mock-data "* && $given != *" --tokenizer-type"* ]]; then
  settings+=(--tokenizer-type NullTokenizer --vocab-size 50000)
fi

step=(srun --nodes "$nodes" --kill-on-bad-exit=1)
ask=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
  container=(--container-image "$CONTAINER_IMAGE" --container-mounts "$root:$root" --container-workdir "$root")
  step+=("${container[@]}")
  ask=(srun --nodes 1 --ntasks 1 "${container[@]}") # the machine itself may not have the libraries
fi
by_rank=("${step[@]}" --ntasks "$((nodes * ranks))" --ntasks-per-node "$ranks" --cpus-per-task "$((cores > 0 ? cores : 1))")
attempt=${SLURM_RESTART_COUNT:-0}
echo "attempt $((attempt + 1)): $nodes node(s), $ranks rank(s) per node, $cores CPU core(s) per rank, run folder $run_dir"

status=0
if [ "${DOCTOR:-0}" = 1 ]; then
  "${by_rank[@]}" python tools/doctor.py --run-dir "$run_dir" --json "$run_dir/doctor.json" || exit $?
fi
if [ "${LAUNCHER:-srun}" = torchrun ]; then
  # each attempt has a different rendezvous id; without --shutdown-timeout, torchrun gives ranks only 30 s to stop
  head=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  start=("${step[@]}" --ntasks "$nodes" --ntasks-per-node 1 --cpus-per-task "${SLURM_CPUS_ON_NODE:-1}"
    torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --shutdown-timeout 280 --rdzv-backend c10d
    --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))" --rdzv-id "$SLURM_JOB_ID-$attempt")
else
  start=("${by_rank[@]}" python)
fi
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
{ "${start[@]}" pretrain_gpt_hyperrouter.py "${settings[@]}" "$@" 2>&1 >&3 | tee "$errors" >&2; } 3>&1 || status=$?
# If a rank fails, the launcher ends the other ranks and returns their status (143), or 1. If the rank that failed first had refused to
# start, use the status of that rank.
first=$(sed -n -E '/.*(Exited with exit code|exitcode *:) ([0-9]+).*/{s//\2/p;q}' "$errors")
case $first in 2 | 3 | 5) status=$first ;; esac

if [ "$status" != 0 ] && "${ask[@]}" python tools/status.py "$run_dir" --after-exit "$status"; then
  case $(scontrol show job "$SLURM_JOB_ID") in
    *JobState=CANCELLED*) echo "the job was cancelled, so Slurm does not requeue it" ;;
    *) scontrol requeue "$SLURM_JOB_ID" && exit 0 ;;
  esac
fi
exit "$status"
