"""values.py: words of flags and YAML values become the same typed values, or a rule and a remedy."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.config.leaves import Leaf, router_leaves, tree_leaves
from megatron_hyperrouter.config.reading.values import BadValue, convert, from_words, nearest


def leaf(name: str) -> Leaf:
    return tree_leaves()[name]


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("num_layers", "12", 12),
        ("num_layers", 12, 12),
        ("lr", "1e-4", 1e-4),  # what YAML takes for text
        ("lr", 1, 1.0),
        ("clip_grad", "0", 0.0),
        ("bf16", "true", True),
        ("bf16", "False", False),
        ("bf16", True, True),
        ("num_query_groups", None, None),
        ("num_query_groups", "none", None),
        ("num_query_groups", "None", None),
        ("num_query_groups", "4", 4),
        ("tokenizer_model", "none", None),
        ("run_dir", "none", "none"),  # not optional, so just a name
        ("engine", "megatron", "megatron"),
        ("data_path", ["0.3", "a", "0.7", "b"], ("0.3", "a", "0.7", "b")),
        ("data_path", [0.3, "a", 1, "b"], ("0.3", "a", "1", "b")),  # YAML typed the weights
        ("data_path", "one prefix", ("one prefix",)),
        ("data_path", [], ()),
    ],
)
def test_good_values(name, raw, value):
    converted = convert(leaf(name), raw)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "raw", "rule"),
    [
        ("hidden_size", "yes", "an integer >= 1"),
        ("num_layers", 10**9, "an integer >= 1 and <= 10000"),  # rules would list its layers
        ("num_experts", 10**12, "an integer >= 1 and <= 100000"),  # their weights would fill the memory
        ("mtp_num_layers", 10**9, "an integer >= 1 and <= 10000, or none"),
        ("hidden_size", True, "an integer >= 1"),  # True == 1 in Python
        ("hidden_size", "2.5", "an integer >= 1"),
        ("hidden_size", 0, "an integer >= 1"),
        ("hidden_size", None, "an integer >= 1"),
        ("hidden_size", [1], "an integer >= 1"),
        ("loss_window", 1, "an integer >= 2"),  # the standard deviation of one number
        ("zero_stage", "4", "an integer >= 0 and <= 3"),
        ("lr", "nan", "a number >= 0"),
        ("lr", float("inf"), "a number >= 0"),
        ("lr", "-1e-4", "a number >= 0"),
        ("lr", False, "a number >= 0"),
        ("adam_beta2", "1", "a number >= 0 and < 1"),
        ("moe_expert_capacity_factor", "0", "a number > 0, or none"),
        ("hidden_dropout", 1.5, "a number >= 0 and <= 1"),
        ("bf16", "perhaps", "true or false"),
        ("engine", "jax", "one of deepspeed, megatron"),
        ("split", 100, "text"),
        ("run_dir", None, "text"),
        ("data_path", {"a": 1}, "one or more words"),
        ("data_path", [["a"]], "one or more words"),
        ("data_path", [True], "one or more words"),
        ("profile_ranks", ["a"], "one or more integers"),
        ("seed", 2**32, "an integer >= 0 and <= 4294967295"),
    ],
)
def test_bad_values_name_the_rule_and_a_remedy(name, raw, rule):
    with pytest.raises(BadValue) as bad:
        convert(leaf(name), raw)
    assert bad.value.rule == f"must be {rule}"
    assert bad.value.remedy


def test_a_choice_that_is_nearly_right_is_named():
    with pytest.raises(BadValue) as bad:
        convert(leaf("lr_decay_style"), "cosin")
    assert bad.value.remedy == "did you mean cosine?"


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("bf16", [], True),
        ("bf16", ["false"], False),
        ("lr", ["0.1"], 0.1),
        ("data_path", ["a", "b"], ("a", "b")),
        ("load", ["None"], None),
    ],
)
def test_words_of_flags(name, words, value):
    assert from_words(leaf(name), words) == value


@pytest.mark.parametrize(
    ("name", "words", "rule"),
    [("lr", [], "needs a value"), ("lr", ["1", "2"], "takes one value, got 2"), ("data_path", [], "needs")],
)
def test_flags_with_the_wrong_number_of_words(name, words, rule):
    with pytest.raises(BadValue, match=rule):
        from_words(leaf(name), words)


def test_numbers_in_a_router_option_of_several_words(routers):
    milestones = router_leaves(routers["plain"].Config)["router.milestones"]
    assert convert(milestones, [3, 4]) == (3, 4)
    assert from_words(milestones, ["5", "6"]) == (5, 6)
    with pytest.raises(BadValue):
        from_words(milestones, ["5", "x"])


def test_every_default_is_a_good_value_of_its_leaf():
    for each in tree_leaves().values():
        assert convert(each, each.default) == each.default


def test_nearest():
    assert nearest("hiden_size", tree_leaves()) == "hidden_size"
    assert nearest("zzz", tree_leaves()) is None
