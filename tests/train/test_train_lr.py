"""Learning rates against megatron-core's scheduler, the other implementation of the same formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_hyperrouter.config.tree import OptimizerConfig
from megatron_hyperrouter.train.lr import learning_rate_at

STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")


def megatron_rates(config: OptimizerConfig, train_iters: int, count: int) -> list[float]:
    """Rates after 1, 2, ..., ``count`` steps."""
    decay = config.lr_decay_iters or train_iters
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]),
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_iters or max(decay // 10, 1),
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    rates = []
    for _ in range(count):
        scheduler.step(1)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates


@given(
    style=st.sampled_from(STYLES),
    warmup=st.integers(0, 20),
    after=st.integers(1, 60),
    decay_iters=st.booleans(),
    wsd=st.none() | st.integers(1, 80),
    share=st.floats(0.0, 1.0),
    shape=st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    init=st.floats(0.0, 0.0029),
)
def test_equals_megatron_after_as_many_steps(
    style: str,
    warmup: int,
    after: int,
    decay_iters: bool,
    wsd: int | None,
    share: float,
    shape: str,
    init: float,
) -> None:
    decay = warmup + after
    train_iters = decay + 10 if decay_iters else decay
    config = OptimizerConfig(
        lr=0.003,
        min_lr=0.003 * share,
        lr_decay_style=style,  # type: ignore[arg-type]
        lr_warmup_iters=warmup,
        lr_decay_iters=decay if decay_iters else None,
        lr_wsd_decay_iters=wsd,
        lr_wsd_decay_style=shape,  # type: ignore[arg-type]
        lr_warmup_init=init,
    )
    ours = [learning_rate_at(step, config, train_iters) for step in range(1, train_iters + 6)]
    assert ours == pytest.approx(megatron_rates(config, train_iters, len(ours)), rel=1e-12, abs=1e-18)


def test_warm_up_counts_from_one() -> None:
    config = OptimizerConfig(lr=0.4, lr_warmup_iters=4, lr_decay_style="constant")
    assert [learning_rate_at(step, config, 9) for step in range(1, 7)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )


@pytest.mark.parametrize("style", ["linear", "cosine", "WSD"])
def test_decay_ends_on_min_lr_at_the_last_step(style: str) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.125, lr_decay_style=style, lr_warmup_iters=2)  # type: ignore[arg-type]
    assert learning_rate_at(100, config, 100) == pytest.approx(0.125)
    assert learning_rate_at(101, config, 100) == 0.125


def test_wsd_is_flat_until_the_last_tenth() -> None:
    config = OptimizerConfig(lr=1.0, lr_decay_style="WSD", lr_warmup_iters=5)
    assert {learning_rate_at(step, config, 200) for step in range(5, 181)} == {1.0}
    assert learning_rate_at(190, config, 200) == pytest.approx(2 * math.sqrt(0.5) - 1)


@pytest.mark.parametrize("style", STYLES)
def test_a_warm_up_longer_than_the_run_is_only_a_warm_up(style: str) -> None:
    config = OptimizerConfig(lr=1.0, lr_decay_style=style, lr_warmup_iters=20)  # type: ignore[arg-type]
    assert [learning_rate_at(step, config, 10) for step in (1, 10)] == [0.05, 0.5]


def test_step_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        learning_rate_at(0, OptimizerConfig(), 10)
