#!/usr/bin/env bash
# Repeat blocks of plan A with the public commands, and make a report on each block:
#
#   bash results/plan_a/repeat.sh A1            # 40 runs
#   bash results/plan_a/repeat.sh A1 A1b A1c A1d A4 A3 A2 A5
#   SEEDS=4 bash results/plan_a/repeat.sh A1    # only the first 4 seeds; SEEDS=8 adds the others later
#
# The runs are written to runs/plan_a/. After an interruption, run the same command again to continue. Run A1 first, because A1b, A1c,
# A1d and A4 use runs of A1. At the end, claims.py prints the verdicts on the claims of results/README.md, from all finished blocks.
#
# Each run is scored on 128 batches (131,072 bytes) of the test split. These batches differ between seeds, but not between routers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
jobs=${JOBS:-1}
scored=(--topk-eval 1 2 4 8 16 --test-iters 128 --jobs "$jobs")
out=runs/plan_a
bash results/plan_a/data.sh

A1() {
  mhr compare --config results/plan_a/A1.yaml --options results/plan_a/A1.routers.yaml --routers smoe_dropout matched hyper paper topk \
    --comparisons hyper:smoe_dropout@1 hyper:matched@1 hyper:matched@16 topk:matched@1 topk:hyper@1 topk:hyper@16 \
    --seeds "${SEEDS:-8}" "${scored[@]}" --output $out/A1
}

take() { # FROM TO LABEL...: link finished runs of the block FROM into the block TO
  mkdir -p "$out/$2/runs"
  for label in "${@:3}"; do
    for run in "$out/$1/runs/$label"-seed*; do
      if [ -s "$run/results.json" ]; then ln -sfn "../../$1/runs/${run##*/}" "$out/$2/runs/${run##*/}"; fi
    done
  done
}

A1b() {
  take A1 A1b matched hyper
  mhr compare --config results/plan_a/A1.yaml --options results/plan_a/A1b.routers.yaml \
    --routers matched hyper lr3 lr10 lr30 embed512 width1024 \
    --comparisons lr3:matched@1 lr10:matched@1 lr30:matched@1 embed512:matched@1 width1024:matched@1 \
    --seeds "${SEEDS:-8}" "${scored[@]}" --output $out/A1b
}

A1c() {
  take A1 A1c matched topk
  take A1b A1c lr10
  mhr compare --config results/plan_a/A1.yaml --options results/plan_a/A1c.routers.yaml --routers matched topk lr10 topk_lr10 \
    --comparisons lr10:matched@1 lr10:matched@16 lr10:topk@1 lr10:topk@16 lr10:topk_lr10@1 lr10:topk_lr10@16 \
    --seeds "${SEEDS:-4}" "${scored[@]}" --output $out/A1c
}

A1d() {
  take A1 A1d matched hyper
  mhr compare --config results/plan_a/A1.yaml --options results/plan_a/A1d.routers.yaml --routers matched hyper each \
    --comparisons each:hyper@1 each:hyper@16 each:matched@1 --seeds "${SEEDS:-4}" "${scored[@]}" --output $out/A1d
}

A2() {
  for k in 2 4 8; do
    mhr compare --config results/plan_a/A2.yaml --options results/plan_a/A2.routers.yaml --routers matched hyper topk \
      --comparisons hyper:matched@1 topk:matched@1 --seeds "${SEEDS:-4}" "${scored[@]}" --output $out/A2-$k \
      --moe-router-topk $k
  done
  mhr compare --config results/plan_a/A2.yaml --options results/plan_a/A2.routers.yaml --routers matched hyper topk \
    --comparisons hyper:matched@1 topk:matched@1 --seeds "${SEEDS:-4}" "${scored[@]}" --output $out/A2-growing \
    --moe-router-topk 8 --topk-schedule linear --topk-start 2
}

A3() {
  mhr compare --config results/plan_a/A3.yaml --options results/plan_a/A3.routers.yaml \
    --routers topk_no_aux topk_aux competesmoe simsmoe xmoe stablemoe \
    --comparisons competesmoe:topk_aux@2 simsmoe:topk_aux@2 xmoe:topk_aux@2 stablemoe:topk_aux@2 \
    --seeds "${SEEDS:-4}" "${scored[@]}" --output $out/A3
}

A4() {
  bash examples/tasks/fetch.sh build/plan_a/tasks senses45
  for label in hyper matched topk; do
    for seed in $(seq "${SEEDS:-5}"); do
      [ -s "$out/A4/$label-seed$seed/results.json" ] ||
        mhr finetune --load "$out/A1/runs/$label-seed$seed" --task build/plan_a/tasks/senses45 --output "$out/A4/$label-seed$seed" \
          --topk 1 2 4 8 16 --steps 300 --seq-length 64
    done
  done
}

A5() { # two other architectures, trained on as many bytes as the runs of A1
  for name in glam-like switch-like; do
    for seed in $(seq "${SEEDS:-1}"); do
      run=$out/A5/$name-seed$seed
      [ -s "$run/evaluation.json" ] && continue
      mhr train --config examples/models/$name-small.yaml --global-batch-size 8 --num-workers 0 --seed "$seed" --run-dir "$run"
      mhr evaluate --load "$run" --topk 1 2 4 8 16 --eval-iters 128 --output "$run/evaluation.json"
    done
  done
}

for block in "${@:-A1}"; do
  "$block"
  case $block in
    A2) folders=("$out"/A2-*/) ;;
    A4 | A5) folders=("$out/$block"/*/) ;;
    *) folders=("$out/$block") ;;
  esac
  mhr report "${folders[@]}" --output "$out/$block.html"
done
python results/plan_a/claims.py $out | tee $out/claims.md
