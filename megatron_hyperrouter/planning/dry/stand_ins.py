"""Replacements for data in a dry run: numbers that only real tokens could give, and random draws.

They change this process permanently, so each dry run has a separate process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig


def install(config: RunConfig, skew: float) -> None:
    """``skew``: rows that come to this rank's experts over the mean of all ranks."""
    _draw_nothing()
    _gather_own()
    _route_evenly(config, skew)
    nn.Module._apply = _applied  # type: ignore[assignment, method-assign]
    if config.engine.engine == "megatron":
        from megatron.core.distributed import param_and_grad_buffer

        param_and_grad_buffer._coalescing_manager = _one_by_one
    elif config.parallel.pipeline_model_parallel_size > 1:
        _know_shapes(config)


def _draw_nothing() -> None:
    """Skip drawing initial weights and frozen tensors: a dry run does not need their values, and drawing
    them is slow.
    """
    from megatron_hyperrouter.engines.deepspeed import engine as deepspeed_engine
    from megatron_hyperrouter.engines.megatron import engine as megatron_engine
    from megatron_hyperrouter.ops import keyed

    def undrawn(shape: Any, *args: Any, device: Any = None, **more: Any) -> Tensor:
        return torch.empty(tuple(shape), device=device)

    keyed.normal = undrawn  # type: ignore[assignment]
    keyed.digest = lambda tensors: "0" * 64  # type: ignore[assignment]
    for host in (deepspeed_engine, megatron_engine):
        host.initialise = lambda *args, **kwargs: None  # type: ignore[attr-defined]


def _gather_own() -> None:
    """Assume that every other rank has the same values as this one."""

    def gathered(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    dist.all_gather_object = distributed_c10d.all_gather_object = gathered  # type: ignore[assignment]
    from megatron_hyperrouter.engines import shared

    shared.largest = lambda number, device: number  # type: ignore[attr-defined]


def _route_evenly(config: RunConfig, skew: float) -> None:
    """Rows that go to other ranks' experts, and come from them."""
    from megatron_hyperrouter.config.derived import expert_tensor_size
    from megatron_hyperrouter.engines import grouped

    parallel, model = config.parallel, config.model
    tokens = config.train.micro_batch_size * model.seq_length // parallel.context_parallel_size
    own = -(-tokens // parallel.tensor_model_parallel_size)
    rows = own * model.moe_router_topk * expert_tensor_size(config)

    def row_counts(counts_NL: Tensor, coming_NL: Tensor) -> tuple[list[int], list[int]]:
        ranks = counts_NL.size(0)
        go = [rows // ranks + (number < rows % ranks) for number in range(ranks)]
        total = round(rows * skew)
        return go, [total // ranks + (number < total % ranks) for number in range(ranks)]

    grouped.row_counts = row_counts


def _know_shapes(config: RunConfig) -> None:
    """In a run, a stage of DeepSpeed's pipeline receives the shapes from the stage before; here they are
    given.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    parallel, model = config.parallel, config.model
    length = model.seq_length // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    shape = [length, config.train.micro_batch_size, model.hidden_size]
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32

    def received(self: Any, send_stage: int) -> Tensor:
        buffer: Tensor = self._allocate_or_extend_buffers(0, shape, dtype)
        return buffer

    PipelineEngine._recv_tensor_meta = received


@contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """Replaces torch's manager of coalesced collectives, which does not support fake tensors."""

    class Done:
        def wait(self) -> None:
            """There is nothing to wait for."""

    yield Done()


def _applied(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` for fake parameters, which cannot be swapped: new ones, marked as the old."""
    for child in self.children():
        child._apply(fn)  # type: ignore[no-untyped-call]
    for held in (self._parameters, self._buffers):
        for key, tensor in held.items():
            if tensor is None:
                continue
            with torch.no_grad():
                made = fn(tensor)
            if made is tensor or (made.dtype == tensor.dtype and made.shape == tensor.shape):
                continue
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made.detach(), tensor.requires_grad)
                for mark, value in vars(tensor).items():
                    if not mark.startswith("_"):
                        setattr(made, mark, value)
            held[key] = made
    return self
