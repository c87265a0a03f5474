"""Options that every router has, and the choice that routers by logits share."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.config.check import warnings
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.ops.schedule import topk_at
from megatron_hyperrouter.routers import RunFacts
from megatron_hyperrouter.routers.base import Tokens

SIZES = {"hidden_size": 16, "num_experts": 8, "topk": 2, "seed": 3}
CHOOSING = ("topk", "hyper", "smoe_dropout")
GROUPS = {"num_groups": 4, "group_topk": 2}
ALWAYS = {"version": "v2", "rate": 1.0, "warm_up": 0.0, "max_competing": 3}  # of CompeteSMoE: competes


def tokens() -> torch.Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_can_be_limited_to_groups(name):
    free, limited = build_router(name, **SIZES), build_router(name, **SIZES, **GROUPS)
    for k in (1, 2, 3, 4):
        routing, before = limited(tokens(), topk=k), free(tokens(), topk=k)
        used = [set(row) for row in (routing.experts_TK // 2).tolist()]
        assert max(map(len, used)) <= 2
        assert torch.equal(routing.logits_TE, before.logits_TE)
    assert any(len(set(row)) > 2 for row in (free(tokens(), topk=4).experts_TK // 2).tolist())
    with pytest.raises(
        ValueError, match="topk = 5: must be from 1 to the number of experts in group_topk groups = 4"
    ):
        limited(tokens(), topk=5)


class Bank:
    """Eight linear experts."""

    def scores_TE(self, x_TD: torch.Tensor, score):
        experts_EDD = torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(7)) / 4
        return score(torch.einsum("td,edf->tef", x_TD.float(), experts_EDD))


def in_two_groups(scores: list[float], k: int) -> list[int]:
    """The two groups whose best expert (k // group_topk = 1) is best; then the best experts in them."""
    groups = sorted(range(4), key=lambda group: -max(scores[2 * group : 2 * group + 2]))[:2]
    allowed = [expert for expert in range(8) if expert // 2 in groups]
    return sorted(allowed, key=lambda expert: -scores[expert])[:k]


def test_winners_of_a_competition_are_in_the_best_groups():
    router, bank, x_TD = build_router("competesmoe", **SIZES, **GROUPS, **ALWAYS), Bank(), tokens()
    assert router.wants_outputs(router.at(step=0, experts=bank))
    found = router(x_TD, topk=3, experts=bank).experts_TK.tolist()
    rows = bank.scores_TE(x_TD, router.score).tolist()
    assert found == [in_two_groups(row, 3) for row in rows]
    assert found != [sorted(range(8), key=lambda expert: -row[expert])[:3] for row in rows]


def test_the_frozen_choice_of_stablemoe_is_in_the_best_groups():
    sizes = {**SIZES, "stage1_steps": 1, "facts": RunFacts(num_layers=2, train_iters=9, vocab_size=32)}
    words = Tokens(torch.arange(64) % 32, torch.arange(64), 64)
    free, limited = build_router("stablemoe", **sizes), build_router("stablemoe", **sizes, **GROUPS)
    for router, most in ((limited, 2), (free, 4)):
        chosen = router(tokens(), step=1, topk=4, tokens=words).experts_TK
        assert max(len(set(row)) for row in (chosen // 2).tolist()) == most


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_can_scale_its_weights(name):
    plain, scaled = build_router(name, **SIZES), build_router(name, **SIZES, scaling_factor=2.5)
    one, other = plain(tokens()), scaled(tokens())
    assert torch.equal(one.experts_TK, other.experts_TK)
    torch.testing.assert_close(other.weights_TK, one.weights_TK * 2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 4}, "needs --router.group-topk"),
        ({"group_topk": 4}, "needs --router.num-groups"),
        ({"num_groups": 3, "group_topk": 1}, "must divide --num-experts = 8"),
        ({"num_groups": 4, "group_topk": 5}, "must be at most --router.num-groups = 4"),
        (
            {"num_groups": 8, "group_topk": 1},
            "must be at most 1, the number of experts in --router.group-topk = 1",
        ),
    ],
)
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_bad_groups(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_router(name, **SIZES, **options)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize(
    "options",
    [
        {"score_function": "sigmoid", "renormalise": True, "expert_bias": True, **GROUPS},
        {"pre_softmax": True, "scaling_factor": 16.0},
        {"aux_loss": "global_batch"},
    ],
)
def test_a_folded_router_chooses_and_weighs_the_same(name, options):
    router = build_router(name, **SIZES, aux_loss_coeff=0.01, **options)
    for buffer in ("choice_bias_E", "share_E"):
        if hasattr(router, buffer):
            getattr(router, buffer).copy_(torch.rand(8, generator=torch.Generator().manual_seed(2)))
    one, other = router(tokens()), router.fold()(tokens())
    assert torch.equal(one.experts_TK, other.experts_TK)
    torch.testing.assert_close(one.weights_TK, other.weights_TK)
    torch.testing.assert_close(one.losses, other.losses)


@pytest.mark.parametrize("name", CHOOSING)
def test_the_balance_loss_can_be_switched_off(name):
    assert "aux" in build_router(name, **SIZES, aux_loss_coeff=0.01)(tokens()).losses
    assert not build_router(name, **SIZES, aux_loss_coeff=0.01, aux_loss="off")(tokens()).losses


def test_groups_leave_room_for_a_schedule():
    router = build_router("hyper", **{**SIZES, "topk": partial(topk_at, start=1, end=4, steps=3)}, **GROUPS)
    assert [router(tokens(), step=step).experts_TK.size(1) for step in range(4)] == [1, 2, 3, 4]


def test_a_run_with_more_experts_than_its_groups_have_is_refused():
    flags = "--data-path x --num-experts 8 --moe-router-topk 5 --router.num-groups 4 --router.group-topk 2"
    with pytest.raises(
        ConfigError, match=r"must be at most 4, the number of experts in --router\.group-topk = 2 g"
    ):
        parse(flags.split(), routers=ROUTERS)


@pytest.mark.parametrize("name", ["topk", "smoe_dropout", "hyper"])
@pytest.mark.parametrize("wanted", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"init": "paper", "bias": True, "embedding_size": 40}])
def test_logits_start_with_the_standard_deviation_that_is_asked_for(name, wanted, options):
    if options and name != "hyper":
        return
    stds = []
    for seed in range(12):
        router = build_router(
            name, hidden_size=64, num_experts=32, topk=2, seed=seed, logit_std=wanted, **options
        )
        x_TD = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))
        stds.append(float(router(x_TD).logits_TE.detach().var().sqrt()))
    assert router.config.initial_logit_std(64) == wanted
    assert sum(stds) / len(stds) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("name", "options"),
    [("topk", {}), ("smoe_dropout", {"init_std": 0.3}), ("hyper", {}), ("hyper", {"init": "paper"})],
)
def test_what_options_say_of_the_initial_scale_is_what_routers_draw(name, options):
    stds = []
    for seed in range(12):
        router = build_router(name, hidden_size=64, num_experts=32, topk=2, seed=seed, **options)
        x_TD = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))
        stds.append(float(router(x_TD).logits_TE.detach().var().sqrt()))
    expected = router.config.initial_logit_std(64)
    assert sum(stds) / len(stds) == pytest.approx(expected, rel=0.1)


