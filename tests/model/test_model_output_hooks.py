"""DeepSpeed's hooks on what a model returns clear gradients; the output matrix must keep its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.utils import register_output_backward_hooks
from torch import nn

from megatron_hyperrouter.engines.deepspeed.layers import seen_by_hooks
from megatron_hyperrouter.model.output import Projection, token_losses

TOKENS, HIDDEN, VOCABULARY = 6, 4, 10

pytestmark = pytest.mark.usefixtures("groups")


def gradient(prepared: Callable[[Projection], object], *, clears: bool) -> torch.Tensor:
    """The gradient of the output matrix where the first hook that fires sets it to zero, as in bfloat16."""
    draws = torch.Generator().manual_seed(0)
    weight_VD = nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=draws))
    hidden_SBD = torch.randn(TOKENS, 1, HIDDEN, generator=draws).requires_grad_() * 1.0
    labels_T = torch.randint(VOCABULARY, (TOKENS,), generator=draws)
    weight_VD.grad = torch.zeros_like(weight_VD)
    made = prepared(Projection(hidden_SBD, weight_VD))
    assert isinstance(made, Projection)
    if clears:
        manager = register_output_backward_hooks(made, weight_VD.grad.zero_)
        assert manager.hook_handles
    token_losses(made, labels_T)[0].backward()
    return weight_VD.grad


def test_the_gradient_outlives_the_hook() -> None:
    expected = gradient(seen_by_hooks, clears=False)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient(seen_by_hooks, clears=True), expected, rtol=0, atol=0)


def test_a_leaf_would_lose_it() -> None:
    """Where this fails, DeepSpeed hooks leaves too and ``seen_by_hooks`` is needless."""
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            gradient(lambda made: made, clears=True), gradient(lambda made: made, clears=False)
        )
