"""Texts during training, with an engine whose likeliest next token is known."""

from __future__ import annotations

from typing import Any, cast

import torch

from megatron_hyperrouter.engines.base import Engine
from megatron_hyperrouter.train.written import SampleWriter


class Counting:
    """Each token is followed by the next number; what is behind a position holds nothing."""

    def logits(self, ids_PS: torch.Tensor, *, topk: int) -> torch.Tensor:
        assert topk == 3
        return torch.nn.functional.one_hot((ids_PS + 1) % 10, 12).float()


def test_prompts_of_any_length_are_continued_to_the_end_of_a_sample() -> None:
    decode: Any = lambda ids: ",".join(map(str, ids))  # noqa: E731
    writer = SampleWriter(2, ("a", "b"), [[3], [7, 8]], decode, vocab_size=10, length=5)
    assert [step for step in range(1, 7) if writer.due(step)] == [2, 4, 6]
    assert writer.texts(cast("Engine", Counting()), topk=3) == ["4,5,6,7", "9,0,1"]
