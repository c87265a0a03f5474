"""Dense layers, shared experts, latent attention, groups of experts, windows and multi-token prediction give
the run of one process on every layout of both engines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import run_ranks
from engines.layout_table import WORKER, Layout, Table, assert_same_run, case_of, run_table
from engines.layout_worker import tiny_config
from program.launched import Zygote

from megatron_hyperrouter.analysis.shapes import shapes_of
from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS, router_parameter

TP2 = "--tensor-model-parallel-size 2"
SP = "--sequence-parallel"
EP2 = "--expert-model-parallel-size 2"
ETP1 = "--expert-tensor-parallel-size 1"
CP2 = "--context-parallel-size 2"
MEGATRON = "--engine megatron"
# Two stages, of which DeepSpeed wants each to have experts.
PP2 = "--pipeline-model-parallel-size 2"
DEEPER = "--num-layers 4 --moe-layer-freq [0,1,1,1]"
SHARED = "--moe-layer-freq [0,1] --ffn-hidden-size 40 --moe-shared-expert-intermediate-size 24"
FAMILIES = {
    "dense, shared, windows": f"hyper {SHARED} --moe-shared-expert-gate --add-qkv-bias --rotary-percent 0.5 "
    "--window-size 6,0 --window-attn-skip-freq 2",
    "latent, groups": f"hyper {SHARED} --multi-latent-attention --num-query-groups 4 --q-lora-rank 12 "
    "--kv-lora-rank 8 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 --rotary-scaling-factor 4 "
    "--original-max-position-embeddings 8 --mscale 0.7 --mscale-all-dim 1 --num-experts 8 "
    "--router.num-groups 4 --router.group-topk 2 --router.score-function sigmoid --router.renormalise "
    "--router.expert-bias --router.aux-loss sequence --router.scaling-factor 2.5",
    "latent, full-rank queries": f"topk {SHARED} --multi-latent-attention --num-query-groups 4 "
    "--kv-lora-rank 8 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 --rope-type rope "
    "--qk-layernorm false",
}
RECOMPUTED = "--recompute-granularity selective --recompute-modules core_attn mlp moe shared_experts"
BOTH = {
    "EP2": Layout(2, EP2),
    "EP2, every part recomputed": Layout(2, f"{EP2} {RECOMPUTED}"),
    "PP2, 3 layers and 1": Layout(2, f"{PP2} --decoder-last-pipeline-num-layers 1", DEEPER),
    "TP2, SP": Layout(2, f"{TP2} {SP}"),
    "PP2": Layout(2, PP2, DEEPER),
}
ON_DEEPSPEED = {
    "DP2": Layout(2),
    "TP2": Layout(2, TP2),
    "EP2, recompute": Layout(2, f"{EP2} --recompute-granularity full"),
    "PP2 x EP2": Layout(4, f"{PP2} {EP2}", DEEPER),
    "TP2 x PP2": Layout(4, f"{TP2} {PP2}", DEEPER),
    "TP2, SP, every part recomputed": Layout(2, f"{TP2} {SP} {RECOMPUTED}"),
    "TP2 x EP2, SP, expert-TP 1": Layout(4, f"{TP2} {SP} {EP2} {ETP1}"),
}
ON_MEGATRON = {
    "1 rank": Layout(1),
    "CP2": Layout(2, CP2),
    "PP2, a stage without experts": Layout(2, PP2),
    "PP2 x VPP2": Layout(2, f"{PP2} --virtual-pipeline-model-parallel-size 2", DEEPER),
    "PP2 x VPP2, 2 layers and 4": Layout(
        2,
        f"{PP2} --virtual-pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2",
        "--num-layers 6 --moe-layer-freq [0,1,1,1,1,1]",
    ),
    "TP2, SP, every part recomputed": Layout(2, f"{TP2} {SP} {RECOMPUTED}"),
    "TP2 x EP2": Layout(4, f"{TP2} {SP} {EP2}"),
    "PP2 x EP2": Layout(4, f"{PP2} {EP2}", DEEPER),
}


def on_megatron(layouts: dict[str, Layout]) -> dict[str, Layout]:
    return {
        f"megatron, {name}": layout._replace(flags=f"{MEGATRON} {layout.flags}")
        for name, layout in layouts.items()
    }


OVERLAP = {"DP2, overlap": Layout(2, "--use-distributed-optimizer --ddp-bucket-size 500")}
FEW = {**BOTH, **on_megatron({**BOTH, **OVERLAP, "CP2": ON_MEGATRON["CP2"]})}
LONG = {**BOTH, **ON_DEEPSPEED, **on_megatron({**BOTH, **OVERLAP, **ON_MEGATRON})}
# Multi-token prediction has no other engine to be compared with: one process of its own is the reference.
MTP = f"hyper {MEGATRON} --mtp-num-layers 2 --mtp-loss-scaling-factor 0.3 {SHARED}"
MTP_LAYOUTS = {
    **{name: BOTH[name] for name in ("EP2", "TP2, SP", "PP2")},
    **OVERLAP,
    # without overlap: the tied output matrix of the last stage gets no gradient
    "DP2 x PP2, distributed optimizer": Layout(4, f"{PP2} --use-distributed-optimizer", DEEPER),
    "DP2 x PP2, untied, overlap": Layout(
        4,
        f"{PP2} --use-distributed-optimizer --ddp-bucket-size 500",
        f"{DEEPER} --untie-embeddings-and-output-weights",
    ),
}


@pytest.fixture(scope="module")
def few(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, FEW, [FAMILIES["latent, groups"]], tmp_path_factory.mktemp("few"))


@pytest.mark.parametrize("layout", FEW)
def test_layout_gives_the_run_of_one_process(
    few: Table, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(few, FAMILIES["latent, groups"], layout, record_property)


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_the_named_parts_run_again_in_the_backward_pass(zygote: Zygote, tmp_path: Path, engine: str) -> None:
    kinds = ("MLP", "HyperRouter", "SharedExpertMLP")
    parts = {"mlp": {"MLP"}, "moe": {"HyperRouter", "SharedExpertMLP"}, "shared_experts": {"SharedExpertMLP"}}
    common = ["--engine", engine, "--router.name", "hyper", *SHARED.split()]
    flags = [["--recompute-granularity", "selective", "--recompute-modules", part] for part in parts]
    cases = [{"flags": [*common, *more], "steps": 1, "count": True} for more in ([], *flags)]
    once, *again = (
        told["calls"] for told in run_ranks(zygote, WORKER, {"cases": cases}, ranks=1, folder=tmp_path)
    )
    assert all(once[kind] for kind in kinds)
    for twice, calls in zip(parts.values(), again, strict=True):
        assert {kind for kind in kinds if calls[kind] == 2 * once[kind]} == twice
        assert {kind for kind in kinds if calls[kind] == once[kind]} == {*kinds} - twice


@pytest.fixture(scope="module")
def predicting(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, MTP_LAYOUTS, [MTP], tmp_path_factory.mktemp("mtp"))


@pytest.mark.parametrize("layout", MTP_LAYOUTS)
def test_multi_token_prediction_gives_the_run_of_one_process(
    predicting: Table, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(predicting, MTP, layout, record_property)


@pytest.fixture(scope="module")
def long(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, LONG, FAMILIES.values(), tmp_path_factory.mktemp("long"))


@pytest.mark.by_hand
@pytest.mark.parametrize("layout", LONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_long_table(
    long: Table, family: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(long, FAMILIES[family], layout, record_property)


def settings_of(family: str) -> RunConfig:
    return tiny_config(case_of(family, Layout(1), "", start="")["flags"])


@pytest.mark.parametrize("family", [FAMILIES["latent, groups"], MTP])
def test_shapes_from_settings_are_those_of_the_built_model(
    few: Table, predicting: Table, family: str
) -> None:
    run = (predicting if family == MTP else few).references[family, ""]
    saved = read_tensors(run.weights, weight_names(run.weights))
    trained = {name: tuple(tensor.shape) for name, tensor in saved.items() if trains(name)}
    rows = trained[WORD_EMBEDDINGS][0]
    assert shapes_of(settings_of(family), rows) == trained


def trains(name: str) -> bool:
    inside = router_parameter(name)
    return inside is None or inside[1] == "embedding_S"
