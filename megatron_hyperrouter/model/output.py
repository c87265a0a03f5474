"""The output matrix and cross-entropy in one function over chunks of tokens: all logits never exist at once.

Legend: ``S`` sequence, ``B`` batch, ``T = S * B`` tokens, ``D`` hidden size, ``V`` vocabulary on this
tensor-parallel rank, ``C`` tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_hyperrouter.model.classifier import Classifier, Head, Headed

_CHUNK_NUMBERS = 1 << 26  # float32 logits at a time, 256 MiB; but see below
_LEAST_TOKENS = 256  # of a chunk: each adds to the gradient of the whole matrix


class Projection(NamedTuple):
    """The two factors of the logits, for :func:`token_losses`."""

    hidden_SBD: Tensor  # of all tokens, on every tensor-parallel rank
    weight_VD: Tensor  # this rank's rows


class OutputLayer(ColumnParallelLinear):
    """Passes the factors of the logits to the loss.  If its output has a forward hook, it computes the
    logits instead.
    """

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor | Projection, Tensor | None]:
        """Like the host's layer, except for the result."""
        if self._forward_hooks:
            made: tuple[Tensor, Tensor | None] = super().forward(input_, weight, runtime_gather_output)
            return made
        if self.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(input_)
        else:
            hidden_SBD = copy_to_tensor_model_parallel_region(input_)
        return Projection(hidden_SBD, self.weight if weight is None else weight), None


class ClassOutput(nn.Module):
    """Fills the output slot of both hosts; passes its factors to the loss, as :class:`OutputLayer` does."""

    sequence_parallel = False  # to the host: nothing is left to gather

    def __init__(self, config: TransformerConfig, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = Head(config.hidden_size, classifier, config.params_dtype)
        self._cut = config.sequence_parallel

    def forward(self, input_: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Headed, None]:
        """``input_``: ``_SBD``, or this tensor-parallel rank's part of the positions."""
        # Every rank computes the whole loss, so each keeps its own part of the gradient.
        hidden_SBD = (
            gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False)
            if self._cut
            else input_
        )
        return Headed(hidden_SBD, self.classifier), None


def token_losses(projection: Projection, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum, losses_T)`` of the labels that are not negative, float32; only the sum has a gradient.

    The forward pass already computes the gradients of both factors, so nothing is computed twice.
    """
    hidden_TD, weight_VD = projection.hidden_SBD.flatten(0, 1), projection.weight_VD
    wanted = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    total, losses_T = _Losses.apply(hidden_TD, weight_VD, labels_T, wanted)  # type: ignore[no-untyped-call]
    return total, losses_T


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of a chunk."""
    return max(_CHUNK_NUMBERS // vocabulary, _LEAST_TOKENS)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        size = chunk_tokens(weight_VD.size(0))
        losses, slopes_TD = [], []
        grad_VD: Tensor | None = None
        for rows_CD, labels_C in zip(hidden_TD.split(size), labels_T.split(size), strict=True):
            losses_C, slope_CV = _chunk(rows_CD, weight_VD, labels_C, wanted)
            losses.append(losses_C)
            if slope_CV is not None:
                slopes_TD.append(slope_CV @ weight_VD)  # under tensor parallelism a summand, as of any linear
                grad_VD = _added(grad_VD, slope_CV.t() @ rows_CD, last=len(hidden_TD) <= size)
            del slope_CV  # before the logits of the next chunk are made
        losses_T = torch.cat(losses)
        if grad_VD is not None:
            ctx.save_for_backward(torch.cat(slopes_TD), grad_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(losses_T)
        return losses_T.sum(), losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_VD = ctx.saved_tensors
        return _times(grad_TD, grad), _times(grad_VD, grad), None, None


def _times(part: Tensor, factor: Tensor) -> Tensor:
    """Computed in float32: a factor that is rounded to bfloat16 would change all numbers by up to 0.2 %."""
    return torch.mul(part, factor.view(1), out=torch.empty_like(part))


def _chunk(
    rows_CD: Tensor, weight_VD: Tensor, labels_C: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses, and the gradient of the logits in the rows' dtype."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    logits_CV = (rows_CD @ weight_VD.t()).float()
    if ranks == 1 and not wanted:
        labels_C = labels_C.clamp(min=-1)
        return F.cross_entropy(logits_CV, labels_C, ignore_index=-1, reduction="none"), None
    top_C = logits_CV.amax(1)
    if ranks > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
    own_C = labels_C - parallel_state.get_tensor_model_parallel_rank() * weight_VD.size(0)
    here_C = (own_C >= 0) & (own_C < weight_VD.size(0))
    column_C1 = own_C.clamp(0, weight_VD.size(0) - 1).unsqueeze(1)
    picked_C = torch.where(here_C, logits_CV.gather(1, column_C1).squeeze(1) - top_C, 0.0)
    powers_CV = logits_CV.sub_(top_C.unsqueeze(1)).exp_()
    total_C = powers_CV.sum(1)
    if ranks > 1:
        both_2C = torch.stack((picked_C, total_C))
        dist.all_reduce(both_2C, group=group)
        picked_C, total_C = both_2C
    counted_C = labels_C >= 0
    losses_C = torch.where(counted_C, total_C.log() - picked_C, 0.0)
    if not wanted:
        return losses_C, None
    slope_CV = powers_CV.mul_((counted_C / total_C).unsqueeze(1))
    slope_CV.scatter_add_(1, column_C1, -(here_C & counted_C).to(slope_CV.dtype).unsqueeze(1))
    return losses_C, slope_CV.to(rows_CD.dtype)


def _added(sum_VD: Tensor | None, part_VD: Tensor, *, last: bool) -> Tensor:
    """In float32 where there are several parts."""
    if sum_VD is None:
        return part_VD if last else part_VD.float()
    return sum_VD.add_(part_VD)
