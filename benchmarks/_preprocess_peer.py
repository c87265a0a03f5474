"""The work of Megatron-LM's two preprocessing tools, in a separate process: a peer for preprocess.py.

Run as: _preprocess_peer.py one|batch INPUT.jsonl PREFIX tokenizer.json WORKERS.  Those tools need packages
that this project does not need, so the same libraries do their work here.  ``one``
(``preprocess_data.py``): a ``multiprocessing.Pool`` maps over the lines, 32 at a time; a worker encodes
one document after another with the library ``tokenizers`` (the tool uses it through ``transformers``,
which costs more), and the lists of ids go to megatron-core's ``IndexedDatasetBuilder``.  ``batch``
(``preprocess_data_fast.py``): ``gigatoken`` encodes the whole file, ``awkward`` appends the
end-of-document token, and the documents go to the same builder.  The tool's builder gives them to 128
processes, which megatron-core 0.16 does not support and which would not save CPU time.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


class Encoder:
    """A worker's tokenizer, loaded when the worker starts."""

    def __init__(self, tokenizer_file: str) -> None:
        self._file = tokenizer_file

    def start(self) -> None:
        """Load the tokenizer into this process."""
        from tokenizers import Tokenizer

        Encoder.tokenizer = Tokenizer.from_file(self._file)
        Encoder.eod = Encoder.tokenizer.token_to_id("<|endoftext|>")

    def encode(self, line: str) -> tuple[list[int], list[int]]:
        """The ids of one JSON line, and the length of its one sequence."""
        ids = Encoder.tokenizer.encode(json.loads(line)["text"]).ids
        if ids:
            ids.append(Encoder.eod)
        return ids, [len(ids)] if ids else []

    tokenizer: Any
    eod: int


def one_by_one(source: str, prefix: str, tokenizer_file: str, workers: int) -> None:
    """As ``preprocess_data.py``."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = Encoder(tokenizer_file)
    encoder.start()
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(Encoder.tokenizer.get_vocab_size())
    )
    with (
        multiprocessing.Pool(workers, initializer=encoder.start) as pool,
        open(source, encoding="utf-8") as lines,
    ):
        for ids, lengths in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, lengths)
        builder.finalize(f"{prefix}.idx")
        pool.close()
        pool.join()  # or the processor time of the workers would be nobody's


def whole_file(source: str, prefix: str, tokenizer_file: str, workers: int) -> None:
    """As ``preprocess_data_fast.py``; its ``workers`` are the threads of the library."""
    import awkward
    import gigatoken
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = gigatoken.Tokenizer(tokenizer_file)
    found = tokenizer.encode_files(gigatoken.JsonlFileSource([source], field="text"), parallel=workers > 1)
    eod = tokenizer.encode("<|endoftext|>")[0]
    found = awkward.concatenate(
        [found, awkward.singletons(awkward.Array(np.full(len(found), eod, dtype=np.uint32)))], axis=1
    )
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for ids in found:
        array = np.asarray(ids)
        builder.add_document(array, [len(array)])
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    WAYS: dict[str, Callable[[str, str, str, int], None]] = {"one": one_by_one, "batch": whole_file}
    WAYS[sys.argv[1]](*sys.argv[2:5], int(sys.argv[5]))
