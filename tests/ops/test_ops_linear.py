"""The float32 map against torch's, bit for bit, and what it keeps for the way back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_hyperrouter.ops.linear import float32_linear

T, D, E = 40, 16, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_a_float32_copy(dtype: torch.dtype, bias: bool) -> None:
    x_TD = torch.randn(T, D).to(dtype).requires_grad_()
    parts = [x_TD, torch.randn(E, D, requires_grad=True)]
    parts += [torch.randn(E, requires_grad=True)] if bias else []
    probe_TE = torch.randn(T, E)
    ours, plain = float32_linear(*parts), F.linear(x_TD.float(), *parts[1:])
    assert ours.dtype == torch.float32 and torch.equal(ours, plain)
    found, wanted = (torch.autograd.grad((out * probe_TE).sum(), parts) for out in (ours, plain))
    assert all(map(torch.equal, found, wanted))


def test_keeps_the_input_as_it_came() -> None:
    kept: list[torch.Tensor] = []
    x_TD = torch.randn(T, D).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
        float32_linear(x_TD, torch.randn(E, D, requires_grad=True))
    assert [tensor.dtype for tensor in kept if tensor.shape == (T, D)] == [torch.bfloat16]
