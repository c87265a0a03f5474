"""Our routers in megatron-core layers that a caller built: against plain loops on several layouts, and in
training.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from program.launched import Zygote

from megatron_hyperrouter import megatron_router_builder
from megatron_hyperrouter.engines.megatron.routed import RoutedMoELayer
from megatron_hyperrouter.errors import ConfigError, HostError
from megatron_hyperrouter.routers.base import RunFacts

WORKER = Path(__file__).with_name("plug_worker.py")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "library" / "megatron_core.py"
TP = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"layout": {}}),
    "one, k = 1": (1, {"layout": {}, "config": {"moe_router_topk": 1, "moe_router_pre_softmax": True}}),
    "one, drops the light": (1, {"layout": {}, "config": {"moe_expert_capacity_factor": 0.6}}),
    "one, drops the late": (
        1,
        {"layout": {}, "config": {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "position"}},
    ),
    "one, pads": (
        1,
        {
            "layout": {},
            "config": {"moe_expert_capacity_factor": 1.1, "moe_pad_expert_input_to_capacity": True},
        },
    ),
    "EP2": (2, {"layout": {"expert_model_parallel_size": 2}}),
    "EP2, allgather": (
        2,
        {"layout": {"expert_model_parallel_size": 2}, "config": {"moe_token_dispatcher_type": "allgather"}},
    ),
    "CP2": (2, {"layout": {"context_parallel_size": 2}}),
    "TP2 with sequence parallelism": (2, {"layout": TP, "config": {"sequence_parallel": True}}),
    "TP2xEP2": (2, {"layout": TP | {"expert_model_parallel_size": 2}, "config": {"sequence_parallel": True}}),
}


@pytest.fixture(scope="module")
def told(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """(router, case) -> differences from the loop on each rank."""
    found = {}
    for ranks in (1, 2):
        keys = [
            (router, name)
            for router in ("topk", "hyper")
            for name, (need, _) in CASES.items()
            if need == ranks
        ]
        answer = tmp_path_factory.mktemp("plug") / "answer.json"
        zygote.run(
            [answer, json.dumps([CASES[name][1] | {"router": router} for router, name in keys])],
            program=WORKER,
            ranks=ranks,
        )
        found.update(zip(keys, map(list, zip(*json.loads(answer.read_text()), strict=True)), strict=True))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("router", ["topk", "hyper"])
def test_layer_is_a_loop_over_experts(
    told: dict[tuple[str, str], list[dict[str, float]]], router: str, name: str
) -> None:
    for rank in told[router, name]:
        assert rank["output"] < 1e-5 and rank["x"] < 1e-5 and rank["router"] < 1e-4, rank
        assert rank["router grad"] > 1e-3
        assert rank["counts"] < 1e-6, "what all ranks chose, by RouterSteps"
        assert rank["marked"] == float("TP2" in name)  # so that the host sums its gradient over the TP ranks


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_example(zygote: Zygote, ranks: int) -> None:
    lines = [
        line
        for line in zygote.run([], program=EXAMPLE, ranks=ranks).stdout.splitlines()
        if line.startswith("step ")
    ]
    losses = [float(line.split("loss ")[1]) for line in lines]
    assert len(losses) == 4 and losses[-1] < losses[0] < 3 and losses[-1] < 0.2, lines


def config(**fields: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, num_moe_experts=4, add_bias_linear=False, **fields
    )


class TestTheBuilder:
    def test_takes_what_later_hosts_add(self) -> None:
        slot = megatron_router_builder("hyper", hypernet_width=5)(
            config=config(), pg_collection=None, is_mtp_layer=False
        )
        slot.set_layer_number(4)
        assert (slot.router.name, slot.router.layer_number, slot.router.config.hypernet_width) == (
            "hyper",
            4,
            5,
        )

    @pytest.mark.parametrize(
        ("fields", "coefficients"),
        [
            ({}, (0.0, 0.0)),
            ({"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.2}, (0.1, 0.2)),
            ({"moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "none"}, (0.0, 0.0)),
        ],
    )
    def test_coefficients_are_the_models(
        self, fields: dict[str, Any], coefficients: tuple[float, float]
    ) -> None:
        slot = megatron_router_builder("topk")(config=config(**fields), pg_collection=None)
        slot.set_layer_number(1)
        assert (slot.router.aux_loss_coeff, slot.router.z_loss_coeff) == coefficients

    def test_state_dict_holds_the_embedding_and_no_generated_weight(self) -> None:
        slot = megatron_router_builder("hyper")(config=config(), pg_collection=None)
        slot.set_layer_number(1)
        assert (
            "router.embedding_S" in slot.state_dict()
            and sum(parameter.numel() for parameter in slot.parameters()) == 8
        )

    def test_layers_of_the_model_reach_the_router_and_other_facts_by_hand(self) -> None:
        for facts, expected in ((None, (2, 1000)), (RunFacts(num_layers=5, train_iters=9), (5, 9))):
            slot = megatron_router_builder("competesmoe", facts=facts)(config=config(), pg_collection=None)
            slot.set_layer_number(1)
            assert slot.router.facts[:2] == expected

    def test_a_method_that_follows_the_step_warns(self) -> None:
        slot = megatron_router_builder("topk", expert_bias=True)(config=config(), pg_collection=None)
        with pytest.warns(UserWarning, match=r"--router.expert-bias needs the expert loads of all ranks"):
            slot.set_layer_number(1)

    @pytest.mark.parametrize(
        ("fields", "recompute", "words"),
        [
            ({"moe_shared_expert_overlap": True}, False, "moe_shared_expert_overlap"),
            ({"moe_latent_size": 4}, False, "moe_latent_size"),
            ({"moe_pad_expert_input_to_capacity": True}, True, 'capacity, recompute_modules with "moe"'),
        ],
    )
    def test_layers_in_which_experts_cannot_be_consulted_are_refused(
        self, fields: dict[str, Any], recompute: bool, words: str
    ) -> None:
        plain = {
            "moe_shared_expert_overlap": False,
            "moe_latent_size": None,
            "moe_pad_expert_input_to_capacity": False,
        }
        slot = megatron_router_builder("competesmoe")(config=config(), pg_collection=None)
        slot.set_layer_number(1)

        def layer(chosen: dict[str, Any], *, recompute: bool) -> Any:
            return SimpleNamespace(
                config=SimpleNamespace(**chosen),
                shared_expert_overlap=chosen["moe_shared_expert_overlap"],
                moe_layer_recompute=recompute,
                router=slot,
            )

        with pytest.raises(HostError, match=words):
            RoutedMoELayer._refuse(layer(plain | fields, recompute=recompute))
        RoutedMoELayer._refuse(layer(plain, recompute=False))

    def test_unknown_router(self) -> None:
        with pytest.raises(ConfigError, match="did you mean hyper"):
            megatron_router_builder("hiper")

    def test_unknown_option(self) -> None:
        slot = megatron_router_builder("hyper", hypernet_with=3)(config=config(), pg_collection=None)
        with pytest.raises(ConfigError, match="did you mean hypernet_width"):
            slot.set_layer_number(1)

    def test_settings_of_the_stock_router_are_refused_all_at_once(self) -> None:
        fields = {
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_input_jitter_eps": 0.1,
            "moe_router_pre_softmax": True,
            "moe_router_topk_scaling_factor": 2.0,
        }
        with pytest.raises(ConfigError) as caught:
            megatron_router_builder("hyper")(config=config(**fields), pg_collection=None)
        assert {problem.field for problem in caught.value.problems} == set(fields)
