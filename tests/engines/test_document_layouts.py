"""Runs that separate documents: one process equals the plain float64 model, and every layout of both engines
equals that process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from engines.layout_table import COMMON, PROBED, WORKER, Layout, Table, assert_same_run, gradients, run_table
from engines.layout_worker import EOD, PROBE_TOKENS, SCALE, micro_batches, tiny_config
from engines.test_deepspeed_layouts import HERE, router_matrix
from program.launched import Zygote
from reference_gpt import ReferenceGPT, train_reference

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

ROUTER = "topk"
APART = "--reset-attention-mask --eod-mask-loss"
ALL = f"{APART} --reset-position-ids"
POSITIONS = "--reset-position-ids --eod-mask-loss"
PACKED = f"{APART} --pack-documents"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
MEGATRON = "--engine megatron"
LAYOUTS = {
    "DP2": Layout(2, "", APART),
    "EP2, recompute": Layout(2, f"{EP2} --recompute-granularity full", APART),
    "TP2": Layout(2, TP2, APART),
    "PP2, selective": Layout(2, f"{PP2} --recompute-granularity selective", APART),
    "PP2, all, recompute": Layout(2, f"{PP2} --recompute-granularity full", ALL),
    "PP2, positions": Layout(2, PP2, POSITIONS),
    "megatron": Layout(1, MEGATRON, APART),
    "megatron, EP2": Layout(2, f"{MEGATRON} {EP2}", APART),
    "megatron, TP2": Layout(2, f"{MEGATRON} {TP2}", APART),
    "megatron, PP2, recompute": Layout(2, f"{MEGATRON} {PP2} --recompute-granularity full", APART),
    "megatron, CP2": Layout(2, f"{MEGATRON} {CP2}", APART),
    "megatron, CP2, positions": Layout(2, f"{MEGATRON} {CP2} --recompute-granularity selective", POSITIONS),
    "packed, DP2": Layout(2, "", PACKED),
    "packed, megatron, EP2": Layout(2, f"{MEGATRON} {EP2}", PACKED),
    "packed, megatron, CP2": Layout(2, f"{MEGATRON} {CP2}", PACKED),
    "megatron, PP2 x VPP2": Layout(
        2, f"{MEGATRON} {PP2} --virtual-pipeline-model-parallel-size 2", f"{POSITIONS} --num-layers 4"
    ),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Every layout, and one process of DeepSpeed for each choice of flags."""
    return run_table(zygote, LAYOUTS, (ROUTER,), tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_run_of_one_process(
    table: Table, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(table, ROUTER, layout, record_property)


@pytest.mark.parametrize("settings", [APART, ALL, POSITIONS, PACKED])
def test_one_process_is_the_plain_model(table: Table, settings: str, tmp_path: Path, zygote: Zygote) -> None:
    found = table.references[ROUTER, settings]
    flags = ["--router.name", ROUTER, *COMMON, *settings.split()]
    initial = tmp_path / "initial"
    run_ranks(
        zygote,
        WORKER,
        {"cases": [{"flags": flags, "steps": 0, "folder": str(initial)}]},
        ranks=1,
        folder=tmp_path,
    )
    config = tiny_config(flags)
    steps = [(list(micro_batches(config, HERE, step)), topk) for step, topk in enumerate((1, 2, 4))]
    expected = train_reference(plain_model(config, initial), steps, config.optimizer.lr)
    assert [(step["lm_loss"], step["grad_norm"]) for step in found.told["steps"]] == [
        pytest.approx(pair, rel=1e-5) for pair in expected
    ]

    model, probed = plain_model(config, found.weights), list(micro_batches(config, HERE, PROBE_TOKENS))
    train_reference(model, [(probed, (1, 2, 4)[PROBED])], 0.0)
    told = gradients(found, found.weights)
    for name, weight in model.weights.items():
        assert weight.grad is not None
        wanted = weight.grad * SCALE
        assert float((told[name] - wanted).abs().max() / wanted.abs().max()) <= 1e-5, name


@pytest.mark.parametrize("settings", [POSITIONS, PACKED])
def test_an_evaluation_counts_what_training_counts(table: Table, settings: str) -> None:
    found = table.references[ROUTER, settings]
    config = tiny_config(["--router.name", ROUTER, *COMMON, *settings.split()])
    model, batches = plain_model(config, found.weights), list(micro_batches(config, HERE, 99))
    with torch.no_grad():
        total = sum(float(model.loss(tokens_BS, labels_BS, 3)[0]) for tokens_BS, labels_BS in batches)
    assert found.told["evaluations"]["3"] == pytest.approx(
        total / sum(int((tokens_BS != EOD).sum()) for tokens_BS, _ in batches), rel=1e-5
    )


def test_the_runs_differ_and_micro_batches_do(table: Table) -> None:
    """Else nothing above would show a mistake."""
    losses = {
        table.references[ROUTER, settings].told["steps"][1]["lm_loss"]
        for settings in (APART, POSITIONS, PACKED)
    }
    assert len(losses) == 3
    config = tiny_config(["--router.name", ROUTER, *COMMON, *APART.split()])
    assert len({int((tokens_BS == EOD).sum()) for tokens_BS, _ in micro_batches(config, HERE, 0)}) > 1
    assert any(bool(((tokens_BS == EOD).sum(1) > 1).any()) for tokens_BS, _ in micro_batches(config, HERE, 0))


def test_packed_samples_hold_several_documents_and_what_fills_them() -> None:
    """Else they would not differ from other samples."""
    config = tiny_config(["--router.name", ROUTER, *COMMON, *PACKED.split()])
    tokens_NS = torch.cat(
        [tokens_BS for step in range(3) for tokens_BS, _ in micro_batches(config, HERE, step)]
    )
    ends_NS = tokens_NS == EOD
    filled_N, inside_N = (ends_NS[:, -2:].all(1), ends_NS[:, 1:-1].any(1))
    assert filled_N.any() and inside_N.any() and not ends_NS.any(1).all()  # some hold a piece of a longer one


def plain_model(config: object, folder: Path) -> ReferenceGPT:
    """With the weights in ``folder``."""
    saved = read_tensors(folder, weight_names(folder))
    weights = {name: tensor for name, tensor in saved.items() if tensor.is_floating_point()}
    return ReferenceGPT(
        config, weights, lambda weights, layer: router_matrix(ROUTER, config, weights, layer), eod=EOD
    )  # type: ignore[arg-type]
