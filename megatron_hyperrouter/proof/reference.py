"""The run's side of a proof: logits and expert choices of its engine, written to files for the comparison.

Legend: ``B`` samples, ``S`` positions, ``V`` ids of the padded vocabulary, ``E`` experts, ``K`` active
experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_hyperrouter.engines.base import Engine
from megatron_hyperrouter.routers.base import Router, Routing


def write_reference(engine: Engine, rows_BS: Tensor, topks: Sequence[int], folder: Path) -> None:
    """Files ``tokens.safetensors`` and ``k-N.safetensors`` of samples of S + 1 ids; the engine runs in one
    process.
    """
    save_file(
        {"tokens_BS": rows_BS[:, :-1].clone(), "labels_BS": rows_BS[:, 1:].clone()},
        folder / "tokens.safetensors",
    )
    for k in topks:
        logits: list[Tensor] = []
        told: dict[str, list[Tensor]] = {}
        for row_S in rows_BS:
            with watched(engine.routers) as seen:
                logits.append(engine.logits(row_S[None, :-1], topk=k)[0].float().cpu())
            for layer, routing in seen.items():
                told.setdefault(f"experts.{layer}", []).append(routing.experts_TK.cpu())
                told.setdefault(f"gap.{layer}", []).append(gap(routing.logits_TE, k).cpu())
        tensors = {name: torch.stack(parts) for name, parts in told.items()}
        save_file({"logits_BSV": torch.stack(logits), **tensors}, folder / f"k-{k}.safetensors")


@contextmanager
def watched(routers: Mapping[str, Router]) -> Iterator[dict[int, Routing]]:
    """Within this context, each layer's last routing, by its number from 0."""
    seen: dict[int, Routing] = {}

    def note(router: Any, _inputs: Any, routing: Routing) -> None:
        seen[router.layer_number - 1] = routing

    hooks = [router.register_forward_hook(note) for router in routers.values()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def gap(logits_TE: Tensor, k: int) -> Tensor:
    """The k-th largest less the next logit, ``_T``: how near a token is to another choice; infinite where k =
    E.
    """
    if k == logits_TE.size(-1):
        return torch.full((logits_TE.size(0),), torch.inf)
    best = logits_TE.detach().float().topk(k + 1, dim=-1).values
    return best[:, k - 1] - best[:, k]


def greedy(
    engine: Engine, prompt: Sequence[int], new_tokens: int, *, topk: int, length: int, vocab_size: int
) -> list[int]:
    """The text after ``prompt``, by greedy decoding among the ids below ``vocab_size``: a router may not know
    those of padding.  Samples have ``length`` ids, as in training.
    """
    ids_1S = torch.zeros(1, length, dtype=torch.int64)
    start = len(prompt)
    ids_1S[0, :start] = torch.tensor(prompt)
    end = min(start + new_tokens, length)
    for at in range(start, end):  # a position does not depend on later ones
        logits_V = engine.logits(ids_1S, topk=topk)[0, at - 1, :vocab_size]
        ids_1S[0, at] = logits_V.argmax().cpu()
    return [int(token) for token in ids_1S[0, start:end]]
