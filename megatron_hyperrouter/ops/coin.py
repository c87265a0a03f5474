"""Random decisions about collectives: the same on every rank, without communication."""

from __future__ import annotations

import hashlib


def shared_coin(*, seed: int, step: int, layer: int) -> float:
    """A uniform draw in [0, 1) from (seed, step, layer) alone, so that all ranks take the same branch.

    The first 53 bits of a SHA-256: they do not depend on a generator's state, the device or a library
    version.
    """
    word = hashlib.sha256(f"coin:{seed}:{step}:{layer}".encode()).digest()[:8]
    return (int.from_bytes(word, "big") >> 11) * 2.0**-53
