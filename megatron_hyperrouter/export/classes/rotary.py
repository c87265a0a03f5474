"""Converts settings of rotary positions to ``config.json`` and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_hyperrouter.config.derived import rope_type
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.attention.rotary import concentration, temperature

ROTARY_SETTINGS = (  # that every class follows through ``rope_parameters``
    "rope_type rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale "
    "mscale_all_dim use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor"
).split()
# Llama 3.1's constants: fixed in this program, settings in transformers.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_parameters(run: RunConfig) -> dict[str, Any]:
    """``rope_parameters`` except for the base."""
    attention = run.attention
    if attention.use_rope_scaling:
        return {"rope_type": "llama3", "factor": attention.rope_scaling_factor, **_LLAMA3}
    if rope_type(run) == "yarn":
        factor = attention.rotary_scaling_factor
        strengths = {"mscale": attention.mscale, "mscale_all_dim": attention.mscale_all_dim}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": attention.original_max_position_embeddings,
            "beta_fast": attention.beta_fast,
            "beta_slow": attention.beta_slow,
            **strengths,
            # follows from both strengths; if one of them is 0, classes of transformers disagree on it
            "attention_factor": concentration(run),
        }
    if attention.rotary_seq_len_interpolation_factor:
        return {"rope_type": "linear", "factor": attention.rotary_seq_len_interpolation_factor}
    return {"rope_type": "default"}


def rotary_settings(rope: Mapping[str, Any], *, latent: bool) -> dict[str, Any]:
    """Our settings by flat name for the ``rope_parameters``, or the older ``rope_scaling``, of a folder; a
    ValueError says what of them we do not have.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_type": "rope"} if latent else {}
    if kind == "linear":
        return {"rope_type": "rope", "rotary_seq_len_interpolation_factor": float(rope["factor"])}
    if kind == "llama3":
        if any(rope.get(name) != value for name, value in _LLAMA3.items()):
            raise ValueError("rope_type llama3 is supported only with the constants of Llama 3.1")
        return {"rope_type": "rope", "use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    if kind != "yarn":
        raise ValueError(
            f"rope_type {kind} is not supported; the supported types are default, linear, llama3 and yarn"
        )
    if rope.get("truncate", True) is not True:
        raise ValueError("rope_type yarn with truncate = false is not supported")
    # What DeepSeek's own code has by default; without either, transformers takes 0.1 ln(factor) + 1.
    mscale, all_dim = (float(rope.get(name) or 0.0) for name in ("mscale", "mscale_all_dim"))
    if not (mscale and all_dim):
        mscale = 1.0
    factor = float(rope["factor"])
    asked, ours = rope.get("attention_factor"), temperature(factor, mscale) / temperature(factor, all_dim)
    if asked is not None and not math.isclose(asked, ours, rel_tol=1e-9):
        mscale = (asked * temperature(factor, all_dim) - 1.0) / (0.1 * math.log(factor))
        if mscale < 0:
            raise ValueError(f"attention_factor {asked} does not agree with mscale and mscale_all_dim")
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "original_max_position_embeddings": int(rope["original_max_position_embeddings"]),
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": mscale,
        "mscale_all_dim": all_dim,
    }
