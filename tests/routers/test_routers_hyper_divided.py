"""A hypernetwork that several ranks divide, here threads: together they do what one rank with all of it does.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter import build_router
from megatron_hyperrouter.routers import RunFacts
from megatron_hyperrouter.routers.hyper import HyperRouter

T, D, E, RANKS, PASSES = 16, 12, 6, 3, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "an embedding for each expert": {"per_expert_embedding": True, "bias": True, "embedding_size": 5},
    "one for all layers": {"shared": "model"},
}
Result = TypeVar("Result")


class Thread:
    """The place of one thread among those that divide a hypernetwork."""

    size = RANKS

    def __init__(self, rank: int, table: list[Any], barrier: Barrier) -> None:
        self.rank, self._table, self._barrier = rank, table, barrier

    def _all(self, own: Tensor) -> list[Tensor]:
        self._table[self.rank] = own.clone()
        self._barrier.wait(60)
        found = list(self._table)
        self._barrier.wait(60)
        return found

    def gather(self, part: Tensor) -> Tensor:
        return torch.stack(self._all(part))

    def sum_of_own(self, parts: Tensor) -> Tensor:
        return sum((each[self.rank] for each in self._all(parts)), torch.zeros(()))


def router(ranks: Thread | None = None, **options: Any) -> HyperRouter:
    made = build_router(
        "hyper",
        hidden_size=D,
        num_experts=E,
        topk=2,
        seed=5,
        hypernet_width=20,
        aux_loss_coeff=0.01,
        facts=RunFacts(data_ranks=ranks),
        **options,
    )
    assert isinstance(made, HyperRouter)
    return made


def divided(**options: Any) -> list[HyperRouter]:
    """One router for each thread."""
    table, barrier = [None] * RANKS, Barrier(RANKS)
    return [router(Thread(rank, table, barrier), **options) for rank in range(RANKS)]


def together(work: Callable[[int], Result]) -> list[Result]:
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(work, range(RANKS)))


def tokens(rank: int, number: int) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(10 * rank + number))


def run(one: HyperRouter, rank: int) -> Tensor:
    """The backward passes of a step; returns the logits."""
    logits = []
    for number in range(PASSES):
        routing = one(tokens(rank, number))
        (
            routing.weights_TK[:, 0].sum() + routing.losses["aux"] + routing.logits_TE.square().mean()
        ).backward()
        logits.append(routing.logits_TE.detach())
    return torch.cat(logits)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ranks_together_give_the_logits_and_the_gradient_of_one(options: dict[str, Any]) -> None:
    parts, whole = divided(**options), router(**options)

    def step(rank: int) -> Tensor:
        parts[rank].hold()
        parts[rank].begin_backward(PASSES)
        logits = run(parts[rank], rank)
        parts[rank].end_backward()
        return logits

    for rank, logits in enumerate(together(step)):
        torch.testing.assert_close(logits, run(whole, rank), rtol=1e-5, atol=1e-6)
    gradients = [part.embedding_S.grad for part in parts]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    total, expected = sum(gradients, torch.zeros(())), whole.embedding_S.grad
    assert expected is not None
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_rank_keeps_its_columns_of_the_same_numbers(options: dict[str, Any]) -> None:
    parts, whole = divided(**options), router(**options)
    w1_HS, _, w2_HP, _ = whole.frozen.tensors
    w2_HED = w2_HP.view(20, E, -1)[..., :D]
    for rank, part in enumerate(parts):
        assert torch.equal(part.frozen.tensors[0], w1_HS)
        own = part.frozen.tensors[2].view(20, E, -1)
        assert torch.equal(own[..., : D // RANKS], w2_HED[..., rank * D // RANKS : (rank + 1) * D // RANKS])
        assert torch.equal(own[..., D // RANKS :], w2_HP.view(20, E, -1)[..., D:])
        assert part.frozen.tensors[2].untyped_storage().nbytes() == own.nbytes
        assert part.frozen.digest == whole.frozen.digest
    cpu = torch.device("cpu")
    assert set(together(lambda rank: parts[rank].frozen_digest(cpu))) == {whole.frozen_digest(cpu)}


def test_a_damaged_part_is_seen_by_every_rank() -> None:
    parts, cpu = divided(), torch.device("cpu")
    parts[1].frozen.tensors[2][3, 4] += 1
    assert router().frozen.digest not in together(lambda rank: parts[rank].frozen_digest(cpu))


def test_checkpoints_are_the_same() -> None:
    part, whole = divided()[1], router()
    assert part.state_dict().keys() == whole.state_dict().keys()
    whole.load_state_dict(part.state_dict())
    part.load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_whole_hypernetwork(copier: Callable[[HyperRouter], HyperRouter]) -> None:
    assert torch.equal(copier(divided()[1])(tokens(0, 0)).logits_TE, router()(tokens(0, 0)).logits_TE)


@pytest.mark.parametrize("promised", [None, 1, PASSES + 1])
def test_a_broken_promise_raises(promised: int | None) -> None:
    """Otherwise the embedding would miss a part of its gradient, or other ranks would wait for this one."""
    part = divided()[0]
    if promised is None:
        with pytest.raises(RuntimeError, match=r"call hold\(\) first"):
            part(tokens(0, 0))
        return
    whole = router()
    whole.hold()
    whole.begin_backward(promised)
    if promised < PASSES:
        with pytest.raises(RuntimeError, match="more backward passes than the 1 that"):
            run(whole, 0)
    else:
        run(whole, 0)
        with pytest.raises(RuntimeError, match="layer 1 took part in 2 backward passes instead of 3"):
            whole.end_backward()
