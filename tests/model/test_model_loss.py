"""The language-model loss against torch's cross-entropy, and the sums that it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_hyperrouter.model.loss import UNCOUNTED, LanguageModelLoss

S, B, V = 5, 3, 11


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_mean_cross_entropy_and_counts_what_it_saw(dtype: torch.dtype) -> None:
    loss = LanguageModelLoss(torch.device("cpu"))
    bytes_V = torch.arange(V)
    total, count = 0.0, 0
    for number in range(2):
        logits_SBV = (3 * torch.randn(S, B, V)).to(dtype).requires_grad_()
        labels_BS = torch.randint(0, V, (B, S))
        loss.token_bytes_V = bytes_V if number else None
        value = loss(logits_SBV.clone(), labels_BS)
        expected = F.cross_entropy(logits_SBV.transpose(0, 1).flatten(0, 1).float(), labels_BS.flatten())
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        found, wanted = (
            torch.autograd.grad(value, logits_SBV)[0],
            torch.autograd.grad(expected, logits_SBV)[0],
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4 if dtype == torch.float32 else 2**-7, atol=1e-7)
        total += expected.item() * S * B
        count += int(labels_BS.sum()) if number else 0  # id n has n bytes here
    sums = loss.take()
    assert sums.tolist() == [pytest.approx(total, rel=1e-6), 2 * S * B, count]
    assert not loss.take().any()


@pytest.mark.usefixtures("groups")
def test_labels_that_do_not_count() -> None:
    """Scaled by positions over counted labels of all micro-batches, their mean is the mean over all labels
    that count.
    """
    loss, bytes_V = LanguageModelLoss(torch.device("cpu")), torch.arange(V)
    loss.token_bytes_V = bytes_V
    logits = [torch.randn(S, B, V, requires_grad=True) for _ in range(2)]
    labels = [torch.randint(1, V, (B, S)) for _ in range(2)]
    labels[0][0, 1:], labels[1][2, 0] = UNCOUNTED, UNCOUNTED
    counted = sum(int((part >= 0).sum()) for part in labels)
    loss.scale = torch.tensor(2 * B * S / counted)
    value = torch.stack([loss(x.clone(), part) for x, part in zip(logits, labels, strict=True)]).mean()
    pairs = [
        (x[s, b], part[b, s])
        for x, part in zip(logits, labels, strict=True)
        for b in range(B)
        for s in range(S)
        if part[b, s] >= 0
    ]
    expected = torch.stack([-x_V.log_softmax(0)[label] for x_V, label in pairs]).mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(
        torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert loss.take().tolist() == [
        pytest.approx(expected.item() * counted, rel=1e-6),
        counted,
        sum(int(label) for _, label in pairs),
    ]


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("samples", [1, B])
def test_a_loss_further_ahead_leaves_the_labels_alone(samples: int) -> None:
    logits_SBV, labels_BS = torch.randn(S, samples, V), torch.randint(0, V, (samples, S))
    before_BS = labels_BS.clone()
    found = LanguageModelLoss(torch.device("cpu")).ahead(logits_SBV.clone(), labels_BS, 2)
    wanted = F.cross_entropy(logits_SBV[:-2].flatten(0, 1), labels_BS.t()[:-2].flatten())
    torch.testing.assert_close(found, wanted)
    assert torch.equal(labels_BS, before_BS)
