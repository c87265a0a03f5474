#!/usr/bin/env bash
# Train and evaluate a small HyperRouter GPT. This script installs the environment, makes a corpus and a tokenizer,
# preprocesses the corpus to token files, trains on 2 ranks, and evaluates the model.
#
#   bash examples/quickstart.sh                          # about 5 minutes on 2 CPU cores, including the first installation
#   bash examples/quickstart.sh --train-iters 1000       # flags go to pretrain_gpt_hyperrouter.py
#   bash examples/quickstart.sh --load runs/quickstart   # continue after an interruption
#
# Everything is written to runs/quickstart/. Steps that are already done are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

echo "== 1/6 environment: Python packages and the C++ extension"
# shellcheck source=/dev/null
source "$(bash tools/setup_env.sh)/bin/activate"

out=runs/quickstart
data=$out/data
mkdir -p "$data"

echo "== 2/6 corpus: the source files of the Python standard library"
[ -s $data/corpus.jsonl ] || python tools/make_corpus.py --output $data/corpus.jsonl

echo "== 3/6 tokenizer: a byte-level BPE of 1024 tokens"
[ -s $data/tokenizer.json ] || python tools/train_tokenizer.py --input $data/corpus.jsonl --vocab-size 1024 --output $data/tokenizer.json

echo "== 4/6 preprocessing: the corpus becomes token ids"
[ -s $data/stdlib_text_document.idx ] || python tools/preprocess_data.py --input $data/corpus.jsonl --output-prefix $data/stdlib \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model $data/tokenizer.json --append-eod --workers 2

echo "== 5/6 training: a HyperRouter GPT on 2 ranks (1 rank if there is only one GPU)"
# Train on two ranks with half of the experts each: on GPUs if there are at least two, on CPU cores if there is none. With a
# single GPU, train on one rank with all experts.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2
layout=()
if [ "$gpus" = 1 ]; then
  ranks=1
  layout=(--expert-model-parallel-size 1)
fi
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu # each rank uses one core; DeepSpeed does not search for GPUs
# Use a free port, so that two runs on one machine do not connect to each other.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
deepspeed --log_level warning --num_gpus "$ranks" --master_port "$port" pretrain_gpt_hyperrouter.py --config examples/quickstart.yaml \
  --data-path $data/stdlib_text_document --tokenizer-type HuggingFaceTokenizer --tokenizer-model $data/tokenizer.json \
  --run-dir $out "${layout[@]}" "$@"

echo "== 6/6 evaluation: 1, 2, 4 and 8 active experts of 8"
unset OMP_NUM_THREADS # the evaluation is one process, which uses all cores
python tools/evaluate.py --load $out --topk 1 2 4 8 --output $out/evaluation.json
python tools/baselines.py --load $out --results $out/evaluation.json --output $out/table.json