def test_two_scales_are_one_too_many():
    with pytest.raises(ConfigError, match="init-std also sets"):
        build_router("topk", hidden_size=8, num_experts=4, topk=2, logit_std=1.0, init_std=0.5)
    with pytest.raises(ConfigError, match="has no trainable parameters"):
        build_router("smoe_dropout", hidden_size=8, num_experts=4, topk=2, lr_mult=3.0)


def test_a_run_whose_logits_start_saturated_is_warned():
    """The published initial values grow with the hidden size: 18.5 at 4096."""
    flags = "--mock-data --hidden-size 4096 --num-attention-heads 32 --router.init paper"
    words = flags.split()
    (found,) = [word for word in warnings(parse(words, routers=ROUTERS, world_size=1)) if "logits" in word]
    assert "standard deviation of 18.5" in found
    words += ["--router.logit-std", "1"]
    assert not [word for word in warnings(parse(words, routers=ROUTERS, world_size=1)) if "logits" in word]


@pytest.mark.parametrize("name", ["topk", "stablemoe", "simsmoe", "competesmoe"])
def test_the_remedy_of_saturated_logits_is_accepted(name: str) -> None:
    flags = f"--mock-data --hidden-size 256 --router.name {name} --router.init-std"
    told = [
        [
            word
            for word in warnings(parse([*flags.split(), std], routers=ROUTERS, world_size=1))
            if "logits" in word
        ]
        for std in ("0.5", "0.062")
    ]
    assert [len(found) for found in told] == [1, 0] and "use --router.init-std 0.062 " in told[0][0]
