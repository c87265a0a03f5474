"""Cross-entropy in chunks against torch's; the logits of all tokens never exist at the same time.

Legend: ``S`` sequence, ``B`` batch, ``T = S * B`` tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hyperrouter.model import output
from megatron_hyperrouter.model.output import OutputLayer, Projection, token_losses

S, B, D, V = 13, 3, 16, 50
T = S * B

pytestmark = pytest.mark.usefixtures("groups")


@pytest.fixture(params=[8, T, 1000], ids="chunks of {}".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(output, "_CHUNK_NUMBERS", request.param * V)
    monkeypatch.setattr(output, "_LEAST_TOKENS", 1)
    return request.param


def made(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_SBD = torch.randn(S, B, D, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels_T = torch.randint(0, V, (T,), generator=generator)
    labels_T[::5] = -1
    return hidden_SBD, weight_VD, labels_T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_is_the_cross_entropy(chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden_SBD, weight_VD, labels_T = made(dtype)
    total, losses_T = token_losses(Projection(hidden_SBD, weight_VD), labels_T)
    found = torch.autograd.grad(total * 0.3, (hidden_SBD, weight_VD))
    exact = [part.detach().double().requires_grad_() for part in (hidden_SBD, weight_VD)]
    logits_TV = exact[0].flatten(0, 1) @ exact[1].t()
    expected_T = F.cross_entropy(logits_TV, labels_T, ignore_index=-1, reduction="none")
    wanted = torch.autograd.grad(expected_T.sum() * 0.3, exact)
    # bfloat16 logits are rounded before they are summed up, as they are without chunks
    torch.testing.assert_close(losses_T.double(), expected_T, rtol=tolerance, atol=2 * tolerance)
    torch.testing.assert_close(total, losses_T.sum())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_the_factor_of_the_gradient_is_not_rounded() -> None:
    """In bfloat16, 0.3 is 0.26 % too large."""
    hidden_SBD, weight_VD, labels_T = made(torch.bfloat16)
    total, _ = token_losses(Projection(hidden_SBD, weight_VD), labels_T)
    whole, part = (
        torch.autograd.grad(total * factor, (hidden_SBD, weight_VD), retain_graph=True)
        for factor in (1.0, 0.3)
    )
    for one, other in zip(whole, part, strict=True):
        assert torch.equal((one.float() * 0.3).bfloat16(), other)


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_CHUNK_NUMBERS", 8 * V)
    monkeypatch.setattr(output, "_LEAST_TOKENS", 1)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden_SBD, weight_VD, labels_T = made(torch.float32)
    with Sizes():
        total, _ = token_losses(Projection(hidden_SBD, weight_VD), labels_T)
        total.backward()
    assert largest == V * D < T * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """When those of a chunk are made, nothing of the chunk before it is left."""
    monkeypatch.setattr(output, "_CHUNK_NUMBERS", 8 * V)
    monkeypatch.setattr(output, "_LEAST_TOKENS", 1)
    slopes: list[weakref.ref[Tensor]] = []
    left, host = [], output._chunk

    def chunk(*given: Any) -> tuple[Tensor, Tensor | None]:
        left.append([slope() for slope in slopes if slope() is not None])
        losses_C, slope_CV = host(*given)
        assert slope_CV is not None
        slopes.append(weakref.ref(slope_CV))
        return losses_C, slope_CV

    monkeypatch.setattr(output, "_chunk", chunk)
    hidden_SBD, weight_VD, labels_T = made(dtype)
    token_losses(Projection(hidden_SBD, weight_VD), labels_T)
    assert len(left) > 2 and left == [[]] * len(left)


def test_without_gradients_none_are_made() -> None:
    hidden_SBD, weight_VD, labels_T = made(torch.float32)
    with torch.no_grad():
        total, _ = token_losses(Projection(hidden_SBD, weight_VD), labels_T)
    assert not total.requires_grad


def test_the_layer_makes_logits_for_whoever_looks() -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=D, num_attention_heads=1, use_cpu_initialization=True
    )
    layer = OutputLayer(D, V, config=config, init_method=torch.nn.init.normal_, bias=False)
    hidden_SBD, _, _ = made(torch.float32)
    factors, _ = layer(hidden_SBD)
    assert isinstance(factors, Projection) and factors.weight_VD is layer.weight
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, given, result: seen.append(result[0]))
    logits_SBV, _ = layer(hidden_SBD)
    hook.remove()
    assert torch.equal(logits_SBV, seen[0])
    torch.testing.assert_close(logits_SBV, hidden_SBD @ layer.weight.t())
    assert isinstance(layer(hidden_SBD)[0], Projection)
