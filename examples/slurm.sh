#!/usr/bin/env bash
# The same run under Slurm, on the Megatron engine:  sbatch examples/slurm.sh [flags of pretrain_gpt_hyperrouter.py]
# One task a node; torchrun starts a rank for each GPU. Slurm sends SIGTERM 120 s before the time is over: the run saves and stops, and
# this script puts the job back into the queue, which continues the run. torchrun would give it 30 s for that: --shutdown-timeout.
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

status=0
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
  --shutdown-timeout 110 --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
  pretrain_gpt_hyperrouter.py --config examples/cluster.yaml --engine megatron --load runs/cluster "$@" || status=$?

# A run that was asked to stop ends with status 6 (torchrun makes 1 of it) and says so in its last event. Anything else is an error.
run_dir=runs/cluster
for ((i = 1; i < $#; i++)); do
  [ "${!i}" != --run-dir ] || { next=$((i + 1)) && run_dir=${!next}; }
done
if [ "$status" = 6 ] || { [ "$status" != 0 ] && tail -n 1 "$run_dir/events.jsonl" 2>/dev/null | grep -q '"event": "stop"'; }; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
