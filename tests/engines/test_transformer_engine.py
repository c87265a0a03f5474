"""Layers of Transformer Engine on a machine without a GPU: with a stand-in for the library, the run equals
that of torch's layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import environment, run_ranks
from engines.layout_table import STEPS, WORKER, Layout, Run, Table, assert_same_run, case_of
from engines.te_ranks import run_afresh
from program.launched import Zygote

pytestmark = pytest.mark.processes
OVER_STAND_IN = Path(__file__).with_name("te_worker.py")
TE = "--engine megatron --transformer-impl transformer_engine"
TP2 = f"{TE} --tensor-model-parallel-size 2 --sequence-parallel"
UNTIED = "--untie-embeddings-and-output-weights"
LAYOUTS = {
    "1 rank": Layout(1, TE),
    "1 rank, untied": Layout(1, TE, UNTIED),
    "TP2": Layout(2, TP2),
    "TP2, expert-TP 1": Layout(2, f"{TP2} --expert-tensor-parallel-size 1"),
    "EP2, distributed optimizer": Layout(
        2, f"{TE} --expert-model-parallel-size 2 --use-distributed-optimizer"
    ),
    "PP2": Layout(2, f"{TE} --pipeline-model-parallel-size 2"),
}
ROUTER = "hyper"
# kernels that each layout of so many ranks must have called; those of two ranks have apex too
FUSED = {1: {"apply_rotary_pos_emb", "moe_permute_with_probs", "moe_unpermute"}}
FUSED[2] = {*FUSED[1], "wgrad accumulated"}
RESUMED = 4  # steps told beyond the first: two more, and the same two from the checkpoint


def cases_over(layouts: dict[str, Layout], root: Path) -> list[dict[str, Any]]:
    return [
        case_of(ROUTER, layout, str(root / name), start=str(root / f"reference{layout.settings}"))
        for name, layout in layouts.items()
    ]


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The layouts over the stand-in; the references are DeepSpeed's, with torch's layers."""
    root = tmp_path_factory.mktemp("te")

    def runs_of(layouts: dict[str, Layout], answers: list[dict[str, Any]]) -> dict[str, Run]:
        return {
            name: Run(answer, root / name, root / name / "probed")
            for name, answer in zip(layouts, answers, strict=True)
        }

    references = {f"reference{settings}": Layout(1, "", settings) for settings in ("", UNTIED)}
    told = run_ranks(
        zygote, WORKER, {"cases": cases_over(references, root)}, ranks=1, folder=root / "references"
    )
    expected = runs_of(references, told)
    found: dict[str, Run] = {}
    for ranks in (1, 2):
        layouts = {name: layout for name, layout in LAYOUTS.items() if layout.ranks == ranks}
        cases = [case | {"resume": True} for case in cases_over(layouts, root)]
        folder = root / f"ranks{ranks}"
        task = {"cases": cases, "apex": ranks == 2}
        found |= runs_of(layouts, run_afresh(OVER_STAND_IN, task, ranks=ranks, folder=folder))
        for called in folder.glob("called.*"):
            assert not FUSED[ranks] - json.loads(called.read_text(encoding="utf-8")).keys()
    for run in found.values():
        run.told["resumed"] = [run.told["steps"].pop() for _ in range(RESUMED)]
    return Table(
        LAYOUTS,
        {(ROUTER, name): run for name, run in found.items()},
        {(ROUTER, layout.settings): expected[name] for name, layout in references.items()},
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_is_that_of_local_layers(
    table: Table, layout: str, record_property: Callable[[str, object], None]
) -> None:
    """Initial weights, names, cuts, gradients."""
    assert_same_run(table, ROUTER, layout, record_property)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_repeats_its_losses(table: Table, layout: str) -> None:
    run = table.runs[ROUTER, layout]
    assert len(run.told["steps"]) == STEPS
    last, before, again_last, again_before = run.told["resumed"]
    assert (last, before) == (again_last, again_before) and last != before


CLASSES = """
from engines.te_stand_in import install
install()
import json
from megatron.core.transformer.spec_utils import ModuleSpec
from engines.layout_worker import tiny_config
from megatron_hyperrouter.compat.specs import submodules_of
from megatron_hyperrouter.model.spec import expert_spec, last_norm, layer_spec, transformer_config
flags = "--engine megatron --transformer-impl transformer_engine --recompute-granularity selective"
run = tiny_config(flags.split())
parts = layer_spec(run, ModuleSpec(module=int)).submodules
experts, config = expert_spec(run), transformer_config(run)
class_of = lambda spec: getattr(spec, "func", None) or spec.module  # a partial, or a ModuleSpec
apart = expert_spec(run, apart=True)
made, made_apart = (submodules_of(spec) for spec in (experts, apart))
attention = parts.self_attention.submodules
classes = [
    parts.input_layernorm, attention.linear_qkv, attention.q_layernorm, attention.core_attention,
    attention.linear_proj,
    parts.pre_mlp_layernorm, parts.mlp.module, class_of(experts), made.linear_fc1, made.linear_fc2,
    last_norm(run), class_of(apart), made_apart.linear_fc1, made_apart.linear_fc2,
]
fused = "bias_activation bias_dropout gradient_accumulation apply_rope moe_permute".split()
longer = f"{flags} --rope-type yarn --rotary-scaling-factor 4 --original-max-position-embeddings 8 --mscale"
turned = [transformer_config(tiny_config(f"{longer} {scale}".split())).apply_rope_fusion for scale in (1, 0)]
# 0.19 has a class for norms whose input a residual connection needs; it makes the same norm
name_of = lambda found: found.__name__.removeprefix("_").removesuffix("WithResidual")
print(json.dumps([[name_of(found) for found in classes], config.moe_grouped_gemm,
config.recompute_granularity, config.recompute_modules,
[name for name in fused if getattr(config, f"{name}_fusion")], turned]))
"""


def test_classes_of_the_spec() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLASSES],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names, grouped, recompute, modules, fused, turned = json.loads(done.stdout.splitlines()[-1])
    assert names == [
        "IdentityOp", "TELayerNormColumnParallelLinear", "TENorm", "TEDotProductAttention",
        "TERowParallelLinear",
        "TENorm", "int", "TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear",
        "TENorm",
        "SequentialMLP", "TEColumnParallelLinear", "TERowParallelLinear",
    ]  # fmt: skip
    assert (grouped, recompute, modules) == (True, "selective", ["core_attn"])
    assert fused == ["bias_activation", "bias_dropout", "apply_rope", "moe_permute"]  # without apex
    assert turned == [False, True]  # no kernel makes queries and keys longer, as YaRN does
