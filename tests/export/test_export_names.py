"""Tensors are cut and put together as megatron-core lays them out, head by head."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.export.classes.names import (
    MIXTRAL,
    PACKED,
    QWEN,
    Heads,
    ModelShape,
    TensorPart,
    cut,
    join,
    tensor_sources,
)

HEADS = st.builds(
    lambda groups, per_group, channels: Heads(groups * per_group, groups, channels),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)


@given(heads=HEADS, width=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_attention_is_cut_by_groups(heads: Heads, width: int) -> None:
    per_group = heads.queries // heads.groups
    rows = (heads.queries + 2 * heads.groups) * heads.channels
    whole = torch.arange(rows * width).view(rows, width)
    parts = {part: cut([whole], part, heads) for part in (TensorPart.QUERY, TensorPart.KEY, TensorPart.VALUE)}
    expected: dict[TensorPart, list[torch.Tensor]] = {part: [] for part in parts}
    at = 0
    for _ in range(heads.groups):  # megatron-core's order, head by head
        for part in [TensorPart.QUERY] * per_group + [TensorPart.KEY, TensorPart.VALUE]:
            expected[part].append(whole[at : at + heads.channels])
            at += heads.channels
    for part, pieces in expected.items():
        assert torch.equal(parts[part], torch.cat(pieces))
    assert torch.equal(join(parts, heads), whole)


def test_gate_and_up() -> None:
    whole, heads = torch.arange(12).view(6, 2), Heads(1, 1, 1)
    gate, up = (cut([whole], part, heads) for part in (TensorPart.GATE, TensorPart.UP))
    assert torch.equal(gate, whole[:3]) and torch.equal(up, whole[3:])
    assert torch.equal(join({TensorPart.GATE: gate, TensorPart.UP: up}, heads), whole)


def test_every_tensor_has_one_place() -> None:
    for naming in (QWEN, MIXTRAL, PACKED):
        for qk_norm in (True, False):
            for tied in (True, False):
                sizes = ModelShape(4, Heads(4, 2, 8), qk_norm, tied, (True, True))
                found = tensor_sources(sizes, naming)
                used = [(name, place.part) for place in found.values() for name in place.ours]
                assert len(used) == len(set(used))
                ours = {name for name, _ in used}
                # qkv, projection, norms, router, experts, q/k norms
                per_layer = 1 + 1 + 2 + 1 + 2 * 4 + 2 * qk_norm
                assert len(ours) == 2 + 2 * per_layer + (not tied)
