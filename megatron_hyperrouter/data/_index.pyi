"""Types of the C++ extension (``csrc/bindings.cpp``, where each function is documented) and of its twin
``_numpy_index``.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

def sample_index(
    sizes: npt.NDArray[np.int32],
    document_index: npt.NDArray[np.integer[Any]],
    seq_length: int,
    num_samples: int,
    num_tokens: int,
    extra: int,
    wide: bool,
) -> npt.NDArray[np.integer[Any]]: ...
def shuffle(values: npt.NDArray[np.integer[Any]], key: npt.NDArray[np.uint32], position: int) -> int: ...
def blending_indices(
    weights: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]: ...
def exhaustive_blending_indices(
    sizes: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]: ...
def permuted(position: int, size: int, key: int) -> int: ...
def permutation(size: int, key: int) -> npt.NDArray[np.int64]: ...
def gather(
    tokens: npt.NDArray[np.integer[Any]],
    pointers: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    document_index: npt.NDArray[np.integer[Any]],
    first: int,
    begin: int,
    last: int,
    end: int,
    limit: int,
    out: npt.NDArray[np.int64],
) -> int: ...
