"""The tokens that a proof runs on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
from megatron_hyperrouter.errors import ConfigError, DataError
from megatron_hyperrouter.evaluate.trained import TrainedRun

_SEED = 1234


def proof_rows(
    run: TrainedRun, tokenizer: Tokenizer, *, samples: int, data_path: Sequence[str] | None = None
) -> tuple[Tensor, str]:
    """Samples of S + 1 ids, ``_BS``, and where they come from: the run's test split, or random ids if the
    data are missing.

    Random ids show whether two functions are equal as well as text does; only their perplexity is useless.
    """
    try:
        dataset = run.dataset(
            tokenizer, split=None if data_path else "test", data_path=data_path, samples=samples
        )
        rows = np.stack([dataset[number] for number in range(min(samples, len(dataset)))])
    except (ConfigError, DataError):
        if data_path:
            raise
        shape = (samples, run.settings.model.seq_length + 1)
        return random_rows(shape, tokenizer.vocab_size), (
            "random token ids, because the run has no readable test data"
        )
    return torch.from_numpy(rows), " ".join(data_path) if data_path else "the test split of the run"


def random_rows(shape: tuple[int, int], vocab_size: int) -> Tensor:
    """Ids ``_BS``, the same at every call."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(_SEED))
