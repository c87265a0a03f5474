"""The hypernetwork, against plain-Python loops in float64, autograd and finite differences."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperrouter.ops.hypernet import active_units, generate, transposed

S, D, E, H = 5, 4, 3, 7  # embedding, hidden size, experts, hypernetwork width


def tensors(bias: bool = True, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(11)
    P = E * (D + bias)
    return [torch.randn(shape, generator=random, dtype=dtype) for shape in ((S,), (H, S), (H,), (P, H), (P,))]


def generate_loops(embedding, w1, b1, w2, b2, bias):
    """W2 relu(W1 e + b1) + b2, then rows of D numbers, each with its bias behind it."""
    hidden = [
        max(sum(w * e for w, e in zip(row, embedding, strict=True)) + b, 0.0)
        for row, b in zip(w1, b1, strict=True)
    ]
    u = [sum(w * h for w, h in zip(row, hidden, strict=True)) + b for row, b in zip(w2, b2, strict=True)]
    rows = [u[i * (D + bias) : (i + 1) * (D + bias)] for i in range(E)]
    return [row[:D] for row in rows], [row[D] for row in rows] if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_generate_against_loops(bias, columns):
    given = tensors(bias)
    W, b = generate_loops(*(tensor.double().tolist() for tensor in given), bias)
    if columns:  # W2 as the router keeps it in memory
        given[3] = given[3].t().contiguous().t()
    W_ED, b_E = generate(*given, E) if bias else generate(*given, E, bias=False)
    assert W_ED.is_contiguous()
    torch.testing.assert_close(W_ED, torch.tensor(W), rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(b_E, torch.tensor(b), rtol=1e-5, atol=1e-5)
    else:
        assert b_E is None


def test_public_argument_names():
    embedding, w1, b1, w2, b2 = tensors()
    by_name = generate(embedding_D=embedding, w1_HD=w1, b1_H=b1, w2_PH=w2, b2_P=b2, num_experts=E)
    W, b = generate_loops(*(tensor.double().tolist() for tensor in tensors()), True)
    for ours, loops in zip(by_name, (W, b), strict=True):
        torch.testing.assert_close(ours, torch.tensor(loops), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_pass_against_loops_and_autograd(bias):
    embedding, w1, b1, w2, b2 = tensors(bias, torch.float64)
    embedding.requires_grad_()
    W_ED, b_E = generate(embedding, w1, b1, w2, b2, E, bias=bias)
    grad_W = torch.randn(E, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad_b = torch.randn(E, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) if bias else None
    active = active_units(embedding.detach(), w1, b1)
    ours = transposed(grad_W, grad_b, active, w1, w2)

    grad_u = [
        value for i in range(E) for value in (*grad_W[i].tolist(), *([grad_b[i].item()] if bias else []))
    ]
    grad_hidden = [sum(w2[p, h].item() * grad_u[p] for p in range(len(grad_u))) for h in range(H)]
    inputs = [sum(w1[h, s].item() * embedding[s].item() for s in range(S)) + b1[h].item() for h in range(H)]
    loops = [sum(w1[h, s].item() * grad_hidden[h] for h in range(H) if inputs[h] > 0) for s in range(S)]
    assert ours.tolist() == pytest.approx(loops, rel=1e-12)

    outputs, gradients = ((W_ED, b_E), (grad_W, grad_b)) if bias else ((W_ED,), (grad_W,))
    (by_autograd,) = torch.autograd.grad(outputs, embedding, gradients)
    torch.testing.assert_close(ours, by_autograd, rtol=1e-12, atol=1e-12)
    assert 0 < int(active.sum()) < H  # the ReLU is at work


def test_gradient_of_generate_against_finite_differences():
    embedding, *frozen = tensors(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e: generate(e, *frozen, E), embedding.requires_grad_())


@pytest.mark.parametrize(("num_experts", "bias"), [(4, True), (15, True), (4, False)])
def test_numbers_that_do_not_divide(num_experts, bias):
    with pytest.raises(ValueError, match=f"must be num_experts = {num_experts} times"):
        generate(*tensors(), num_experts, bias=bias)
