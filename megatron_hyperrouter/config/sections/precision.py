"""Settings of 8-bit floating-point numbers; a section of the tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_hyperrouter.config.kinds import Count, Natural
from megatron_hyperrouter.config.roles import Only, Role

TE_ALONE = Only("megatron", "leave out FLAG; fp8 needs --engine megatron with Transformer Engine")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Matrix products in fp8, computed by Transformer Engine; routers and hypernetworks stay in float32."""

    fp8_format: Annotated[
        Literal["e4m3", "hybrid"] | None,
        Role.PRECISION,
        TE_ALONE,
        "Compute matrix products of attention and experts in fp8 (needs --bf16 and Transformer "
        "Engine). e4m3: all tensors in e4m3; hybrid: gradients in e5m2, all other tensors in e4m3",
    ] = None
    fp8_recipe: Annotated[
        Literal["tensorwise", "delayed", "mxfp8", "blockwise"],
        Role.PRECISION,
        TE_ALONE,
        "How to compute fp8 scaling factors. delayed: from the absolute maxima (amax) of "
        "earlier steps; tensorwise: from current values, one factor per tensor; blockwise, "
        "mxfp8: from current values, one factor per block",
    ] = "delayed"
    fp8_margin: Annotated[
        Natural, Role.PRECISION, TE_ALONE, "With --fp8-recipe delayed: divide the scaling factors by 2^N"
    ] = 0
    fp8_amax_history_len: Annotated[
        Count,
        Role.PRECISION,
        TE_ALONE,
        "With --fp8-recipe delayed: length of the amax history, in steps",
    ] = 1
    fp8_amax_compute_algo: Annotated[
        Literal["most_recent", "max"],
        Role.PRECISION,
        TE_ALONE,
        (
            "With --fp8-recipe delayed: compute the scaling factor from the most recent or from the "
            "largest amax in the history"
        ),
    ] = "most_recent"
    no_fp8_wgrad: Annotated[
        bool, Role.PRECISION, TE_ALONE, "With --fp8-recipe delayed: compute weight gradients in bfloat16"
    ] = False
    first_last_layers_bf16: Annotated[
        bool,
        Role.PRECISION,
        TE_ALONE,
        "With --fp8-format: compute the first and the last layers in bfloat16; not possible "
        "with --fp8-recipe delayed",
    ] = False
    num_layers_at_start_in_bf16: Annotated[
        Natural,
        Role.PRECISION,
        TE_ALONE,
        "With --first-last-layers-bf16: number of first layers to keep in bfloat16",
    ] = 1
    num_layers_at_end_in_bf16: Annotated[
        Natural,
        Role.PRECISION,
        TE_ALONE,
        "With --first-last-layers-bf16: number of last layers to keep in bfloat16",
    ] = 1
