"""Records as the hooks get them."""

from __future__ import annotations

from typing import Any

VALID: dict[str, Any] = {
    "step": 4,
    "split": "valid",
    "topk": 2,
    "lm_loss": 2.0,
    "perplexity": 7.389,
    "bits_per_byte": 1.25,
}


def step_record(step: int, *, loss: float = 3.0, **more: Any) -> dict[str, Any]:
    """What a hook may rely on, and ``more``."""
    return {
        "step": step,
        "lm_loss": loss,
        "learning_rate": 0.001,
        "topk": 2,
        "step_time": 0.5,
        "tokens_per_second": 2000.0,
        **more,
    }
