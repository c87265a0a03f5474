"""Patches of megatron-core with which it trains on a CPU with gloo, and without Transformer Engine.

Tested with 0.16.1 and 0.19.2; files and lines are those of 0.16.1.

The CPU patches do nothing if there is a GPU.  The patches change calls that would raise an error,
or make a GPU wait. One patch (``turn_in_few_operators``) rounds rotary positions differently.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.compat.rotary import turned_by_table

TESTED = "0.16.1"  # Python 3.10 and 3.11 have no newer one
ALSO_TESTED = "0.19.2"  # for Python >= 3.12
_CPU = torch.device("cpu")


def install() -> None:
    """Apply the patches that this machine needs; idempotent.  Call it before a model is built."""
    for always in _everywhere():
        always()
    if torch.cuda.is_available() or getattr(torch.cuda, "_hyperrouter_cpu", False):
        return
    for patch in _without_gpu():
        patch()
    torch.cuda._hyperrouter_cpu = True  # type: ignore[attr-defined]


def import_without_compiler() -> None:
    """Import megatron-core, on a CPU without torch's compiler.

    The host imports the compiler (jit.py:21), which takes more time than everything else, although
    :func:`run_helpers_eagerly` then turns it off.
    """
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    compiler = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compiler


def _as_it_is(function: Any = None, **_: object) -> Any:
    """Replaces ``torch.compile``, called directly or used as a decorator with arguments."""
    return _as_it_is if function is None else function


def version() -> tuple[int, ...]:
    """The version of the installed megatron-core; a checkout without metadata counts as the oldest."""
    try:
        found = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return ()
    return tuple(map(int, re.findall(r"\d+", found)[:3]))


def patches() -> list[str]:
    """Names of the functions here that :func:`install` calls on this machine."""
    found = _everywhere() if torch.cuda.is_available() else (*_everywhere(), *_without_gpu())
    return [patch.__name__ for patch in found]


def _everywhere() -> tuple[Callable[[], None], ...]:
    return (
        count_predictions_of_logits if version() >= (0, 19) else name_te_general_gemm,
        keep_adam_step,
        keep_norms_on_device,
        scale_all_at_once,
        turn_in_few_operators,
    )


def _without_gpu() -> tuple[Callable[[], None], ...]:
    return (
        serve_cuda_calls,
        serve_cuda_devices,
        serve_random_state,
        serve_splits,
        serve_unequal_shards,
        run_helpers_eagerly,
    )


def serve_cuda_calls() -> None:
    """``torch.cuda`` calls that are made unconditionally (tensor_parallel/random.py:235,
    rotary_pos_embedding.py:162, p2p, DDP streams).
    """
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,  # used as device=torch.cuda.current_device()
        "synchronize": lambda *args, **kwargs: None,
        "Stream": InOrder,
        "Event": InOrder,
        "current_stream": lambda *args: InOrder(),
        "default_stream": lambda *args: InOrder(),
        "stream": lambda *args: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


class InOrder:
    """Replaces a CUDA stream or event: on the CPU, all work is done when a call returns, so there is
    nothing to wait for.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Accept the arguments of a stream, and ignore them."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InOrder)

    __hash__ = object.__hash__

    def nothing(self, *args: object) -> None:
        """Do nothing: the work of every stream is already done."""

    wait_stream = wait_event = record = wait = synchronize = nothing

    def record_event(self, event: object = None) -> InOrder:
        """An event that has already happened."""
        return InOrder()

    def query(self) -> bool:
        """True: the work is done."""
        return True


def serve_cuda_devices() -> None:
    """``device="cuda"`` literals and CUDA type names (optimizer.py:907, transformer/utils.py:35,
    clip_grads.py:167).

    Not a TorchFunctionMode: a mode is off inside ``Tensor.backward()``, and so during activation
    recomputation.
    """
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    tensor_type = torch.Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor_type(self, *args, **kwargs)
        # megatron's optimizers accept only 'torch.cuda.*Tensor', so only they get these names.
        if isinstance(found, str) and sys._getframe(1).f_globals.get("__name__", "").startswith(
            "megatron.core.optimizer"
        ):
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        asked = kwargs.get("device")
        if isinstance(asked, str | torch.device) and str(asked).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return made


def serve_random_state() -> None:
    """The tracker of random states keeps them in the CUDA generator (tensor_parallel/random.py:55).

    Dropout on the CPU uses the default generator, so that one is switched.  The host sets states through
    ``_lazy_call``, which never runs without CUDA.
    """
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(_not_about_cpu_state)


