"""check.py and rules/: each rule refuses what it should, says why, and is silent once its remedy is taken."""

from __future__ import annotations

import pytest
from config import rule_cases_family, rule_cases_first, rule_cases_second

from megatron_hyperrouter.config.check import RULES, problems, warnings
from megatron_hyperrouter.config.cli import parse, replace_leaves
from megatron_hyperrouter.config.rules import megatron
from megatron_hyperrouter.config.tree import RouterChoice, RunConfig

INSTALLED = megatron.installed  # before a test replaces it
BY_NAME = {rule.__name__: rule for rule in RULES}
MEGATRON = {"engine": "megatron"}
TP2 = {"tensor_model_parallel_size": 2}

CASES = [*rule_cases_first.CASES, *rule_cases_second.CASES, *rule_cases_family.CASES]


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
        ({"eval_interval": 101}, "validation runs only at the end"),
        ({"save_interval": 101}, "a checkpoint is saved only at the end"),
        (
            {"topk_schedule": "linear", "topk_start": 8, "topk_schedule_steps": 200},
            "experts (k) does not reach 2",
        ),
        ({"lr_decay_iters": 40}, "last 60 steps"),
        ({"tokenizer_model": "t.json"}, "--tokenizer-model is ignored"),
        ({"vocab_size": 9}, "--vocab-size is ignored"),
        ({"lr_wsd_decay_iters": 9}, "--lr-wsd-decay-iters is ignored"),
        ({"lr_wsd_decay_style": "linear"}, "--lr-wsd-decay-style is ignored"),
        ({"profile": True, "train_iters": 10, "eval_interval": 0}, "--profile writes no trace"),
        ({"lr_decay_style": "constant", "min_lr": 1e-9}, "--lr-decay-style is constant"),
    ],
)
def test_warnings(settings, words, base):
    quiet = replace_leaves(base, eval_interval=50)
    assert warnings(quiet) == []
    (warning,) = warnings(replace_leaves(quiet, **settings))
    assert words in warning


def test_ranks_of_a_trace_that_the_run_does_not_have(base):
    def told(world_size, *ranks):
        config = replace_leaves(base, eval_interval=50, profile=True, profile_ranks=ranks)
        return [line for line in warnings(config, world_size=world_size) if "--profile" in line]

    assert told(None, 7) == told(8, 7) == told(1, 0) == []
    assert told(1, 7) == ["--profile writes no trace: --profile-ranks = 7, but this run has only rank 0"]
    assert told(2, 0, 7) == [
        "--profile writes no trace for 7: --profile-ranks = 0 7, but this run has only ranks 0 to 1"
    ]


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
