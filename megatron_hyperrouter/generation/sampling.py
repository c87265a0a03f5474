"""Continues prompts with a decoder: greedily, or by sampling with a temperature from the most likely
tokens.

Legend: ``B`` prompts, ``P`` positions, ``V`` ids of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hyperrouter.generation.attention import KeyValueCache
from megatron_hyperrouter.generation.decoder import Decoder

_COLDEST = 1e-30  # a lower temperature is greedy decoding; logits divided by it would overflow


@dataclass(frozen=True)
class Style:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: greedy decoding
    top_p: float = 1.0  # sample from the most likely tokens whose probabilities add up to this
    seed: int = 1234


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    style: Style,
    *,
    topk: int,
    vocab_size: int,
    eod: int | None,
) -> list[list[int]]:
    """The ids that follow each prompt, up to the end of the text, which is not included; ids are below
    ``vocab_size``.

    The text of a prompt does not depend on the other prompts, because each has separate random numbers.
    """
    ids_BP, hidden_BP = padded(prompts)
    cache = KeyValueCache(hidden_BP)
    generators = [torch.Generator().manual_seed(style.seed) for _ in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for _ in range(style.max_new_tokens):
        logits_BV = decoder.logits(ids_BP, cache, topk=topk)[:, -1, :vocab_size].float()
        chosen = [
            choose(row_V, style, generator) for row_V, generator in zip(logits_BV, generators, strict=True)
        ]
        for number, token in enumerate(chosen):
            going[number] = going[number] and token != eod
            if going[number]:
                made[number].append(token)
        if not any(going):
            break
        ids_BP = torch.tensor(chosen)[:, None]
    return made


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids ``_BP`` with padding in front of the shorter prompts, and where it is."""
    length = max(len(prompt) for prompt in prompts)
    ids_BP = torch.zeros(len(prompts), length, dtype=torch.int64)
    hidden_BP = torch.ones(len(prompts), length, dtype=torch.bool)
    for number, prompt in enumerate(prompts):
        ids_BP[number, length - len(prompt) :] = torch.tensor(prompt)
        hidden_BP[number, length - len(prompt) :] = False
    return ids_BP, hidden_BP


def choose(logits_V: Tensor, style: Style, generator: torch.Generator) -> int:
    """The next token."""
    if style.temperature < _COLDEST:
        return int(logits_V.argmax())
    probs_V = (logits_V / style.temperature).softmax(-1)
    if style.top_p < 1.0:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        kept_V = sorted_V.cumsum(-1) - sorted_V < style.top_p  # at least the most likely one
        probs_V = torch.zeros_like(probs_V).scatter_(0, order_V[kept_V], sorted_V[kept_V])
    return int(torch.multinomial(probs_V, 1, generator=generator))
