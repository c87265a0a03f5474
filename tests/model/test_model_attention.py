"""Core attention, against a plain softmax over each query's past.

Legend: ``S`` sequence, ``B`` batch, ``N`` query heads, ``G`` key/value heads, ``C`` channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_hyperrouter.config.tree import ModelConfig, RunConfig
from megatron_hyperrouter.model.attention.core import ScaledDotProductAttention, one_for_each_head, visible
from megatron_hyperrouter.model.attention.documents import turned_back
from megatron_hyperrouter.model.spec import transformer_config

S, B, C = 7, 2, 6
RATES_R = 100.0 ** (-torch.arange(0, C, 2) / C)


def attention(
    heads: int, groups: int, *, recompute: bool = False, dropout: float = 0.0
) -> ScaledDotProductAttention:
    sizes = ModelConfig(
        hidden_size=heads * C, num_attention_heads=heads, num_query_groups=groups, attention_dropout=dropout
    )
    return ScaledDotProductAttention(
        transformer_config(RunConfig(model=sizes)), 1, AttnMaskType.causal, recompute=recompute
    )


def inputs(heads: int, groups: int) -> list[Tensor]:
    return [torch.randn(S, B, count, C, requires_grad=True) for count in (heads, groups, groups)]


def by_loop(query_SBNC: Tensor, key_SBGC: Tensor, value_SBGC: Tensor, length: int = S) -> Tensor:
    heads, groups = query_SBNC.size(2), key_SBGC.size(2)
    rows = []
    for s in range(length):
        for b in range(B):
            for head in range(heads):
                group = head // (heads // groups)
                scores = torch.stack(
                    [query_SBNC[s, b, head] @ key_SBGC[t, b, group] for t in range(s + 1)]
                ) / math.sqrt(C)
                shares = (scores - scores.max()).exp()
                rows.append((shares / shares.sum()) @ value_SBGC[: s + 1, b, group])
    return torch.stack(rows).view(length, B, heads * C)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_is_a_softmax_over_the_past(heads: int, groups: int, recompute: bool) -> None:
    given = inputs(heads, groups)
    output, expected = attention(heads, groups, recompute=recompute)(*given), by_loop(*given)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(output)
    for found, wanted in zip(
        torch.autograd.grad((output * probe).sum(), given),
        torch.autograd.grad((expected * probe).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_recompute_runs_again_in_the_backward_pass_and_keeps_dropout() -> None:
    given = inputs(4, 2)
    gradients = []
    for recompute in (False, True):
        module, runs = attention(4, 2, recompute=recompute, dropout=0.4), []
        attend: Callable[..., Tensor] = module._attend
        module._attend = lambda *x, runs=runs, attend=attend: runs.append(1) or attend(*x)  # type: ignore[method-assign,misc,func-returns-value]
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(module(*given).sum(), given))
        assert len(runs) == 1 + recompute
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_dropout_is_for_training_alone() -> None:
    given, module = inputs(4, 4), attention(4, 4, dropout=0.5)
    assert not torch.equal(module(*given), module(*given))
    module.eval()
    torch.testing.assert_close(module(*given), by_loop(*given), rtol=1e-5, atol=1e-6)


def test_what_is_not_provided_is_refused() -> None:
    module, given = attention(4, 4), inputs(4, 4)
    mask: Any = torch.ones(1, 1, S, S, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="masks"):
        module(*given, attention_mask=mask)
    with pytest.raises(NotImplementedError, match="attention mask"):
        ScaledDotProductAttention(module.config, 1, AttnMaskType.padding)
    with pytest.raises(NotImplementedError, match="packed"):
        module(*given, packed_seq_params=SimpleNamespace())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_visible_keys_of_a_context_parallel_rank(size: int) -> None:
    """Rank r holds slices r and 2 size - 1 - r of 2 size; keys come gathered in the order of the ranks."""
    half = 3
    held = [
        [*range(r * half, (r + 1) * half), *range((2 * size - 1 - r) * half, (2 * size - r) * half)]
        for r in range(size)
    ]
    assert sorted(position for part in held for position in part) == list(range(2 * half * size))
    for rank in range(size):
        expected = [[key <= query for part in held for key in part] for query in held[rank]]
        assert visible(2 * half, rank, size, torch.device("cpu")).tolist() == expected


@pytest.mark.parametrize("recompute", [False, True])
def test_stays_within_documents_whatever_the_origin_of_positions(recompute: bool) -> None:
    """Each document by itself gives the same as all of them in one sample; so rotary positions need no reset
    there.
    """
    starts_BS = torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 5, 5]])
    given = inputs(4, 2)
    module = attention(4, 2, recompute=recompute)
    module.next_starts = lambda: starts_BS
    output = module(*given)
    plain = attention(4, 2)
    for b in range(B):
        for start in starts_BS[b].unique().tolist():
            inside = starts_BS[b] == start
            alone = plain(*(x[inside, b : b + 1] for x in given))
            torch.testing.assert_close(output[inside, b], alone[:, 0], rtol=1e-5, atol=1e-6)
    # The same queries and keys with positions counted from the beginning of their documents
    turned = [turned_back(x, starts_BS.t(), RATES_R) for x in given[:2]]
    torch.testing.assert_close(module(*turned, given[2]), output, rtol=1e-5, atol=1e-5)
    assert (
        plain(*turned, given[2]) - plain(*given)
    ).abs().max() > 1e-2  # where attention crosses documents it matters
    probe = torch.randn_like(output)
    again = module(*given)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad((again * probe).sum(), given))


def test_positions_alone_start_anew() -> None:
    starts_BS = torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 1, 1, 1, 1, 5, 5]])
    query, key, value = inputs(4, 2)
    module = attention(4, 2)
    module.next_starts, module.rates_R = (lambda: starts_BS), RATES_R
    expected = by_loop(
        turned_back(query, starts_BS.t(), RATES_R), turned_back(key, starts_BS.t(), RATES_R), value
    )
    torch.testing.assert_close(module(query, key, value), expected, rtol=1e-5, atol=1e-5)
    assert (expected - by_loop(query, key, value)).abs().max() > 1e-2


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repeated_keys_are_those_of_each_heads_group(groups: int) -> None:
    """What a GPU is given where its kernels take no groups of heads."""
    key_BGSC = torch.randn(B, groups, S, C)
    repeated_BNSC = one_for_each_head(key_BGSC, 4)
    assert all(torch.equal(repeated_BNSC[:, head], key_BGSC[:, head // (4 // groups)]) for head in range(4))


@pytest.mark.parametrize("window", [0, 2, 6, 50])
def test_a_window_hides_what_is_too_far_back(window: int) -> None:
    given = inputs(4, 2)
    module = attention(4, 2)
    module.window = window
    expected = [
        by_loop(*(x[max(0, s - window) :] for x in given), length=min(s, window) + 1)[-1] for s in range(S)
    ]
    torch.testing.assert_close(module(*given), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_scores_take_the_scale_that_is_given_and_values_have_their_own_width() -> None:
    query, key, value = inputs(4, 4)
    module, wide = attention(4, 4), torch.cat([value, 2 * value], -1)
    module.softmax_scale = 2 / math.sqrt(C)
    expected = by_loop(2 * query, key, value)
    doubled = module(query, key, wide).view(S, B, 4, 2 * C)
    torch.testing.assert_close(doubled[..., :C].flatten(2), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(doubled[..., C:].flatten(2), 2 * expected, rtol=1e-5, atol=1e-6)
