"""Token files and datasets that the data benchmark reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from _pairs import Seconds as Seconds  # sets the import path

if TYPE_CHECKING:
    from megatron_hyperrouter.data.stream.dataset import Dataset

SEQ_LENGTH = 2048
SEED = 1234
VOCABULARY = 50_000


def write_sizes(prefix: Path, sizes: np.ndarray) -> None:
    """Documents of these sizes; ``.bin`` is a hole of the right length, which reads as zeros and takes no
    disk.
    """
    ends = np.cumsum(sizes, dtype=np.int64) * 2
    with open(f"{prefix}.idx", "wb") as stream:
        header = np.zeros(34, np.uint8)
        header[:9] = np.frombuffer(b"MMIDIDX\0\0", np.uint8)
        header[9], header[17] = 1, 8  # version, uint16
        header[18:34] = np.array([len(sizes), len(sizes) + 1], "<u8").view(np.uint8)
        for part in (
            header,
            sizes.astype("<i4"),
            np.concatenate([[0], ends[:-1]]).astype("<i8"),
            np.arange(len(sizes) + 1, dtype="<i8"),
        ):
            part.tofile(stream)
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(int(ends[-1]))


def write_tokens(prefix: Path, sizes: np.ndarray) -> None:
    """The same with random tokens."""
    write_sizes(prefix, sizes)
    np.random.default_rng(0).integers(0, VOCABULARY, int(sizes.sum()), dtype=np.uint16).tofile(
        f"{prefix}.bin"
    )


def our_dataset(prefix: Path, samples: int, **how: Any) -> Dataset:
    """At least that many samples; ``how``: settings of the data."""
    from megatron_hyperrouter.config.tree import DataConfig
    from megatron_hyperrouter.data.stream.dataset import build_splits

    wanted = {"train_samples": samples, "valid_samples": 0, "test_samples": 0}
    data = DataConfig(train_data_path=(str(prefix),), **how)
    train = build_splits(data, seq_length=SEQ_LENGTH, seed=SEED, vocab_size=VOCABULARY, **wanted).train
    assert train is not None
    return train


def megatron_dataset(prefix: Path, samples: int, *, cache: str | None = None) -> Any:
    """The same of megatron-core, as its training program builds it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend_per_split=[([str(prefix)], None), None, None],
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=0, unique_identifiers={"class": "none"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=cache,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
