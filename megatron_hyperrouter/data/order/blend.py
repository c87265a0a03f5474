"""The meaning of --data-path and --split: which files, with which weights, and which documents of them
each split reads.

Equal to megatron-core 0.16's ``get_blend_from_list``, ``BlendedMegatronDatasetConfig`` and
``BlendedMegatronDatasetBuilder``, except that weights after their prefixes are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter.config.derived import split_shares
from megatron_hyperrouter.config.schedules.mixes import prefixes_and_weights
from megatron_hyperrouter.errors import ConfigError, Problem

# samples that megatron-core adds to a set's share; they may change the number of epochs
_SURPLUS = 0.005
_PIECE = 2**20  # samples


@dataclass(frozen=True)
class Blend:
    """Prefixes of ``.bin/.idx`` pairs and their weights, which sum to 1; None: in proportion to the samples
    that each holds.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(words: Sequence[str], *, flag: str) -> Blend:
    """``("a", "b")`` or ``("0.3", "a", "0.7", "b")``.  ConfigError if weights and prefixes do not
    alternate.
    """
    try:
        prefixes, weights = prefixes_and_weights(words)
    except ValueError as error:
        remedy = "put a weight before every prefix (0.3 PREFIX-A 0.7 PREFIX-B), or give no weights"
        raise ConfigError([Problem(flag, " ".join(words), str(error), remedy)]) from None
    return Blend(prefixes, None if weights is None else normalise(weights))


def normalise(weights: Sequence[float]) -> tuple[float, ...]:
    """Shares that sum to 1, by the float64 operations of megatron-core: another rounding could turn a tie in
    a blend.
    """
    array = np.array(weights, np.float64)
    return tuple((array / np.sum(array)).tolist())


def split_documents(split: str, num_documents: int) -> tuple[range, range, range]:
    """The documents of training, validation and test: neighbouring ranges in the shares of ``split``, each
    possibly empty.

    ConfigError for a split that is not up to three shares.
    """
    try:
        shares = split_shares(split)
    except ValueError as error:
        raise ConfigError(
            [
                Problem(
                    "--split",
                    split,
                    str(error),
                    ("write the shares of training, validation and test data, such as 969,30,1"),
                )
            ]
        ) from None
    bounds = [round(bound * num_documents) for bound in accumulate(shares, initial=0.0)]
    train, valid, test = (range(begin, end) for begin, end in pairwise(bounds))
    return train, valid, test


def blend_sizes(weights: Sequence[float], num_samples: int) -> tuple[int, tuple[int, ...]]:
    """Samples in a blend of at least ``num_samples``, and the number for which each set is built (slightly
    more than its share).
    """
    parts = [math.ceil(num_samples * weight) for weight in weights]
    return sum(parts), tuple(math.ceil(part * (1 + _SURPLUS)) for part in parts)


def set_counts(sets: npt.NDArray[np.int16], count: int) -> list[int]:
    """How many samples of a blend each of its ``count`` sets gives; counted in pieces, because NumPy makes a
    copy that is four times as large.
    """
    total = np.zeros(count, np.int64)
    for begin in range(0, len(sets), _PIECE):
        total += np.bincount(sets[begin : begin + _PIECE], minlength=count)
    return [int(each) for each in total]
