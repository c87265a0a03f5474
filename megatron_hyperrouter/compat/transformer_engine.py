"""Whether this machine can use Transformer Engine, and what to report if it cannot.

Its CUDA kernels cannot run without a GPU, so the tests that train with it use a replacement.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata

import torch

from megatron_hyperrouter.console import warn
from megatron_hyperrouter.errors import HostError

OLDEST = (2, 1)  # with grouped matrices for experts, and fp8 recipes (megatron-core's fp8_utils.py:553)
OLDEST_FOR = {"tensorwise": (2, 2), "blockwise": (2, 3)}  # fp8 recipes that are newer (fp8_utils.py:560)


def implementation(wanted: str, *, bf16: bool, fp8: str | None = None) -> str:
    """``local`` or ``transformer_engine``, given ``--transformer-impl``; HostError if it is not available.

    ``auto`` leaves float32 to torch: Transformer Engine's fast attention needs 16 bits, and float32 is mainly
    for comparisons. ``fp8``: the recipe, where products are computed in fp8.
    """
    if wanted == "local" or (wanted == "auto" and not bf16):
        return "local"
    reason = obstacle(OLDEST_FOR.get(fp8 or "", OLDEST))
    if reason is None:
        warn(
            f"transformer-engine {_version()} was not tested; if something "
            "fails, use --transformer-impl local"
        )
        return "transformer_engine"
    if wanted == "transformer_engine" or fp8:
        needs = "--fp8-format" if fp8 else "--transformer-impl transformer_engine"
        without = "leave out --fp8-format" if fp8 else "use --transformer-impl local"
        raise HostError(
            f"{needs}: Transformer Engine {reason}",
            remedy=(
                "on a machine with GPUs, run: pip install --no-build-isolation "
                f"'transformer_engine[pytorch]'; otherwise {without}"
            ),
        )
    if present() and torch.cuda.is_available():
        warn(f"Transformer Engine {reason}; using the layers of PyTorch instead")
    return "local"


def obstacle(oldest: tuple[int, int] = OLDEST) -> str | None:
    """Why Transformer Engine cannot be used here; None if it can."""
    if not present():
        return "is not installed"
    if not torch.cuda.is_available():
        return "needs a GPU, but there is none"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:  # OSError: a CUDA library of another version
        return f"cannot be imported ({error})"
    version = _version()
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        return (
            f"{version} is older than {oldest[0]}.{oldest[1]}, the first version that supports these settings"
        )
    return None


def present() -> bool:
    """Whether an import would find it, without importing it."""
    return importlib.util.find_spec("transformer_engine") is not None


def _version() -> str:
    module = importlib.import_module("transformer_engine")
    return str(getattr(module, "__version__", None) or metadata.version("transformer-engine"))
