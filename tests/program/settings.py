"""The settings and the text of the tiny runs that these tests start."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np

from megatron_hyperrouter.data.store.token_files import IndexedWriter

RANKS = 2
STEPS = 12
BATCH, SEQ, LAYERS, EXPERTS = 8, 16, 2, 4
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --moe-ffn-hidden-size 48 "
    "--seq-length 16 --num-experts 4 "
    "--make-vocab-size-divisible-by 8 --init-method-std 0.06 --micro-batch-size 2 --global-batch-size 8 "
    "--train-iters 12 "
    "--lr 1e-2 --lr-warmup-iters 2 --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --split 8,1,1 "
    "--num-workers 0 "
    "--eval-interval 6 --eval-iters 2 --save-interval 3 --log-interval 1"
).split()
TINY_MODEL = """
num_layers: 2
hidden_size: 32
num_attention_heads: 4
num_query_groups: 2
moe_ffn_hidden_size: 48
seq_length: 16
num_experts: 4
make_vocab_size_divisible_by: 8
init_method_std: 0.06
"""
# k grows from 1 to 3, and dropout draws random numbers: both have to survive a stop.
WHOLE = (
    "--router.name hyper --moe-router-topk 3 --topk-schedule linear --topk-start 1 --hidden-dropout 0.1 "
    "--attention-dropout 0.1 "
    "--expert-model-parallel-size 2 --zero-stage 1"
).split()


def flags_of(text: Path, run_dir: Path, *more: object, layout: list[str] = WHOLE) -> list[str]:
    """Flags of a run; later ones win."""
    return [
        *TINY,
        *layout,
        "--data-path",
        str(text),
        "--run-dir",
        str(run_dir),
        *(str(word) for word in more),
    ]


def write_numbers(prefix: Path, ids: range, documents: int = 8) -> Path:
    """Each of ``ids`` once, in documents of about the same size."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for part in np.array_split(np.array(ids), documents):
            writer.add_document(part)
    return prefix


def write_text(prefix: Path, documents: int = 40) -> Path:
    """A byte-level corpus of sources of the standard library, each document ended by 256."""
    words = (
        (textwrap.__doc__ or "")
        + Path(json.__file__).read_text(encoding="utf-8")
        + Path(textwrap.__file__).read_text(encoding="utf-8")
    )
    text = words.encode()
    size = len(text) // documents
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(documents):
            piece = np.frombuffer(text[number * size : (number + 1) * size], np.uint8)
            writer.add_document(np.append(piece.astype(np.uint16), 256))
    return prefix
