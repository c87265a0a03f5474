#!/usr/bin/env bash
# Start the ranks of one node of a job. The containers of examples/cluster/kubernetes run this script:
#
#   bash examples/cluster/node.sh [flags of pretrain_gpt_hyperrouter.py]
#
# The environment variables PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT describe the job to
# torchrun. The exit status is that of torchrun, or 42 if a restart cannot help because of the settings, the data or the installation
# (`mhr status` decides). The manifests do not restart a job that ends with 42. A SIGTERM is passed on to the ranks, which save and stop.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/cluster/run_folder.sh
source examples/cluster/run_folder.sh "$@"

# torchrun turns every exit status into 1. Therefore check the settings before torchrun starts.
ranks=${PET_NPROC_PER_NODE:-1}
[[ $ranks =~ ^[0-9]+$ ]] || ranks=$(nvidia-smi -L | wc -l)
flags=(--run-dir "$run_dir" "${load[@]}" "$@")
status=0
python pretrain_gpt_hyperrouter.py "${flags[@]}" --dry-run --world-size "$((${PET_NNODES:-1} * ranks))" >/dev/null || status=$?
case $status in
  0) ;;
  2 | 3 | 5) exit 42 ;;
  *) exit "$status" ;; # too little memory, or a file server that does not answer: a restart may help
esac

torchrun --shutdown-timeout 240 pretrain_gpt_hyperrouter.py "${flags[@]}" &
child=$!
trap 'kill -TERM "$child"' TERM INT
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # a signal has ended the wait, but not the child
  status=0
  wait "$child" || status=$?
done
[ "$status" = 0 ] || python tools/status.py "$run_dir" --after-exit "$status" || status=42
exit "$status"
