"""Patches of DeepSpeed; tested with 0.19.8."""

from __future__ import annotations

import importlib

import torch

TESTED = "0.19.8"


def skip_shm_build() -> None:
    """Start on CPU without compiling the shared-memory collectives.

    DeepSpeed 0.19.8, comm/torch.py:33 (``build_shm_op``), called by ``TorchBackend``: on CPU it compiles an extension for 77 s at the
    first start, and a build that was killed leaves a lock file on which every later run hangs in silence.  gloo does the work instead.
    Call it before DeepSpeed's own ``init_distributed``.
    """
    if torch.cuda.is_available():
        return
    # `import deepspeed.comm.torch as x` would bind the real torch: the package re-exports that name.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = _no_shm_op


def _no_shm_op() -> None:
    return None
