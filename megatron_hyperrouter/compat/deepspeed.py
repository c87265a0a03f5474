"""Patches of DeepSpeed; tested with 0.19.8."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

TESTED = "0.19.8"


def skip_shm_build() -> None:
    """Start on CPU without compiling the shared-memory collectives.

    DeepSpeed 0.19.8, comm/torch.py:47 (``build_shm_op``), called by ``TorchBackend``: on CPU it compiles an
    extension for 77 s at the first start, and a build that was killed leaves a lock file on which every later
    run hangs in silence.  gloo does the work instead. Call it before DeepSpeed's own ``init_distributed``.
    """
    if torch.cuda.is_available():
        return
    # `import deepspeed.comm.torch as x` would bind the real torch: the package re-exports that name.
    setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", _no_shm_op)  # noqa: B010


def shape_gathered_tokens() -> None:
    """Gather the slots of experts over TP ranks into a buffer that gloo accepts.

    DeepSpeed 0.19.8, moe/mappings.py:39 (``_gather_tokens``) passes a flat output to
    all_gather_into_tensor; gloo needs ``(ranks * rows, ...)``.
    """
    if torch.cuda.is_available():
        return
    setattr(importlib.import_module("deepspeed.moe.mappings"), "_gather_tokens", _gather_tokens)  # noqa: B010


def patches() -> list[str]:
    """Names of the functions here that act on this machine."""
    return [] if torch.cuda.is_available() else [skip_shm_build.__name__, shape_gathered_tokens.__name__]


def _gather_tokens(x: Tensor, dim: int = 0) -> Tensor:
    import deepspeed
    from deepspeed.utils import bwc, groups

    x = x.contiguous()
    ranks = bwc.bwc_tensor_model_parallel_world_size(groups.mpu)
    if ranks == 1:
        return x
    gathered = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    deepspeed.comm.all_gather_into_tensor(gathered, x, group=bwc.bwc_tensor_model_parallel_group(groups.mpu))
    return gathered if dim == 0 else torch.cat(gathered.chunk(ranks, 0), dim=dim).contiguous()


def _no_shm_op() -> None:
    return None
