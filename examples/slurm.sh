#!/usr/bin/env bash
# The same run under Slurm, on the Megatron engine:  sbatch examples/slurm.sh [flags of pretrain_gpt_hyperrouter.py]
# One task a node; torchrun starts a rank for each GPU. Slurm sends SIGTERM 120 s before the time is over: the run saves and stops, and the
# next job goes on from there. torchrun would give it 30 s for that: --shutdown-timeout.
#SBATCH --job-name=hyperrouter
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
# shellcheck source=/dev/null
source "$(bash tools/setup_env.sh)/bin/activate"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
  --shutdown-timeout 110 --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
  pretrain_gpt_hyperrouter.py --config examples/cluster.yaml --engine megatron --load runs/cluster "$@"
