"""A batch that grows, against megatron-core's calculator and against a plain loop over the steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes


def megatron_sizes(full: int, rampup: tuple[int, int, int], count: int) -> list[int]:
    """Sizes of the first ``count`` steps, as Megatron-LM's training loop asks for them."""
    calculator = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, *rampup)
    sizes, consumed = [], 0
    for _ in range(count):
        calculator.update(consumed, consistency_check=True)
        sizes.append(calculator.get_current_global_batch_size())
        consumed += sizes[-1]
    return sizes


@given(
    start=st.integers(1, 40),
    increment=st.integers(1, 12),
    increments=st.integers(1, 30),
    samples=st.integers(1, 4000),
)
def test_sizes_are_those_of_megatron(start: int, increment: int, increments: int, samples: int) -> None:
    full = start + increment * increments
    rampup, count = (start, increment, samples), samples // start + 10
    expected = megatron_sizes(full, rampup, count)
    sizes = BatchSizes(full, rampup)
    assert [sizes.size(step) for step in range(count)] == expected
    consumed = 0
    for step, size in enumerate(expected):
        assert sizes.samples(step) == consumed
        assert sizes.progress(step) == consumed / full
        assert sizes.steps_within(consumed) == step
        assert sizes.steps_within(consumed + size - 1) == step
        consumed += size


def test_millions_of_steps_take_no_time() -> None:
    sizes = BatchSizes(2048, (32, 32, 97_656_250))  # Megatron-LM's example for GPT-3
    assert sizes.size(0) == 32
    assert sizes.size(sizes.steps_within(97_656_250) + 1) == 2048
    assert sizes.samples(10**9) > 97_656_250


def test_a_batch_that_does_not_grow() -> None:
    sizes = BatchSizes(8)
    assert [(sizes.samples(step), sizes.size(step), sizes.progress(step)) for step in (0, 1, 5)] == [
        (0, 8, 0),
        (8, 8, 1),
        (40, 8, 5),
    ]
    assert [sizes.steps_within(samples) for samples in (0, 7, 8, 47)] == [0, 0, 1, 5]


@pytest.mark.parametrize("rampup", [(8, 8, 100), (16, 8, 100), (4, 3, 100)])
def test_what_does_not_lead_to_the_full_size(rampup: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not grow"):
        BatchSizes(8, rampup)
