"""derived.py: values that follow from several settings."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.config import derived
from megatron_hyperrouter.config.cli import replace_leaves
from megatron_hyperrouter.config.tree import RunConfig


def config(**leaves) -> RunConfig:
    return replace_leaves(RunConfig(), **leaves)


def test_attention():
    assert (derived.query_groups(config()), derived.head_width(config())) == (4, 64)
    assert derived.query_groups(config(num_query_groups=2)) == 2
    assert derived.head_width(config(kv_channels=16)) == 16


def test_expert_tensor_size_follows_tp():
    assert derived.expert_tensor_size(config(tensor_model_parallel_size=4)) == 4
    assert (
        derived.expert_tensor_size(config(tensor_model_parallel_size=4, expert_tensor_parallel_size=1)) == 1
    )


@pytest.mark.parametrize(
    ("world", "tp", "pp", "cp", "ranks"), [(8, 1, 1, 1, 8), (8, 2, 2, 1, 2), (8, 2, 2, 2, 1), (6, 2, 2, 1, 0)]
)
def test_data_parallel_size(world, tp, pp, cp, ranks):
    layout = config(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp)
    assert derived.data_parallel_size(layout, world) == ranks


def test_batches():
    assert derived.global_batch_size(config(micro_batch_size=3), 4) == 12
    assert derived.accumulation_steps(config(micro_batch_size=3), 4) == 1
    assert derived.accumulation_steps(config(micro_batch_size=3, global_batch_size=24), 4) == 2


def test_smallest_topk():
    assert derived.smallest_topk(config(moe_router_topk=4)) == 4
    assert derived.smallest_topk(config(moe_router_topk=4, topk_start=1, topk_schedule="linear")) == 1
    assert derived.smallest_topk(config(moe_router_topk=2, topk_start=8, topk_schedule="linear")) == 2


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("969,30,1", (0.969, 0.03, 0.001)),
        (" 8 , 1 , 1 ", (0.8, 0.1, 0.1)),
        ("98,2", (0.98, 0.02, 0)),
        ("100", (1, 0, 0)),
        (".5,0.5,0", (0.5, 0.5, 0)),
    ],
)
def test_split_shares(split, shares):
    assert derived.split_shares(split) == pytest.approx(shares, abs=1e-15)


@pytest.mark.parametrize(
    "split", ["", "a", "1;2;3", "-1,2,3", "1,2,3,4", "0,0,0", "1,,2", "1e3,2,3", "nan,1,1"]
)
def test_bad_splits(split):
    with pytest.raises(ValueError, match="must"):
        derived.split_shares(split)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1", "1111"),
        ("2", "1010"),
        ("3", "1001"),
        ("[0, 1,1,0]", "0110"),
        ("([0]*1+[1]*3)", "0111"),
        ("([1]*1+[0]*1)*2", "1010"),
        ("2*[0,1]", "0101"),
    ],
)
def test_layers_with_experts_as_python_evaluates_them(text, layers):
    """Megatron-LM's rule: an integer N makes a MoE layer of each layer i with i % N == 0."""
    value = eval(text)
    expected = [int(i % value == 0) for i in range(4)] if isinstance(value, int) else list(value)
    found = derived.moe_layers(config(moe_layer_freq=text))
    assert "".join(str(int(layer)) for layer in found) == layers == "".join(map(str, expected))


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "[2,1]", "1.5", "x", "[1]*10**9", "[[1],[0]]*2", "[1]*99999999999", "(" * 500]
)
def test_what_is_no_pattern_is_refused_and_never_evaluated(text):
    with pytest.raises(ValueError, match="must"):
        derived.pattern(text)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (None, (4, 4, 4, 4)),
        ("2", (4, None, 4, None)),
        ("4", (4, 4, 4, None)),
        ("[0,1]*2", (None, 4, None, 4)),
    ],
)
def test_layers_with_a_window(skip, expected):
    """megatron-core's rule: layer n, counted from 1, has full attention where n % N == 0."""
    from megatron.core.transformer.utils import is_layer_window_attention

    found = derived.windows(config(window_size="4,0", window_attn_skip_freq=skip))
    assert found == expected
    theirs = None if skip is None else eval(skip)
    assert [window is not None for window in found] == [
        is_layer_window_attention((4, 0), theirs, number) for number in range(1, 5)
    ]


def test_layers_without_experts_in_a_row():
    assert derived.longest_dense_run(config()) == 0
    assert derived.longest_dense_run(config(moe_layer_freq="[0,0,1,0]")) == 2


@pytest.mark.parametrize(
    ("asked", "world", "expected"),
    [
        ({}, 2, (False, False)),  # without the distributed optimizer
        ({"use_distributed_optimizer": True}, 1, (False, False)),
        ({"use_distributed_optimizer": True}, 2, (True, True)),
        ({"use_distributed_optimizer": True, "pipeline_model_parallel_size": 2}, 2, (False, False)),
        ({"use_distributed_optimizer": True, "context_parallel_size": 2}, 2, (True, True)),
        ({"use_distributed_optimizer": True, "overlap_grad_reduce": False}, 2, (False, False)),
        ({"use_distributed_optimizer": True, "overlap_param_gather": False}, 2, (True, False)),
        ({"use_distributed_optimizer": True, "overlap_param_gather": True}, 1, (True, True)),
        ({"overlap_grad_reduce": True}, 2, (True, False)),
    ],
)
def test_what_overlaps(asked, world, expected):
    assert derived.overlap(config(engine="megatron", **asked), world) == expected
