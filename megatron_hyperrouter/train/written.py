"""Sample texts of a run during training: continues the same prompts each time, by greedy decoding.

Legend: ``P`` prompts, ``S`` positions of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_hyperrouter import console

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.base import Engine

_NEW_TOKENS = 32


@dataclass(frozen=True)
class SampleWriter:
    """Continues prompts every ``every`` steps, with the model as it is spread over the ranks."""

    every: int
    prompts: Sequence[str]
    ids: Sequence[Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int  # ids are below it
    length: int

    def due(self, step: int) -> bool:
        """Whether texts are written after this step."""
        return step % self.every == 0

    def tell(self, engine: Engine, step: int, *, topk: int) -> None:
        """Show the texts of step ``step`` (collective)."""
        for prompt, text in zip(self.prompts, self.texts(engine, topk=topk), strict=True):
            console.note(f"after step {step}, k = {topk}: {prompt}{text}")

    def texts(self, engine: Engine, *, topk: int) -> list[str]:
        """What follows each prompt (collective: every rank brings the same)."""
        ids_PS = torch.zeros(len(self.ids), self.length, dtype=torch.int64)
        ends = [len(prompt) for prompt in self.ids]
        for row_S, prompt in zip(ids_PS, self.ids, strict=True):
            row_S[: len(prompt)] = torch.tensor(prompt)
        for _ in range(_NEW_TOKENS):
            going = [number for number, end in enumerate(ends) if end < self.length]
            if not going:
                break
            # a position does not see later ones, so the rest of a row may contain anything
            logits_PSV = engine.logits(ids_PS, topk=topk)
            for number in going:
                last_V = logits_PSV[number, ends[number] - 1, : self.vocab_size]
                ids_PS[number, ends[number]] = int(last_V.argmax())
                ends[number] += 1
        return [
            self.decode(row_S[len(prompt) : end].tolist())
            for row_S, prompt, end in zip(ids_PS, self.ids, ends, strict=True)
        ]
