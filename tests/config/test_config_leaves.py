"""leaves.py: the tree gives every flag of the public contract, and refuses malformed settings of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Le

from megatron_hyperrouter.config.leaves import flag, router_leaves, tree_leaves, value_of
from megatron_hyperrouter.config.tree import RunConfig

CONTRACT = """
--num-layers --hidden-size --num-attention-heads --num-query-groups --ffn-hidden-size
--moe-ffn-hidden-size --seq-length --qk-layernorm
--untie-embeddings-and-output-weights --num-experts --moe-router-topk --moe-aux-loss-coeff
--moe-z-loss-coeff
--tensor-model-parallel-size --pipeline-model-parallel-size --virtual-pipeline-model-parallel-size
--context-parallel-size
--expert-model-parallel-size --expert-tensor-parallel-size --sequence-parallel
--micro-batch-size --global-batch-size --train-iters --lr --min-lr --lr-decay-style --lr-warmup-iters
--weight-decay --clip-grad
--adam-beta1 --adam-beta2 --seed --bf16 --recompute-granularity --use-distributed-optimizer
--data-path --train-data-path --valid-data-path --test-data-path --split --tokenizer-type
--tokenizer-model --num-workers
--save-interval --load --eval-interval --eval-iters --log-interval --tensorboard-dir --wandb-project
--engine --run-dir --zero-stage --deepspeed-config --topk-schedule --topk-start --topk-schedule-steps
"""


def test_every_flag_of_the_contract_is_a_leaf():
    assert set(CONTRACT.split()) <= {leaf.flag for leaf in tree_leaves().values()}


def test_leaves_hold_the_defaults_of_the_tree():
    config = RunConfig()
    assert len(tree_leaves()) > 60
    for name, leaf in tree_leaves().items():
        assert value_of(config, name) == leaf.default
        assert leaf.help


def test_unwrapping_keeps_rules_of_all_levels():
    leaf = tree_leaves()["num_query_groups"]  # Annotated[Annotated[int, Ge(1)] | None, help]
    assert (leaf.base, leaf.rules, leaf.optional, leaf.default) == (int, (Ge(1),), True, None)
    assert leaf.describe() == "an integer >= 1, or none"
    seed = tree_leaves()["seed"]
    assert (seed.rules, seed.optional) == ((Ge(0), Le(2**32 - 1)), False)
    assert tree_leaves()["engine"].describe() == "one of deepspeed, megatron"
    assert tree_leaves()["split"].describe() == "text"
    assert tree_leaves()["bf16"].describe() == "true or false"
    assert tree_leaves()["lr"].describe() == "a number >= 0"


def test_flags_and_their_opposites():
    assert flag("num_experts") == "--num-experts"
    assert tree_leaves()["bf16"].off_flag == "--no-bf16"
    assert tree_leaves()["lr"].off_flag is None


def test_router_options_carry_a_prefix(routers):
    leaves = router_leaves(routers["hyper"].Config)
    assert list(leaves) == ["router.hypernet_width", "router.init", "router.bias", "router.seed"]
    assert leaves["router.hypernet_width"].flag == "--router.hypernet-width"
    assert leaves["router.bias"].off_flag == "--router.no-bias"


@dataclass(frozen=True)
class NoHelp:
    width: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True)
class NoDefault:
    width: Annotated[int, "help"]


@dataclass(frozen=True)
class TwoTypes:
    width: Annotated[int | str, "help"] = 1


@dataclass(frozen=True)
class CalledName:
    name: Annotated[str, "help"] = "x"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NoHelp, "help text"),
        (NoDefault, "default"),
        (TwoTypes, "X or X \\| None"),
        (CalledName, "chooses the router"),
    ],
)
def test_a_router_that_declares_badly_is_told_so(config, words):
    with pytest.raises(TypeError, match=words):
        router_leaves(config)


@dataclass(frozen=True)
class Fine:
    pair: Annotated[tuple[float, ...], "help"] = field(default_factory=lambda: (0.5,))
    kind: Annotated[Literal[1, 2], "help"] = 1


def test_default_factories_and_literals_of_numbers():
    leaves = router_leaves(Fine)
    assert leaves["router.pair"].default == (0.5,)
    assert leaves["router.pair"].is_tuple
    assert leaves["router.kind"].choices == (1, 2)
