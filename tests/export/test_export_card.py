"""What the model card warns of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hyperrouter.export.card import notes_of


@pytest.mark.parametrize(
    ("model_type", "rope_type", "mscale_all_dim", "warned"),
    [
        ("deepseek_v2", "yarn", 0.7, True),
        ("deepseek_v2", None, 0.7, True),  # the default of latent attention
        ("deepseek_v2", "yarn", 0.0, False),  # no temperature
        ("deepseek_v2", "rope", 0.7, False),  # a setting of YaRN
        ("deepseek_v3", "yarn", 0.7, False),  # transformers 4 has it in this class
    ],
)
def test_transformers_4_is_named_where_it_computes_another_model(
    model_type: str, rope_type: str | None, mscale_all_dim: float, warned: bool
) -> None:
    run: Any = SimpleNamespace(
        model=SimpleNamespace(mtp_num_layers=None, moe_expert_capacity_factor=None),
        attention=SimpleNamespace(
            rope_type=rope_type, mscale_all_dim=mscale_all_dim, multi_latent_attention=True
        ),
    )
    tokenizer: Any = SimpleNamespace(type="NullTokenizer")
    target: Any = SimpleNamespace(model_type=model_type)
    notes = [line for line in notes_of(run, tokenizer, target) if "transformers 4" in line]
    assert len(notes) == warned
