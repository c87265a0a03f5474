#!/usr/bin/env bash
# Plan B: train the routers of plan A at published sizes, on one GPU. It has never been run. results/README.md has its predicted cost.
#
#   bash results/plan_b/repeat.sh enwik8.txt paper     # 40 runs: 4 layers, hidden size 256
#   bash results/plan_b/repeat.sh enwik8.txt large     # 25 runs: 12 layers, hidden size 512
#   STEPS=2000 SEEDS=1 bash results/plan_b/repeat.sh enwik8.txt paper     # measures how long a run takes; do this first
#
# The first argument is the text of enwik8, which you must download yourself. After an interruption, run the same command again to
# continue.
set -euo pipefail
text=$(realpath "$1") size=$2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case $size in
  paper) seeds=${SEEDS:-8} ;;
  large) seeds=${SEEDS:-5} ;;
  *) echo "the second argument must be paper or large" >&2 && exit 2 ;;
esac
out=runs/plan_b/$size${STEPS:+-$STEPS}
if [ ! -s data/enwik8_text_document.idx ]; then
  mkdir -p data
  mhr preprocess --input "$text" --output-prefix data/enwik8 --tokenizer-type ByteTokenizer
fi
mhr compare --config "results/plan_b/$size.yaml" --options results/plan_b/routers.yaml \
  --routers smoe_dropout matched hyper paper topk \
  --comparisons hyper:smoe_dropout@1 hyper:matched@1 hyper:matched@16 topk:matched@1 topk:hyper@1 topk:hyper@16 \
  --topk-eval 1 2 4 8 16 --seeds "$seeds" ${STEPS:+--train-iters "$STEPS"} --output "$out"
mhr report "$out" --output "$out.html"