def _not_about_cpu_state(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def serve_splits() -> None:
    """The dispatcher converts split sizes to numpy only if they are on a GPU (moe_utils.py:1092);
    mappings.py:444 refuses tensors.
    """
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy


def serve_unequal_shards() -> None:
    """gloo's all_gather and reduce_scatter need equal shards; MoE with expert-TP > 1 has unequal ones
    (mappings.py:150, 192).
    """
    dist.all_gather = functools.partial(_all_gather, dist.all_gather)
    dist.reduce_scatter = functools.partial(_reduce_scatter, dist.reduce_scatter)
    torch.distributed.all_gather, torch.distributed.reduce_scatter = dist.all_gather, dist.reduce_scatter


def run_helpers_eagerly() -> None:
    """The host compiles small helpers (jit.py:21): correct on CPU, but 15 s of compiler at the first step.

    Where the compiler was not imported, nothing is compiled, and importing it would take a second.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _all_gather(
    host: Callable[..., Any],
    tensor_list: list[Tensor],
    tensor: Tensor,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    if len({piece.shape for piece in tensor_list}) == 1:
        return host(tensor_list, tensor, group=group, async_op=async_op)
    longest = max(piece.shape[0] for piece in tensor_list)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    buffers = [torch.empty_like(padded) for _ in tensor_list]
    host(buffers, padded, group=group)
    for piece, buffer in zip(tensor_list, buffers, strict=True):
        piece.copy_(buffer[: piece.shape[0]])
    return None


def _reduce_scatter(
    host: Callable[..., Any],
    output: Tensor,
    input_list: list[Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    if len({piece.shape for piece in input_list}) == 1:
        return host(output, input_list, op=op, group=group, async_op=async_op)
    whole = torch.cat([piece.contiguous() for piece in input_list])
    dist.all_reduce(whole, op=op, group=group)
    output.copy_(whole.split([piece.shape[0] for piece in input_list])[dist.get_rank(group)])
    return None


def name_te_general_gemm() -> None:
    """Before 0.19, moe_utils.py:1192 reads ``te_general_gemm``, a name that is bound only where Transformer
    Engine imports.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def count_predictions_of_logits() -> None:
    """In 0.19, multi_token_prediction.py:523 counts the right predictions, for a log that is not ours; our
    output matrix gives the two factors of the logits instead.
    """
    from megatron.core.transformer import multi_token_prediction

    host = getattr(multi_token_prediction, "_compute_mtp_acceptance_counts", None)
    if host is None or getattr(host, "_hyperrouter", False):
        return

    def counts(logits: Any, labels_BS: Tensor, *more: Any, **named: Any) -> Any:
        if torch.is_tensor(logits):
            return host(logits, labels_BS, *more, **named)
        zero = torch.zeros((), device=labels_BS.device)
        return zero, zero

    counts._hyperrouter = True  # type: ignore[attr-defined]
    multi_token_prediction._compute_mtp_acceptance_counts = counts


def keep_adam_step() -> None:
    """Resuming the distributed optimizer with torch's AdamW, which keeps a ``step`` tensor for each
    parameter.

    distrib_optimizer.py:825 gives all parameters one and the same tensor, so AdamW would advance it once for
    each; :940 copies every key of the state from the checkpoint, which stores no ``step`` for each parameter.
    Needed wherever apex and TE are missing.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    host = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(host, "_hyperrouter", False):
        return

    def set_states(self: Any, model_param: Any, tensors: dict[str, Tensor]) -> Any:
        group_index, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        return host(self, model_param, tensors)

    set_states._hyperrouter = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def keep_norms_on_device() -> None:
    """Without apex and TE, the host reads the norm of each gradient separately (utils.py:1206), and a GPU
    waits for each read; torch's own function reads none.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def scale_all_at_once() -> None:
    """Without apex and TE, the host clips gradients one by one, and copies each (utils.py:1212)."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """``tensor_lists``: the sources and the results, which the host gives as the same gradients."""
    sources, results = tensor_lists
    if sources is not results:
        torch._foreach_copy_(results, sources)
    torch._foreach_mul_(results, factor)


def turn_in_few_operators() -> None:
    """Without TE, the host uses ten operators in each pass for rotary positions, and computes cosines and
    sines again in each layer (rope_utils.py:122).
    """
    from megatron.core.models.common.embeddings import rope_utils

    host = rope_utils._apply_rotary_pos_emb_bshd
    if getattr(host, "_hyperrouter", False):
        return

    # ``ways``: of taking pairs of channels; their names depend on the version
    def turned(t: Tensor, freqs: Tensor, *, mscale: float = 1.0, **ways: bool | None) -> Tensor:
        if any(ways.values()) or freqs.size(-1) != t.size(-1):
            other: Tensor = host(t, freqs, mscale=mscale, **ways)
            return other
        return turned_by_table(t, freqs, mscale)

    turned._hyperrouter = True  # type: ignore[attr-defined]
    rope_utils._apply_rotary_pos_emb_bshd = turned


def _l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, None]:
    """``[1]``, float32, where the gradients are."""
    (gradients,) = tensor_lists
    return torch.nn.utils.get_total_norm(gradients).float().view(1), None
