"""Causes of differences: each known fault is recognised, and others get no cause."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import write_weights
from megatron_hyperrouter.verify.causes import causes
from megatron_hyperrouter.verify.differences import SCALE, Evidence

EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
EXPERTS = [f"decoder.layers.0.mlp.experts.local_experts.{number}.linear_fc1.weight" for number in range(2)]
ROUTER = "decoder.layers.0.mlp.router."
SIZES = {"TP": 2, "EP": 4, "PP": 1}


def gradients() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(5, generator=generator) for name in (EMBEDDING, NORM, *EXPERTS)}


def left(
    folder: Path,
    own: Mapping[str, Tensor],
    *,
    aux: tuple[float, ...] = (1.1, 1.2),
    digests: tuple[str, ...] = ("a", "a"),
) -> Evidence:
    """A run of two steps on two ranks with these gradients."""
    for name, tensors in (
        ("before", {key: torch.zeros(5) for key in own}),
        ("after", {key: -SCALE * value for key, value in own.items()}),
    ):
        (folder / name).mkdir(parents=True)
        write_weights(folder / name, 0, tensors)
    steps = [{"lm_loss": 5.0, "aux_loss": value, "grad_norm": 1.0} for value in aux]
    return Evidence(
        steps, [{ROUTER: digest} for digest in digests], folder / "before", folder / "after", folder / "after"
    )


def told(
    tmp_path: Path, changed: Mapping[str, Tensor] | None = None, **more: tuple[float, ...] | tuple[str, ...]
) -> list[str]:
    reference = left(tmp_path / "reference", gradients())
    found = left(tmp_path / "found", {**gradients(), **(changed or {})}, **more)  # type: ignore[arg-type]
    return causes(found, reference, sizes=SIZES, tolerance=1e-3)


def test_equal_runs_look_like_nothing(tmp_path: Path) -> None:
    assert told(tmp_path) == []


@pytest.mark.parametrize(
    ("factor", "why"), [(4.0, "(EP = 4)"), (0.5, "(1 / TP, where TP = 2)"), (3.0, "those")]
)
def test_experts_that_are_scaled(tmp_path: Path, factor: float, why: str) -> None:
    (cause,) = told(tmp_path, {name: factor * gradients()[name] for name in EXPERTS})
    assert cause.startswith(f"only the gradients of experts differ: they are {factor:g} times {why}")


def test_an_embedding_that_lacks_a_part(tmp_path: Path) -> None:
    (cause,) = told(tmp_path, {EMBEDDING: gradients()[EMBEDDING] * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])})
    assert cause.startswith("only the gradient of the embedding differs")


def test_all_gradients_scaled(tmp_path: Path) -> None:
    (cause,) = told(tmp_path, {name: 2 * value for name, value in gradients().items()})
    assert cause == "all gradients are 2 times (TP = 2) those of the one-process run"


def test_a_norm_of_which_nothing_is_known(tmp_path: Path) -> None:
    assert told(tmp_path, {NORM: -gradients()[NORM]}) == []


@pytest.mark.parametrize(("aux", "known"), [((2.2, 2.4), True), ((2.2, 1.3), False)])
def test_aux_loss_is_scaled_in_every_step_or_not_at_all(
    tmp_path: Path, aux: tuple[float, ...], known: bool
) -> None:
    assert told(tmp_path, aux=aux) == (
        ["the auxiliary loss is 2 times (TP = 2) that of the one-process run"] if known else []
    )


@pytest.mark.parametrize(("digests", "who"), [(("a", "b"), "rank 1"), (("b", "b"), "all ranks")])
def test_another_hypernetwork(tmp_path: Path, digests: tuple[str, ...], who: str) -> None:
    (cause,) = told(tmp_path, digests=digests)
    assert cause.startswith(f"the frozen weights of the router (such as the hypernetwork) on {who} differ")
