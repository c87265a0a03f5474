"""Flags that a Megatron-LM command omits and whose defaults differ here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

ENOUGH = 3  # a command with at least this many flags that only Megatron-LM has is one of its commands


class Other(NamedTuple):
    """A default that differs: the flags that set it, Megatron-LM's default, and ours."""

    flags: tuple[str, ...]
    there: str
    here: str


MODEL = (
    Other(("num-experts",), "no experts", "8 in each layer"),
    Other(("swiglu",), "GELU", "SwiGLU"),
    Other(("normalization",), "LayerNorm", "RMSNorm"),
    Other(("disable-bias-linear",), "biases", "no biases"),
    Other(
        ("position-embedding-type", "use-rotary-position-embeddings"), "learned positions", "rotary positions"
    ),
    Other(
        ("ffn-hidden-size",),
        "a feed-forward width of 8/3 x --hidden-size (with --swiglu)",
        "4 x --hidden-size",
    ),
)
TRAINING = (
    Other(("hidden-dropout",), "dropout 0.1", "no dropout"),
    Other(("attention-dropout",), "dropout 0.1", "no dropout"),
    Other(("lr-decay-style",), "a linear decay", "a cosine decay"),
    Other(("eval-iters",), "100 batches in an evaluation", "10 batches"),
)


def defaults_that_differ(given: Collection[str], foreign: int) -> Iterator[str]:
    """Notes about omitted flags whose defaults differ.  ``given``: the given flags, without leading
    dashes; ``foreign``: how many of them only Megatron-LM has.
    """
    if foreign < ENOUGH:
        return
    for rows, what in ((MODEL, "builds a different model"), (TRAINING, "trains differently")):
        missing = [row for row in rows if not any(name in given for name in row.flags)]
        if missing:
            shown = "; ".join(
                f"without --{row.flags[0]}, Megatron-LM uses {row.there} and this program uses {row.here}"
                for row in missing
            )
            yield f"this command {what} than in Megatron-LM: {shown}"
