"""``--mock-data``: made-up samples, to try a model or a machine without data files."""

from __future__ import annotations

import numpy as np

from megatron_hyperrouter.data.stream.dataset import Sample, Splits

_SAMPLES = 1 << 40  # as many as any run asks for


class MockDataset:
    """Samples that count upwards from a number of their own: a model learns them quickly.

    Sample ``i`` depends on (seed, part, i) alone.
    """

    def __init__(self, *, seq_length: int, vocab_size: int, seed: int, part: int, samples: int) -> None:
        self.seq_length, self.vocab_size = seq_length, vocab_size
        self.seed, self.part, self.samples = seed, part, samples

    def __len__(self) -> int:
        """Number of samples."""
        return self.samples

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``: int64 [S + 1]; IndexError outside 0 .. len - 1."""
        if not 0 <= i < self.samples:
            raise IndexError(f"sample {i} of {self.samples}")
        first = np.random.default_rng((self.seed, self.part, i)).integers(self.vocab_size)
        return np.arange(first, first + self.seq_length + 1, dtype=np.int64) % self.vocab_size


def mock_splits(*, seq_length: int, vocab_size: int, seed: int, scored: int) -> Splits:
    """Training, validation and test, each with samples of its own; ``scored``: samples of an evaluation."""

    def part(number: int, samples: int) -> MockDataset | None:
        sizes = {"seq_length": seq_length, "vocab_size": vocab_size}
        return MockDataset(**sizes, seed=seed, part=number, samples=samples) if samples else None

    return Splits(train=part(0, _SAMPLES), valid=part(1, scored), test=part(2, scored))
