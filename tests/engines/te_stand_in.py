"""A stand-in for Transformer Engine on machines without a GPU: its classes, arguments and parameter
names, computed by torch.

Written after the calls that megatron-core 0.16.1 and 0.19.2 make (extensions/transformer_engine.py).  It
claims to be version 2.1. ``partition_dim`` is wrong on the second matrix of experts that are cut, as in the
original, which knows nothing of their parallelism.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from engines import te_fused
from torch import Tensor, nn


def matrix(rows: int, columns: int, dim: int, **made: Any) -> nn.Parameter:
    """A weight, filled with a number that no test survives, marked as Transformer Engine marks it."""
    weight = nn.Parameter(torch.full((rows, columns), 1e3, dtype=made["params_dtype"], device=made["device"]))
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1  # type: ignore[attr-defined]
    return weight


FP8: list[Any] = []  # recipes of the contexts that are open, innermost last


def rounded(x: Tensor) -> Tensor:
    """To e4m3 within a context of fp8, with a gradient as if it were not."""
    if not FP8 or FP8[-1] is None:
        return x
    return x + (x.detach().to(torch.float8_e4m3fn).to(x.dtype) - x.detach())


def scale(length: int, sequence_parallel: bool, **made: Any) -> nn.Parameter:
    """A norm's weight."""
    weight = nn.Parameter(torch.full((length,), 1e3, dtype=made["params_dtype"], device=made["device"]))
    weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    return weight


class Stateful(nn.Module):
    """Has the state that Transformer Engine keeps for 8-bit floats, which is empty without them."""

    fp8 = fp8_calibration = False
    fp8_meta = {"fp8_checkpoint": False}  # noqa: RUF012

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass


