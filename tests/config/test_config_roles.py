"""roles.py: every setting has a role, every role is used, and lists of settings follow from roles."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import pytest

from megatron_hyperrouter.config import leaves
from megatron_hyperrouter.config.by_role import (
    COURSE,
    FREE,
    MODEL,
    SPREAD,
    names_with,
    quiet,
    quiet_on,
    values_with,
)
from megatron_hyperrouter.config.leaves import Leaf, tree_leaves
from megatron_hyperrouter.config.roles import Only, Quiet, Role
from megatron_hyperrouter.config.tree import RunConfig


def test_every_leaf_has_a_role_and_every_role_a_leaf():
    assert {leaf.role for leaf in tree_leaves().values()} == set(Role)


def test_a_resumed_run_knows_what_to_do_about_each_role():
    assert Counter((*MODEL, *COURSE, *SPREAD, *FREE)) == Counter(Role)


def test_what_a_checkpoint_must_agree_with():
    """What the program compared when it kept this list by hand, and the two sizes that it had forgotten."""
    once = """num_layers hidden_size num_attention_heads num_query_groups kv_channels moe_ffn_hidden_size
    num_experts qk_layernorm mlp_type untie_embeddings_and_output_weights"""
    assert {*once.split(), "ffn_hidden_size", "make_vocab_size_divisible_by"} <= {*names_with(Role.SHAPE)}
    assert {"norm_epsilon", "rotary_base", "moe_router_topk", "moe_expert_capacity_factor"} <= {
        *names_with(Role.FUNCTION)
    }
    assert {"lr", "train_iters", "weight_decay"} <= {*names_with(Role.COURSE)}


def test_overrides_that_leave_things_out():
    assert quiet(Role.LAYOUT)["tensor_model_parallel_size"] == 1
    assert quiet(Role.LAYOUT)["virtual_pipeline_model_parallel_size"] is None
    assert quiet(Role.START)["load"] is None
    assert quiet(Role.START)["finetune"] is False
    timed = quiet(Role.SCHEDULE, Role.UPKEEP)  # a timed run neither evaluates nor saves, and nothing changes
    assert timed["eval_interval"] == timed["save_interval"] == timed["lr_warmup_iters"] == 0
    assert timed["lr_decay_style"] == timed["topk_schedule"] == "constant"
    assert timed["topk_start"] is timed["lr_decay_iters"] is None


def test_settings_of_one_engine():
    assert quiet_on("megatron") == {"zero_stage": 1, "deepspeed_config": None}
    assert {"use_distributed_optimizer", "transformer_impl"} <= quiet_on("deepspeed").keys()
    assert "mlp_type" not in quiet_on("megatron")  # another model: to be refused, not left out


def test_quiet_values_are_the_defaults_unless_a_setting_says_otherwise():
    for leaf in tree_leaves().values():
        assert leaf.quiet == leaf.default or leaf.name in {
            "lr_decay_style",
            "eval_interval",
            "expert_similarity_interval",
            "keep_checkpoints",
        }


def test_values_of_a_role():
    assert values_with(RunConfig(), Role.ENGINE) == {"engine": "deepspeed"}


@dataclass(frozen=True)
class NoRole:
    width: Annotated[int, "help"] = 1


@dataclass(frozen=True)
class TwoRoles:
    width: Annotated[int, Role.SHAPE, Role.DATA, "help"] = 1


@pytest.mark.parametrize(
    ("section", "words"), [(NoRole, "needs a role"), (TwoRoles, "2 annotations of type Role")]
)
def test_a_setting_without_one_role_is_refused(section, words):
    with pytest.raises(TypeError, match=words):
        list(leaves._leaves_of(section, "model", ""))


@dataclass(frozen=True)
class Options:
    init: Annotated[str, Role.INITIAL, "help"] = "a"
    width: Annotated[int, "help"] = 1
    fast: Annotated[bool, Only("megatron"), Quiet(True), "help"] = False


def test_a_routers_option_is_part_of_its_function_unless_it_says_otherwise():
    found: dict[str, Leaf] = dict(leaves.router_leaves(Options))
    assert [leaf.role for leaf in found.values()] == [Role.INITIAL, Role.FUNCTION, Role.FUNCTION]
    assert found["router.fast"].quiet is True
    assert found["router.fast"].only == Only("megatron")
    assert found["router.fast"].rules == ()
