"""check.py and rules/: each rule refuses what it should, says why, and is silent once its remedy is taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_hyperrouter.config.check import RULES, problems, warnings
from megatron_hyperrouter.config.cli import parse, replace_leaves
from megatron_hyperrouter.config.rules import megatron
from megatron_hyperrouter.config.tree import RouterChoice, RunConfig

INSTALLED = megatron.installed  # before a test replaces it
BY_NAME = {rule.__name__: rule for rule in RULES}
PACKED = {"pack_documents": True, "reset_attention_mask": True, "eod_mask_loss": True}
MEGATRON = {"engine": "megatron"}
TP2 = {"tensor_model_parallel_size": 2}


@dataclass(frozen=True)
class Case:
    """Settings that one rule refuses, and a change that mends them."""

    rule: str
    settings: dict[str, Any]
    field: str
    words: str  # part of the rule's text
    mended: dict[str, Any]
    world_size: int | None = None
    more: int = field(default=0)  # other problems of the same rule in the same settings


def case(
    rule: str,
    settings: dict[str, Any],
    field: str,
    words: str,
    mended: dict[str, Any],
    world: int | None = None,
    more: int = 0,
) -> Case:
    return Case(rule, settings, field, words, mended, world, more)


CASES = [
    case(
        "hidden_size_by_heads",
        {"hidden_size": 250},
        "--hidden-size",
        "divisible by --num-attention-heads = 4",
        {"hidden_size": 248},
    ),
    case("hidden_size_by_heads", {"hidden_size": 250}, "--hidden-size", "divisible", {"kv_channels": 64}),
    case(
        "heads_by_query_groups",
        {"num_query_groups": 3},
        "--num-attention-heads",
        "--num-query-groups = 3",
        {"num_query_groups": 2},
    ),
    case(
        "head_width_is_even",
        {"hidden_size": 20, "num_attention_heads": 4},
        "--hidden-size",
        "heads of width 5",
        {"hidden_size": 24},
    ),
    case("head_width_is_even", {"kv_channels": 7}, "--kv-channels", "even", {"kv_channels": 8}),
    case("head_width_is_even", {"kv_channels": 1}, "--kv-channels", "even", {"kv_channels": 2}),
    case(
        "topk_within_experts",
        {"moe_router_topk": 9},
        "--moe-router-topk",
        "at most --num-experts = 8",
        {"num_experts": 9},
    ),
    case(
        "topk_within_experts",
        {"topk_start": 9, "topk_schedule": "linear"},
        "--topk-start",
        "at most --num-experts = 8",
        {"topk_start": 8},
    ),
    case(
        "topk_fields_need_a_schedule",
        {"topk_start": 4},
        "--topk-start",
        "needs a schedule",
        {"topk_schedule": "cosine"},
    ),
    case(
        "topk_fields_need_a_schedule",
        {"topk_schedule_steps": 4},
        "--topk-schedule-steps",
        "schedule",
        {"topk_schedule_steps": None},
    ),
    case(
        "schedule_needs_a_start",
        {"topk_schedule": "linear"},
        "--topk-schedule",
        "needs --topk-start",
        {"topk_start": 1},
    ),
    case(
        "router_options",
        {"router.hypernet_width": 10**6},
        "--router.hypernet-width",
        "wider",
        {"router.hypernet_width": 8},
    ),
    case(
        "world_by_layout",
        {"pipeline_model_parallel_size": 2},
        "ranks started",
        "1 x 2 x 1",
        {"pipeline_model_parallel_size": 3},
        3,
    ),
    case(
        "world_by_layout",
        {**TP2, "context_parallel_size": 2},
        "ranks started",
        "2 x 1 x 2",
        {"context_parallel_size": 1},
        2,
    ),
    case(
        "data_ranks_by_experts",
        {"expert_model_parallel_size": 4},
        "--expert-model-parallel-size",
        "must divide the 2 data-parallel ranks of the 2",
        {"expert_model_parallel_size": 2},
        2,
    ),
    case(
        "data_ranks_by_experts",
        {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
        "--expert-model-parallel-size",
        "must divide the 2 data-parallel ranks of the 4",
        {"pipeline_model_parallel_size": 1},
        4,
    ),
    case(
        "data_ranks_by_experts",
        {**TP2, "expert_model_parallel_size": 4},
        "--expert-model-parallel-size",
        "must divide the 2 data-parallel ranks of the 4",
        {"expert_tensor_parallel_size": 1},
        4,
    ),
    case(
        "world_by_expert_layout",
        {
            **TP2,
            "expert_tensor_parallel_size": 1,
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 4,
        },
        "--expert-model-parallel-size",
        "4 x 1 x 2 must divide the 4 ranks",
        {"expert_model_parallel_size": 2},
        4,
    ),
    case(
        "expert_tensor_parallel_is_all_or_none",
        {"expert_tensor_parallel_size": 2},
        "--expert-tensor-parallel-size",
        "must be 1 or --tensor-model-parallel-size = 1",
        TP2,
    ),
    case(
        "expert_tensor_parallel_is_all_or_none",
        {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 2},
        "--expert-tensor-parallel-size",
        "on the deepspeed engine",
        {"expert_tensor_parallel_size": 1},
    ),
    case(
        "world_by_expert_layout",
        {**MEGATRON, **TP2, "expert_model_parallel_size": 4},
        "--expert-model-parallel-size",
        "4 x 2 x 1 must divide the 4 ranks",
        {"expert_tensor_parallel_size": 1},
        4,
    ),
    case(
        "experts_by_expert_parallel",
        {"expert_model_parallel_size": 3},
        "--num-experts",
        "= 3",
        {"num_experts": 9},
    ),
    case(
        "heads_by_tensor_parallel",
        {"tensor_model_parallel_size": 3, "num_attention_heads": 4},
        "--num-attention-heads",
        "= 3",
        TP2,
    ),
    case(
        "heads_by_tensor_parallel",
        {**TP2, "num_query_groups": 1},
        "--num-query-groups",
        "= 2",
        {"num_query_groups": 2},
    ),
    case(
        "vocabulary_by_tensor_parallel",
        {"tensor_model_parallel_size": 3},
        "--make-vocab-size-divisible-by",
        "= 3",
        TP2,
    ),
    case(
        "expert_width_by_tensor_parallel",
        {**TP2, "moe_ffn_hidden_size": 33},
        "--moe-ffn-hidden-size",
        "width 33",
        {"expert_tensor_parallel_size": 1},
    ),
    case(
        "expert_width_by_tensor_parallel",
        {**TP2, "ffn_hidden_size": 33},
        "--ffn-hidden-size",
        "width 33",
        {"ffn_hidden_size": 34},
    ),
    case(
        "expert_width_by_tensor_parallel",
        {"expert_tensor_parallel_size": 3},
        "--hidden-size",
        "width 1024",
        {"moe_ffn_hidden_size": 1023},
    ),
    case(
        "expert_width_by_tensor_parallel",
        {**TP2, "expert_tensor_parallel_size": 1, "moe_ffn_hidden_size": 33, "mlp_type": "residual"},
        "--moe-ffn-hidden-size",
        "a residual MLP of width 33",
        {"mlp_type": "standard"},
    ),
    case(
        "sequence_parallel_needs_tensor_parallel",
        {"sequence_parallel": True},
        "--sequence-parallel",
        "parallel-size > 1",
        TP2,
    ),
    case(
        "tensor_parallel_experts_need_sequence_parallel",
        {**MEGATRON, **TP2},
        "--sequence-parallel",
        "must be on",
        {"sequence_parallel": True},
    ),
    case(
        "sequence_by_ranks",
        {"context_parallel_size": 3},
        "--seq-length",
        "divisible by 6",
        {"seq_length": 252},
    ),
    case(
        "sequence_by_ranks",
        {**TP2, "sequence_parallel": True, "seq_length": 33},
        "--seq-length",
        "by 2",
        {"sequence_parallel": False},
    ),
    case(
        "layers_by_pipeline",
        {"pipeline_model_parallel_size": 5},
        "--num-layers",
        "each of 5 pipeline stages",
        {"num_layers": 5},
    ),
    case(
        "layers_by_pipeline",
        {"pipeline_model_parallel_size": 3, **MEGATRON},
        "--num-layers",
        "stages = 3",
        {"engine": "deepspeed"},
    ),
    case(
        "layers_by_pipeline",
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "num_layers": 6},
        "--num-layers",
        "stages = 4",
        {"num_layers": 8},
    ),
    case(
        "virtual_pipeline_needs_pipeline",
        {"virtual_pipeline_model_parallel_size": 2},
        "--virtual-pipeline-model-parallel-size",
        "needs --pipeline",
        {"pipeline_model_parallel_size": 2},
    ),
    case(
        "global_batch_by_micro_batches",
        {"global_batch_size": 12, "micro_batch_size": 4},
        "--global-batch-size",
        "data-parallel ranks = 4 x 2",
        {"global_batch_size": 16},
        2,
    ),
    case(
        "global_batch_by_micro_batches",
        {"global_batch_size": 6},
        "--global-batch-size",
        "size = 4",
        {"micro_batch_size": 3},
    ),
    case(
        "micro_batches_by_pipeline",
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "global_batch_size": 12,
        },
        "--global-batch-size",
        "3 micro-batches",
        {"global_batch_size": 16},
        2,
    ),
    case("min_lr_within_lr", {"min_lr": 1.0}, "--min-lr", "at most --lr = 0.0003", {"lr": 1.0}),
    case(
        "warmup_within_decay",
        {"lr_warmup_iters": 101},
        "--lr-warmup-iters",
        "--train-iters = 100",
        {"train_iters": 101},
    ),
    case(
        "warmup_within_decay",
        {"lr_warmup_iters": 60, "lr_decay_iters": 50},
        "--lr-warmup-iters",
        "decay-iters = 50",
        {"lr_warmup_iters": 50},
    ),
    case(
        "wsd_decay_fits",
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 60, "lr_warmup_iters": 50},
        "--lr-wsd-decay-iters",
        "at most 50",
        {"lr_wsd_decay_iters": 50},
    ),
    case("finetune_needs_load", {"finetune": True}, "--finetune", "needs --load", {"load": "runs/base"}),
    case("some_data", {"data_path": ()}, "--data-path", "no training data", {"train_data_path": ("a",)}),
    case(
        "some_data",
        {"data_path": (), "valid_data_path": ("a",)},
        "--data-path",
        "no training data",
        {"data_path": ("a",)},
    ),
    case("some_data", {"data_path": ()}, "--data-path", "no training data", {"data_schedule": "mixes.yaml"}),
    case(
        "split_is_three_shares",
        {"data_path": (), "data_schedule": "m", "split": "0,1"},
        "--split",
        "nothing to train on",
        {"split": "1"},
    ),
    case(
        "one_source_of_data",
        {"train_data_path": ("a",)},
        "--train-data-path",
        "beside --data-path",
        {"data_path": ()},
    ),
    case(
        "one_source_of_data",
        {"test_data_path": ("a",)},
        "--test-data-path",
        "beside --data-path",
        {"test_data_path": ()},
    ),
    case(
        "schedule_is_one",
        {"data_schedule": "[{from_step: 3, data_path: [a]}]"},
        "--data-schedule",
        "begins at step 3",
        {"data_schedule": None},
    ),
    case(
        "blends",
        {"data_path": ("0.3", "a", "0.7")},
        "--data-path",
        "alternate",
        {"data_path": ("0.3", "a", "0.7", "b")},
    ),
    case(
        "blends",
        {"data_path": ("0.3", "a", "b", "c")},
        "--data-path",
        "alternate",
        {"data_path": ("a", "b", "c")},
    ),
    case(
        "blends",
        {"data_path": ("0.0", "a", "1", "b")},
        "--data-path",
        "greater than 0",
        {"data_path": ("1", "b")},
    ),
    case(
        "blends",
        {"data_path": ("nan", "a", "1", "b")},
        "--data-path",
        "greater than 0",
        {"data_path": ("1", "b")},
    ),
    case(
        "blends",
        {"data_path": ("inf", "a", "1", "b")},
        "--data-path",
        "greater than 0",
        {"data_path": ("1", "b")},
    ),
    case(
        "split_is_three_shares",
        {"split": "969;30;1"},
        "--split",
        "non-negative numbers",
        {"split": "969, 30, 1"},
    ),
    case(
        "split_is_three_shares", {"split": "98,-2,1"}, "--split", "non-negative numbers", {"split": "98,2,0"}
    ),
    case("split_is_three_shares", {"split": "1,1,1,1"}, "--split", "up to three", {"split": "100"}),
    case("split_is_three_shares", {"split": "0,0,0"}, "--split", "greater than 0", {"split": "1,0,0"}),
    case("split_is_three_shares", {"split": "0,1,1"}, "--split", "nothing to train on", {"split": ".5,1,1"}),
    case(
        "tokenizer_is_complete",
        {"tokenizer_type": "HuggingFaceTokenizer"},
        "--tokenizer-type",
        "tokenizer-model",
        {"tokenizer_model": "t.json"},
    ),
    case(
        "tokenizer_is_complete",
        {"tokenizer_type": "NullTokenizer"},
        "--tokenizer-type",
        "needs --vocab-size",
        {"vocab_size": 99},
    ),
    case(
        "in_this_version",
        {"context_parallel_size": 2},
        "--context-parallel-size",
        "context",
        {"context_parallel_size": 1},
    ),
    case(
        "in_this_version",
        {"virtual_pipeline_model_parallel_size": 2},
        "--virtual-pipeline-model-parallel-size",
        "interleaved",
        {"virtual_pipeline_model_parallel_size": 1},
    ),
    case("in_this_version", {"context_parallel_size": 2}, "--context-parallel-size", "context", MEGATRON),
    case("zero_3_with_experts", {"zero_stage": 3}, "--zero-stage", "mixture-of-experts", {"zero_stage": 2}),
    case(
        "zero_3_with_experts",
        {"zero_stage": 3, "pipeline_model_parallel_size": 2},
        "--zero-stage",
        "refused",
        {"zero_stage": 1},
    ),
    case(
        "zero_2_without_pipeline",
        {"zero_stage": 2, "pipeline_model_parallel_size": 2},
        "--zero-stage",
        "pipeline",
        {"zero_stage": 1},
    ),
    case(
        "zero_0_alone",
        {"zero_stage": 0, "expert_model_parallel_size": 2},
        "--zero-stage",
        "norms",
        {"zero_stage": 1},
    ),
    case(
        "zero_0_alone", {"zero_stage": 0, **TP2}, "--zero-stage", "norms", {"tensor_model_parallel_size": 1}
    ),
    case(
        "zero_0_alone",
        {"zero_stage": 0, "pipeline_model_parallel_size": 2},
        "--zero-stage",
        "norms",
        {"pipeline_model_parallel_size": 1},
    ),
    case("zero_0_in_float32", {"zero_stage": 0, "bf16": True}, "--zero-stage", "bfloat16", {"zero_stage": 1}),
    case(
        "zero_0_in_float32", {"zero_stage": 0, "bf16": True}, "--zero-stage", "wrong norms", {"bf16": False}
    ),
    case(
        "settings_of_the_other_engine",
        {"use_distributed_optimizer": True},
        "--use-distributed-optimizer",
        "megatron engine",
        MEGATRON,
    ),
    case(
        "settings_of_the_other_engine",
        {"overlap_grad_reduce": True},
        "--overlap-grad-reduce",
        "megatron engine",
        MEGATRON,
    ),
    case(
        "settings_of_the_other_engine",
        {"overlap_param_gather": True},
        "--overlap-param-gather",
        "megatron engine",
        MEGATRON,
    ),
    case(
        "settings_of_the_other_engine",
        {"moe_token_dispatcher_type": "allgather"},
        "--moe-token-dispatcher-type",
        "megatron engine, and the engine is deepspeed",
        {"moe_token_dispatcher_type": "alltoall"},
    ),
    case(
        "settings_of_the_other_engine",
        {**MEGATRON, "zero_stage": 2},
        "--zero-stage",
        "deepspeed engine",
        {"engine": "deepspeed"},
    ),
    case(
        "documents_need_attention_of_ours",
        {**MEGATRON, "transformer_impl": "transformer_engine", "reset_attention_mask": True},
        "--transformer-impl",
        "knows no documents",
        {"transformer_impl": "auto"},
    ),
    case(
        "documents_need_attention_of_ours",
        {**MEGATRON, "transformer_impl": "transformer_engine", "reset_position_ids": True},
        "--transformer-impl",
        "knows no documents",
        {"reset_position_ids": False},
    ),
    case(
        "packed_documents_stay_apart",
        {"pack_documents": True, "eod_mask_loss": True},
        "--pack-documents",
        "--reset-attention-mask",
        {"reset_attention_mask": True},
    ),
    case(
        "packed_documents_stay_apart",
        {"pack_documents": True, "reset_attention_mask": True},
        "--pack-documents",
        "--eod-mask-loss",
        {"eod_mask_loss": True},
    ),
    case(
        "packing_knows_all_documents",
        {**PACKED, "data_index": "on-demand"},
        "--data-index",
        "sort all documents",
        {"data_index": "auto"},
    ),
    case(
        "packing_knows_all_documents",
        {**PACKED, "data_schedule": "mixes.yaml"},
        "--data-schedule",
        "another mix",
        {"data_schedule": None},
    ),
    case(
        "settings_of_the_other_engine",
        {"transformer_impl": "transformer_engine"},
        "--transformer-impl",
        "megatron engine",
        MEGATRON,
    ),
    case(
        "settings_of_the_other_engine",
        {**MEGATRON, "mlp_type": "residual"},
        "--mlp-type",
        "deepspeed engine",
        {"engine": "deepspeed"},
    ),
    case(
        "settings_of_the_other_engine",
        {**MEGATRON, "zero_stage": 3},
        "--zero-stage",
        "deepspeed engine",
        {"zero_stage": 1},
    ),
    case(
        "settings_of_the_other_engine",
        {**MEGATRON, "deepspeed_config": "x"},
        "--deepspeed-config",
        "deepspeed engine",
        {"deepspeed_config": None},
    ),
    case(
        "param_gather_has_parts_to_gather",
        {**MEGATRON, "overlap_param_gather": True},
        "--overlap-param-gather",
        "needs --use-distributed-optimizer and --overlap-grad-reduce",
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    ),
    case(
        "param_gather_has_parts_to_gather",
        {**MEGATRON, "overlap_param_gather": True, "use_distributed_optimizer": True},
        "--overlap-param-gather",
        "needs --overlap-grad-reduce",
        {"overlap_param_gather": False},
    ),
    case(
        "capacity_of_whole_samples",
        {**MEGATRON, **TP2, "sequence_parallel": True, "moe_expert_capacity_factor": 1.0},
        "--moe-expert-capacity-factor",
        "tokens of one rank",
        {"engine": "deepspeed"},
    ),
    case(
        "capacity_of_whole_samples",
        {**MEGATRON, "context_parallel_size": 2, "moe_expert_capacity_factor": 1.0},
        "--moe-expert-capacity-factor",
        "cuts samples",
        {"moe_expert_capacity_factor": None},
    ),
    case(
        "flex_has_its_kernels",
        {**MEGATRON, "moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2},
        "--moe-token-dispatcher-type",
        "deep_ep, which is not installed",
        {"moe_token_dispatcher_type": "alltoall"},
    ),
    case(
        "flex_has_ranks_to_dispatch_to",
        {**MEGATRON, "moe_token_dispatcher_type": "flex"},
        "--moe-token-dispatcher-type",
        "several ranks",
        {"expert_model_parallel_size": 2},
    ),
    case(
        "deepspeed_json",
        {"deepspeed_config": "/no/such.json"},
        "--deepspeed-config",
        "No such file",
        {"deepspeed_config": None},
    ),
]


@pytest.fixture(autouse=True)
def no_deep_ep(monkeypatch):
    """The same answers where it is installed."""
    monkeypatch.setattr(megatron, "installed", lambda library: library != "deep_ep")


@pytest.fixture
def base(routers) -> RunConfig:
    return parse(["--data-path", "corpus"], routers=routers)


def test_the_base_breaks_no_rule(base):
    assert problems(base, world_size=1) == []
    assert problems(base, world_size=None) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{'-'.join(case.settings)}")
def test_rule(case, base):
    config = replace_leaves(base, **case.settings)
    found = list(BY_NAME[case.rule](config, case.world_size))
    assert [problem.field for problem in found] == [case.field]
    assert case.words in found[0].rule
    assert found[0].remedy
    assert found[0] in problems(config, world_size=case.world_size)
    mended = replace_leaves(config, **case.mended)
    assert list(BY_NAME[case.rule](mended, case.world_size)) == []


def test_every_rule_has_a_case():
    assert {case.rule for case in CASES} == set(BY_NAME)
    assert len(BY_NAME) == len(RULES)


def test_rules_about_ranks_are_silent_where_the_ranks_are_not_known(base):
    for case in CASES:
        if case.world_size is not None and "global_batch" not in case.rule:
            assert list(BY_NAME[case.rule](replace_leaves(base, **case.settings), None)) == [], case


def test_a_rule_that_looked_at_a_doubtful_setting_is_silent(base):
    config = replace_leaves(base, hidden_size=250, min_lr=1.0)
    assert [p.field for p in problems(config, world_size=None)] == ["--hidden-size", "--min-lr"]
    assert [p.field for p in problems(config, world_size=None, unsure={"num_attention_heads"})] == [
        "--min-lr"
    ]
    assert [p.field for p in problems(config, world_size=None, unsure={"train_iters"})] == [
        "--hidden-size",
        "--min-lr",
    ]
    wide = replace_leaves(base, **{"router.hypernet_width": 10**6})
    assert problems(wide, world_size=None, unsure={"router.bias"}) == []


def test_a_tree_without_a_registry_can_be_checked():
    assert [p.field for p in problems(RunConfig(), world_size=1)] == ["--data-path"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moe_router_topk": 1}, "no gradient"),
        ({"topk_schedule": "linear", "topk_start": 1}, "no gradient"),
        ({"router.seed": 3, "num_layers": 3, "moe_aux_loss_coeff": 0.0}, "no loss in 3 layers"),
        ({"eval_interval": 101}, "no evaluation during training"),
        ({"save_interval": 101}, "one checkpoint"),
        ({"topk_schedule": "linear", "topk_start": 8, "topk_schedule_steps": 200}, "k does not reach 2"),
        ({"lr_decay_iters": 40}, "last 60 steps"),
        ({"tokenizer_model": "t.json"}, "--tokenizer-model is ignored"),
        ({"vocab_size": 9}, "--vocab-size is ignored"),
        ({"lr_wsd_decay_iters": 9}, "--lr-wsd-decay-iters is ignored"),
        ({"lr_decay_style": "constant", "min_lr": 1e-9}, "--lr-decay-style is constant"),
    ],
)
def test_warnings(settings, words, base):
    quiet = replace_leaves(base, eval_interval=50)
    assert warnings(quiet) == []
    (warning,) = warnings(replace_leaves(quiet, **settings))
    assert words in warning


def test_no_warning_where_there_is_nothing_to_route(base):
    assert warnings(replace_leaves(base, eval_interval=0, num_experts=1, moe_router_topk=1)) == []


@pytest.mark.parametrize(
    "layout",
    [
        TP2,
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"expert_model_parallel_size": 2},
    ],
)
def test_dropout_on_a_layout(layout, base):
    config = replace_leaves(base, eval_interval=0, hidden_dropout=0.1, attention_dropout=0.1)
    assert warnings(config) == []
    found = warnings(replace_leaves(config, **layout))
    assert [warning.split()[0] for warning in found] == ["--hidden-dropout", "--attention-dropout"]
    assert all(f"with --{next(iter(layout)).replace('_', '-')}," in warning for warning in found)
    assert warnings(replace_leaves(config, **layout, hidden_dropout=0.0, attention_dropout=0.0)) == []


def test_flex_where_its_kernels_are(base, monkeypatch):
    monkeypatch.setattr(megatron, "installed", lambda library: library == "deep_ep")
    flex = replace_leaves(
        base, engine="megatron", moe_token_dispatcher_type="flex", expert_model_parallel_size=2
    )
    assert problems(flex, world_size=2) == []


def test_installed_finds_without_importing():
    assert INSTALLED("json") and not INSTALLED("no_such_library")


@pytest.mark.parametrize(
    "settings",
    [
        {**TP2},
        {**TP2, "sequence_parallel": True, "zero_stage": 2},
        {**TP2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 4},
        {**TP2, "pipeline_model_parallel_size": 2},
        {
            **TP2,
            "expert_tensor_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "moe_expert_capacity_factor": 1.0,
        },
        {
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "bf16": True,
            "recompute_granularity": "full",
        },
        {
            **MEGATRON,
            **TP2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
        },
        {
            **MEGATRON,
            **TP2,
            "sequence_parallel": True,
            "expert_tensor_parallel_size": 1,
            "expert_model_parallel_size": 4,
            "bf16": True,
        },
        {
            **MEGATRON,
            "context_parallel_size": 2,
            "expert_model_parallel_size": 4,
            "moe_token_dispatcher_type": "allgather",
        },
        {
            **MEGATRON,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "global_batch_size": 16,
        },
        {
            **MEGATRON,
            "expert_model_parallel_size": 4,
            "moe_expert_capacity_factor": 1.0,
            "recompute_granularity": "selective",
        },
        {
            **MEGATRON,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "use_distributed_optimizer": True,
        },
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_layouts_that_run_on_four_ranks(settings, base):
    assert problems(replace_leaves(base, **settings), world_size=4) == []


def test_bf16_without_a_gpu(base):
    config = replace_leaves(base, eval_interval=0, bf16=True)
    assert [warnings(config), warnings(config, has_gpu=True)] == [[], []]
    assert "slower" in warnings(config, has_gpu=False)[0]


def test_warnings_of_a_tree_without_a_registry():
    assert warnings(RunConfig(router=RouterChoice(name="hyper"))) == [warnings(RunConfig())[0]]
