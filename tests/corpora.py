"""Small token files for tests, and megatron-core's datasets over the same files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_hyperrouter.data.store.token_files import IndexedWriter


def write_corpus(
    prefix: Path, sizes: Sequence[int], *, seed: int = 0, vocab_size: int = 1000, dtype: Any = np.uint16
) -> str:
    """Documents of these sizes with random tokens; returns the prefix."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype) as writer:
        for size in sizes:
            writer.add_document(random.integers(0, vocab_size, size))
    return str(prefix)


def megatron_datasets(
    samples: tuple[int | None, int | None, int | None],
    *,
    seq_length: int,
    seed: int,
    vocab_size: int = 1000,
    **where: Any,
) -> list[Any]:
    """What megatron-core's own builder makes for training, validation and test; ``where``: blend,
    blend_per_split, split.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=vocab_size, eod=0, unique_identifiers={"class": "none"})
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **where,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, list(samples), lambda: True, config).build()


def megatron_sample(dataset: Any, i: int) -> np.ndarray:
    """Sample ``i`` of a megatron-core dataset as S + 1 tokens."""
    found = dataset[i]
    return np.concatenate([found["tokens"].numpy(), found["labels"].numpy()[-1:]])