class Linear(Stateful):
    def __init__(
        self, *, in_features: int, out_features: int, parallel_mode: str | None, tp_size: int,
        tp_group: Any, sequence_parallel: bool,
        bias: bool, return_bias: bool, init_method: Any, **made: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert not bias and not return_bias
        self.accumulates = made["fuse_wgrad_accumulation"]
        self.mode, self.group, self.sequence = (
            parallel_mode if tp_size > 1 else None,
            tp_group,
            sequence_parallel,
        )
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
        self.weight = matrix(out_features, in_features, 1 if parallel_mode == "row" else 0, **made)
        init_method(self.weight)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.mode == "column":
            into = (
                mappings.gather_from_sequence_parallel_region
                if self.sequence
                else mappings.copy_to_tensor_model_parallel_region
            )
            x = into(x, group=self.group)
        x = te_fused.product(rounded(x), rounded(self.weight), self.weight, into_main_grad=self.accumulates)
        if self.mode == "row":
            to = (
                mappings.reduce_scatter_to_sequence_parallel_region
                if self.sequence
                else mappings.reduce_from_tensor_model_parallel_region
            )
            x = to(x, group=self.group)
        return x


class LayerNormLinear(Linear):
    def __init__(
        self,
        *,
        eps: float,
        normalization: str,
        zero_centered_gamma: bool,
        return_layernorm_output: bool,
        **made: Any,
    ) -> None:
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output
        super().__init__(**made)
        self.eps = eps
        self.layer_norm_weight = scale(made["in_features"], **made)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        *,
        hidden_size: int | None = None,  # its name in megatron-core 0.16.1
        eps: float,
        zero_centered_gamma: bool,
        **made: Any,
    ) -> None:
        super().__init__()
        length = hidden_size if normalized_shape is None else normalized_shape
        assert length is not None and not zero_centered_gamma
        self.eps = eps
        self.weight = scale(length, **made)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class GroupedLinear(Stateful):
    def __init__(
        self, *, num_gemms: int, in_features: int, out_features: int, tp_size: int, bias: bool,
        init_method: Any,
        parallel_mode: str | None, **made: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert tp_size == 1 and not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        self.accumulates = made["fuse_wgrad_accumulation"]
        for number in range(num_gemms):
            self.register_parameter(
                f"weight{number}",
                matrix(out_features, in_features, 1 if parallel_mode == "row" else 0, **made),
            )
            init_method(self.get_parameter(f"weight{number}"))

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        weights = [self.get_parameter(f"weight{number}") for number in range(self.num_gemms)]
        return torch.cat(
            [
                te_fused.product(rounded(part), rounded(weight), weight, into_main_grad=self.accumulates)
                for part, weight in zip(x.split(m_splits), weights, strict=True)
            ]
        )


class DotProductAttention(Stateful):
    def __init__(
        self,
        *,
        attn_mask_type: str,
        attention_dropout: float,
        num_gqa_groups: int,
        kv_channels: int,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == "causal" and isinstance(kv_channels, int) and "cp_group" not in _
        self.dropout, self.groups = attention_dropout, num_gqa_groups

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, attn_mask_type: str
    ) -> Tensor:
        assert attention_mask is None and attn_mask_type == "causal"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, dropout_p=self.dropout
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class Tracker:
    """Of random states; nothing here draws from it."""


def install(*, apex: bool = False) -> None:
    """Make ``import transformer_engine`` find this; before megatron-core is imported.  ``apex``: its
    extension too.
    """
    if apex:
        sys.modules["fused_weight_gradient_mlp_cuda"] = te_fused.apex()
    parts = (
        "common common.recipe pytorch pytorch.attention pytorch.distributed pytorch.fp8 "
        "pytorch.float8_tensor pytorch.cpp_extensions pytorch.ops pytorch.permutation pytorch.tensor "
        "pytorch.tensor.float8_tensor"
    ).split()
    names = ["transformer_engine", *(f"transformer_engine.{part}" for part in parts)]
    for name in names:
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    te = sys.modules["transformer_engine"]
    te.__version__ = "2.1.0"  # type: ignore[attr-defined]
    given: dict[str, list[Any]] = {
        "pytorch": [
            Fp8Padding,
            Fp8Unpadding,
            Linear,
            LayerNormLinear,
            RMSNorm,
            GroupedLinear,
            DotProductAttention,
        ],
        "pytorch.attention": [te_fused.apply_rotary_pos_emb],
        "pytorch.permutation": [
            te_fused.moe_permute,
            te_fused.moe_permute_with_probs,
            te_fused.moe_unpermute,
            te_fused.moe_sort_chunks_by_index,
            te_fused.moe_sort_chunks_by_index_with_probs,
        ],
        "common.recipe": [Format, DelayedScaling, MXFP8BlockScaling],
        "pytorch.ops": [type("Sequential", (), {}), type("FusibleOperation", (), {})],
        "pytorch.tensor": [type("QuantizedTensor", (), {})],
        "pytorch.distributed": [type("CudaRNGStatesTracker", (Tracker,), {}), activation_recompute_forward],
        "pytorch.fp8": [type("FP8GlobalStateManager", (), {}), fp8_autocast, fp8_model_init],
        "pytorch.cpp_extensions": [cast_to_fp8],
        "pytorch.tensor.float8_tensor": [type("Float8Tensor", (), {})],
    }
    sys.modules["transformer_engine.pytorch"].fp8_autocast = fp8_autocast  # type: ignore[attr-defined]
    for name, things in given.items():
        for thing in things:
            setattr(sys.modules[f"transformer_engine.{name}"], thing.__name__, thing)


def cast_to_fp8(*args: Any) -> None:
    raise NotImplementedError


def fp8_model_init(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError


@contextlib.contextmanager
def activation_recompute_forward(*args: Any, **kwargs: Any) -> Any:
    yield


class Fp8Padding(nn.Module):
    """Rows of zeros after those of each expert, up to a multiple of ``align_size``, given by 0.19.2 alone."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size or 16

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        sizes = [-(-size // self.align_size) * self.align_size for size in m_splits]
        parts = [
            F.pad(part, (0, 0, 0, size - len(part)))
            for part, size in zip(x.split(m_splits), sizes, strict=True)
        ]
        return torch.cat(parts), sizes


class Fp8Unpadding(nn.Module):
    """Takes them away again."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size or 16

    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:
        parts = x.split([-(-size // self.align_size) * self.align_size for size in m_splits])
        return torch.cat([part[:size] for part, size in zip(parts, m_splits, strict=True)])


class Format:
    """Of 8-bit floats: forwards and backwards."""

    E4M3, HYBRID = "e4m3", "hybrid"


class MXFP8BlockScaling:
    """Scales by blocks of 32 values."""

    def __init__(self, *, fp8_format: str, fp8_dpa: bool = False) -> None:  # attention in fp8: 0.19.2 alone
        assert not fp8_dpa
        self.format = fp8_format


class DelayedScaling:
    """Scales by the history of the largest value."""

    def __init__(self, **given: Any) -> None:
        self.given = given


@contextlib.contextmanager
def fp8_autocast(*, enabled: bool, fp8_recipe: Any, fp8_group: Any) -> Any:
    """Layers inside of it round what they multiply."""
    FP8.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        FP8.pop()
