"""k as a function of the step, against the published formulas and the transitions worked out from them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.ops.schedule import KINDS, topk_at

RUN = {"start": 8, "end": 16, "steps": 400_000}


def test_published_run_changes_k_at_the_known_steps():
    """SMoE-Dropout and HyperRouter: 8 to 16 over 400k steps."""
    first_steps = {
        9: 25001,
        10: 75000,
        11: 125001,
        12: 175000,
        13: 225001,
        14: 275000,
        15: 325001,
        16: 375000,
    }
    for k, step in first_steps.items():
        assert topk_at(step - 1, **RUN) == k - 1
        assert topk_at(step, **RUN) == k


def test_mean_of_the_published_run():
    assert sum(topk_at(step, **RUN) for step in range(0, 400_000, 100)) / 4000 == pytest.approx(
        12.0, abs=0.01
    )


@pytest.mark.parametrize("step", [0, 1, 1333, 31_415, 133_300, 299_999, 399_999])
def test_cosine_and_exponential_formulas(step):
    assert topk_at(step, kind="cosine", **RUN) == round((8 - 16) * math.cos(math.pi * step / 800_000)) + 16
    assert (
        topk_at(step, kind="exponential", **RUN) == round((8 - 16) * 0.99 ** (step // (400_000 // 300))) + 16
    )


def test_multistep_gives_each_power_of_two_an_equal_share():
    ks = [topk_at(step, start=1, end=16, steps=1000, kind="multistep") for step in range(1001)]
    assert ks[:1000] == [[1, 2, 4, 8, 16][int(5 * step / 1000)] for step in range(1000)]
    assert ks[1000] == 16  # where the published code runs out of its list


def test_multistep_ends_on_the_end_even_where_that_is_no_doubling():
    assert [topk_at(step, start=3, end=16, steps=4, kind="multistep") for step in range(5)] == [
        3,
        6,
        12,
        16,
        16,
    ]
    assert [topk_at(step, start=8, end=3, steps=3, kind="multistep") for step in range(4)] == [8, 4, 3, 3]


@given(
    start=st.integers(1, 64),
    end=st.integers(1, 64),
    steps=st.integers(1, 1000),
    kind=st.sampled_from(KINDS),
    part=st.integers(0, 1100),
)
def test_every_schedule_moves_one_way_from_start_to_end(start, end, steps, kind, part):
    step = part * steps // 1000
    k, later = (topk_at(s, start=start, end=end, steps=steps, kind=kind) for s in (step, step + 1))
    first = topk_at(0, start=start, end=end, steps=steps, kind=kind)
    assert first == (end if kind == "constant" else start)
    assert topk_at(steps, start=start, end=end, steps=steps, kind=kind) == end
    assert min(start, end) <= k <= max(start, end)
    assert (later - k) * (end - start) >= 0


def test_kind_is_linear_unless_told():
    assert topk_at(50, start=1, end=9, steps=100) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"start": 0}, {"end": 0}, {"steps": 0}, {"kind": "stairs"}, {"step": -1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_values_out_of_range(wrong):
    arguments = {"step": 3, "start": 1, "end": 2, "steps": 10, **wrong}
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        topk_at(arguments.pop("step"), **arguments)
