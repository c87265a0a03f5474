"""Layers of Transformer Engine, as far as a machine without a GPU can tell: over a stand-in, the run is that of torch's layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import environment, run_ranks
from engines.layout_table import COMMON, STEPS, WORKER, Run, assert_same_run

pytestmark = pytest.mark.processes
OVER_STAND_IN = Path(__file__).with_name("te_worker.py")
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    1: {"1 rank": "", "untied": "--untie-embeddings-and-output-weights"},
    2: {
        "TP2": TP2,
        "TP2, expert-TP 1": f"{TP2} --expert-tensor-parallel-size 1",
        "EP2, distributed optimizer": "--expert-model-parallel-size 2 --use-distributed-optimizer",
        "PP2": "--pipeline-model-parallel-size 2",
    },
}
FUSED = [layout for layouts in LAYOUTS.values() for layout in layouts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The layouts over the stand-in, and two references with torch's layers."""
    root = tmp_path_factory.mktemp("te")
    found: dict[str, Run] = {}

    def start(worker: Path, ranks: int, layouts: dict[str, str], impl: str) -> None:
        folders = [root / f"{worker.stem}-{name}" for name in layouts]
        common = ["--engine", "megatron", "--transformer-impl", impl, "--router.name", "hyper", *COMMON]
        cases = [
            {"flags": [*common, *flags.split()], "steps": STEPS, "folder": str(folder), "topk_eval": [1, 3], "resume": True}
            for flags, folder in zip(layouts.values(), folders, strict=True)
        ]
        answers = run_ranks(worker, {"cases": cases}, ranks=ranks, folder=root / f"{worker.stem}{ranks}")
        for name, answer, folder in zip(layouts, answers, folders, strict=True):
            found[f"{impl} {name}"] = Run(answer, folder)

    start(WORKER, 1, LAYOUTS[1], "local")
    for ranks, layouts in LAYOUTS.items():
        start(OVER_STAND_IN, ranks, layouts, "transformer_engine")
    return found


@pytest.mark.parametrize("layout", FUSED)
def test_the_run_is_that_of_local_layers(runs: dict[str, Run], layout: str) -> None:
    """Initial weights, names, cuts and the order of gradients: final weights by global name to 1e-6."""
    assert_same_run(runs[f"transformer_engine {layout}"], runs["local untied" if layout == "untied" else "local 1 rank"])


@pytest.mark.parametrize("layout", FUSED)
def test_a_resumed_run_repeats_its_losses(runs: dict[str, Run], layout: str) -> None:
    steps = runs[f"transformer_engine {layout}"].told["steps"]
    assert steps[STEPS : STEPS + 2] == steps[STEPS + 2 :]


CLASSES = """
from engines.te_stand_in import install
install()
import json
from megatron.core.transformer.spec_utils import ModuleSpec
from engines.layout_worker import tiny_config
from megatron_hyperrouter.model.spec import expert_spec, last_norm, layer_spec, transformer_config
run = tiny_config("--engine megatron --transformer-impl transformer_engine --recompute-granularity selective".split())
parts, experts, config = layer_spec(run, ModuleSpec(module=int)).submodules, expert_spec(run), transformer_config(run)
attention = parts.self_attention.submodules
classes = [
    parts.input_layernorm, attention.linear_qkv, attention.q_layernorm, attention.core_attention, attention.linear_proj,
    parts.pre_mlp_layernorm, parts.mlp.module, experts.module, experts.submodules.linear_fc1, experts.submodules.linear_fc2, last_norm(run),
]
print(json.dumps([[found.__name__ for found in classes], config.moe_grouped_gemm, config.recompute_granularity, config.recompute_modules]))
"""


def test_classes_of_the_spec() -> None:
    done = subprocess.run([sys.executable, "-c", CLASSES], env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names, grouped, recompute, modules = json.loads(done.stdout.splitlines()[-1])
    assert names == [
        "IdentityOp", "TELayerNormColumnParallelLinear", "TENorm", "TEDotProductAttention", "TERowParallelLinear",
        "TENorm", "int", "TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TENorm",
    ]  # fmt: skip
    assert (grouped, recompute, modules) == (True, "selective", ["core_attn"])
