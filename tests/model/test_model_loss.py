"""The language-model loss against torch's cross-entropy, and the sums that it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_hyperrouter.model.loss import LanguageModelLoss

S, B, V = 5, 3, 11


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_mean_cross_entropy_and_counts_what_it_saw(dtype: torch.dtype) -> None:
    loss = LanguageModelLoss()
    bytes_V = torch.arange(V)
    total, count = 0.0, 0
    for number in range(2):
        logits_SBV = (3 * torch.randn(S, B, V)).to(dtype).requires_grad_()
        labels_BS = torch.randint(0, V, (B, S))
        loss.token_bytes_V = bytes_V if number else None
        value = loss(logits_SBV.clone(), labels_BS)
        expected = F.cross_entropy(logits_SBV.transpose(0, 1).flatten(0, 1).float(), labels_BS.flatten())
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        found, wanted = torch.autograd.grad(value, logits_SBV)[0], torch.autograd.grad(expected, logits_SBV)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4 if dtype == torch.float32 else 2**-7, atol=1e-7)
        total += expected.item() * S * B
        count += int(labels_BS.sum()) if number else 0  # id n has n bytes here
    sums = loss.take()
    assert sums.tolist() == [pytest.approx(total, rel=1e-6), 2 * S * B, count]
    assert not loss.take().any()
