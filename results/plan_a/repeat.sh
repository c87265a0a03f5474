#!/usr/bin/env bash
# Repeats blocks of plan A with the public commands alone, and makes their pages:
#
#   bash results/plan_a/repeat.sh A1            # 40 runs, about an hour on two CPU cores (an estimate)
#   bash results/plan_a/repeat.sh A1 A3 A2 A4
#
# Runs go to runs/plan_a/; after an interruption the same command continues.  A4 fine-tunes the models of A1, so run A1 first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
jobs=${JOBS:-1}
out=runs/plan_a
bash results/plan_a/data.sh

A1() {
  mhr compare --config results/plan_a/A1.yaml --options results/plan_a/A1.routers.yaml --routers smoe_dropout matched hyper paper topk \
    --comparisons hyper:smoe_dropout@1 hyper:matched@1 hyper:matched@16 topk:matched@1 topk:hyper@1 topk:hyper@16 \
    --seeds 8 --topk-eval 1 2 4 8 16 --jobs "$jobs" --output $out/A1
}

A2() {
  for k in 2 4 8; do
    mhr compare --config results/plan_a/A2.yaml --options results/plan_a/A2.routers.yaml --routers matched hyper topk \
      --comparisons hyper:matched@1 topk:matched@1 --seeds 4 --topk-eval 1 2 4 8 16 --jobs "$jobs" --output $out/A2-$k \
      --moe-router-topk $k
  done
  mhr compare --config results/plan_a/A2.yaml --options results/plan_a/A2.routers.yaml --routers matched hyper topk \
    --comparisons hyper:matched@1 topk:matched@1 --seeds 4 --topk-eval 1 2 4 8 16 --jobs "$jobs" --output $out/A2-growing \
    --moe-router-topk 8 --topk-schedule linear --topk-start 2
}

A3() {
  mhr compare --config results/plan_a/A3.yaml --options results/plan_a/A3.routers.yaml \
    --routers topk_no_aux topk_aux competesmoe simsmoe xmoe stablemoe \
    --comparisons competesmoe:topk_aux@2 simsmoe:topk_aux@2 xmoe:topk_aux@2 stablemoe:topk_aux@2 \
    --seeds 4 --topk-eval 1 2 4 8 16 --jobs "$jobs" --output $out/A3
}

A4() {
  bash examples/tasks/fetch.sh build/plan_a/tasks senses45
  for label in hyper matched topk; do
    for seed in 1 2 3 4 5; do
      [ -s $out/A4/$label-seed$seed/results.json ] ||
        mhr finetune --load $out/A1/runs/$label-seed$seed --task build/plan_a/tasks/senses45 --output $out/A4/$label-seed$seed --topk 1 2 4 8 16
    done
  done
}

for block in "${@:-A1}"; do
  "$block"
  case $block in
    A2) folders=("$out"/A2-*/) ;;
    A4) folders=("$out"/A4/*/) ;;
    *) folders=("$out/$block") ;;
  esac
  mhr report "${folders[@]}" --output "$out/$block.html"
done
