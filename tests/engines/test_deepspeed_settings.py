"""engines/deepspeed/settings.py: what DeepSpeed is configured to do, and what this program does instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hyperrouter.config.cli import replace_leaves
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.deepspeed.settings import (
    LARGEST_BUCKET,
    deepspeed_settings,
    refusals,
    zero_stage,
)
from megatron_hyperrouter.errors import ConfigError


def test_without_zero_deepspeed_never_clips(tmp_path: Path) -> None:
    """Our Clipper measures ``grad_norm`` before it clips; a user's gradient_clipping would clip first."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": 0.05, "wall_clock_breakdown": True}))
    for stage, expected in ((0, 0.0), (1, 0.05)):
        config = replace_leaves(RunConfig(), zero_stage=stage, clip_grad=0.05, deepspeed_config=str(path))
        settings = deepspeed_settings(config, data_parallel_size=1)
        assert settings["gradient_clipping"] == expected
        assert settings["wall_clock_breakdown"] is True


def test_buckets_grow_with_the_ranks_up_to_what_the_model_needs() -> None:
    million = 1 << 20
    cases = ((1, 1000, 1000), (1, 10**10, million), (8, 10**10, 8 * million), (1024, 10**10, LARGEST_BUCKET))
    for ranks, numbers, expected in cases:
        settings = deepspeed_settings(RunConfig(), data_parallel_size=ranks, largest_group=numbers)
        assert settings["zero_optimization"]["reduce_bucket_size"] == expected


def test_one_process_in_float32_runs_without_zero() -> None:
    plain = RunConfig()
    assert zero_stage(plain, world_size=1) == 0
    assert zero_stage(plain, world_size=2) == 1
    for kept in ({"bf16": True}, {"deepspeed_config": "ds.json"}, {"moe_grouped_gemm": False}):
        assert zero_stage(replace_leaves(plain, **kept), world_size=1) == 1
    assert deepspeed_settings(plain, data_parallel_size=1, stage=0)["zero_optimization"]["stage"] == 0


def test_zero_2_overlaps_its_communication() -> None:
    for stage in (0, 1, 2):
        settings = deepspeed_settings(replace_leaves(RunConfig(), zero_stage=stage), data_parallel_size=1)
        assert settings["zero_optimization"].get("overlap_comm", False) == (stage == 2)


def test_a_value_that_deepspeed_refuses_is_a_problem_of_the_users_file() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with pytest.raises(ConfigError) as caught, refusals("ds.json"):
        DeepSpeedZeroConfig(reduce_bucket_size="5e8", stage=1)
    assert 'reduce_bucket_size in ds.json = "5e8": is refused by DeepSpeed: ' in str(caught.value)
    for path, error in ((None, "stage"), ("ds.json", "of ours")):
        with pytest.raises(ValueError, match=error), refusals(path):
            raise ValueError(error)
