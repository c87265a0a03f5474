"""The proof that layouts agree: correct runs pass, injected faults are found and named, and impossible
layouts are refused.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from distributed import REPOSITORY, environment, free_port
from program.settings import TINY_MODEL, write_text

pytestmark = pytest.mark.processes

SETTINGS = (
    TINY_MODEL
    + """\
qk_layernorm: true
router: {name: hyper}
moe_router_topk: 2
topk_schedule: linear
topk_start: 1
moe_aux_loss_coeff: 0.01
micro_batch_size: 2
lr: 3.0e-3
"""
)
FAULTS = (
    "ep=2,fault=expert-gradient",
    "pp=2,fault=embedding-reduce",
    "tp=2,fault=aux-loss",
    "dp=2,fault=hypernetwork",
)
RIGHT = ("tp=2,ep=2,etp=1", "cp=2")
ENGINES = ("deepspeed", "megatron")


class Proof(NamedTuple):
    """What one call of the tool gave."""

    status: int
    out: str
    rows: dict[tuple[str, str], dict[str, Any]]  # (layout, engine) -> the row of --output

    def failed(self, layout: str, engine: str) -> dict[str, tuple[float, str]]:
        """number -> (difference, where) of what exceeds its tolerance."""
        found = self.rows[layout, engine]["differences"]
        return {each["number"]: (each["value"], each["where"]) for each in found if not each["ok"]}


def call(
    folder: Path, *arguments: str, settings: str = SETTINGS, **env: str
) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(settings, encoding="utf-8")
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "verify_layouts.py"),
        "--config",
        str(folder / "run.yaml"),
        *arguments,
    ]
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """All layouts of this file in one call: one start of one rank, one start of two."""
    folder = tmp_path_factory.mktemp("verify")
    ended = call(folder, "--steps", "2", "--layouts", *RIGHT, *FAULTS, "--output", str(folder / "found.json"))
    assert ended.returncode in (0, 1), ended.stderr
    rows = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return Proof(ended.returncode, ended.stdout, {(row["layout"], row["engine"]): row for row in rows})


@pytest.mark.parametrize(
    ("layout", "engine"),
    [("1 process", "megatron"), (RIGHT[0], "deepspeed"), (RIGHT[0], "megatron"), (RIGHT[1], "megatron")],
)
def test_right_layouts_agree(proof: Proof, layout: str, engine: str) -> None:
    row = proof.rows[layout, engine]
    assert row["ok"] and not row["refused"] and len(row["differences"]) == 6
    assert all(each["value"] <= each["tolerance"] for each in row["differences"])


def test_a_layout_that_the_settings_rule_out_is_no_failure(proof: Proof) -> None:
    row = proof.rows["cp=2", "deepspeed"]
    assert "--context-parallel-size" in row["refused"] and row["ok"] and row["differences"] == []
    assert "refused" in proof.out and "1 not allowed by the settings" in proof.out


def test_faults_fail_the_call(proof: Proof) -> None:
    assert proof.status == 1
    assert "4 agree, 8 differ" in proof.out
    assert all(f"FAIL {layout} on {engine}" in proof.out for layout in FAULTS for engine in ENGINES)


NAMED: dict[str, Callable[[dict[str, tuple[float, str]]], bool]] = {
    # The whole gradient of an expert is added once more
    FAULTS[0]: lambda told: (
        told["gradients"][0] == pytest.approx(1.0, rel=1e-3) and ".mlp.experts." in told["gradients"][1]
    ),
    FAULTS[1]: lambda told: told["gradients"][1] == told["weights"][1] == "embedding.word_embeddings.weight",
    FAULTS[2]: lambda told: (
        told["aux_loss"][0] == pytest.approx(1.0, rel=1e-3) and ".mlp.router." in told["gradients"][1]
    ),
    FAULTS[3]: lambda told: (
        told["frozen parts"][0] == 1
        and told["frozen parts"][1].startswith("rank 1 has a different decoder.layers.0.")
    ),
}


CAUSES = {
    FAULTS[0]: "only the gradients of experts differ: they are 2 times (EP = 2 or DP = 2)",
    FAULTS[1]: "only the gradient of the embedding differs",
    FAULTS[2]: "the auxiliary loss is 2 times (TP = 2)",
    FAULTS[3]: "the frozen weights of the router (such as the hypernetwork) on rank 1 differ",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", FAULTS)
def test_a_fault_is_caught_and_named(proof: Proof, layout: str, engine: str) -> None:
    told = proof.failed(layout, engine)
    assert NAMED[layout](told), told
    assert told["gradients"][1] in proof.out
    (cause,) = proof.rows[layout, engine]["causes"]
    assert cause.startswith(CAUSES[layout]) and f"probable cause: {cause}" in proof.out


@pytest.mark.parametrize("layout", FAULTS[:3])
def test_nobody_else_is_blamed_for_the_hypernetwork(proof: Proof, layout: str) -> None:
    assert "frozen parts" not in proof.failed(layout, "megatron")


@pytest.mark.parametrize(
    ("arguments", "settings", "world", "says"),
    [
        (("--layouts", "dp=2,fault=gremlin"), SETTINGS, "1", "gremlin is not a fault"),
        (
            ("--local_rank=0", "--layouts", "tp=none"),
            SETTINGS,
            "1",
            "the value in tp=none must be an integer of at least 1",
        ),  # as the deepspeed launcher starts it
        ((), SETTINGS.replace("moe_router_topk: 2", "moe_router_topk: 5"), "1", "--moe-router-topk"),
        (
            ("--layouts", "tp=2,ep=2", "ep=2"),
            SETTINGS,
            "2",
            "--layouts = tp=2,ep=2: needs more than the 2 ranks that the launcher started",
        ),
        # one process on the other engine is not a layout that was asked for
        (("--layouts", "ep=3"), SETTINGS, "1", "--layouts = ep=3 on megatron: "),
        (
            ("--layouts", "ep=2,num_layers=4", "router.name=topk", "engine=megatron"),
            SETTINGS,
            "1",
            "3 problems in the settings",
        ),
        (("--layouts", "ep=2", "--timeout", "0"), SETTINGS, "1", "--timeout = 0: must be greater than 0"),
        (("--layouts", "ep=2", "--output", "/dev/null/x"), SETTINGS, "1", "/dev/null/x: cannot be written"),
        (("--layouts", "ep=2", "--folder", "/dev/null"), SETTINGS, "1", "/dev/null: is not a folder"),
        (("--layouts", "ep=2,hiden_size=3"), SETTINGS, "1", "hiden_size is not a setting"),
        (
            ("--layouts", "cp=2", "tp=3", "--engines", "deepspeed"),
            SETTINGS,
            "1",
            "2 problems in the settings",
        ),
    ],
)
def test_bad_settings_end_with_status_2(
    tmp_path: Path, arguments: tuple[str, ...], settings: str, world: str, says: str
) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": world} if world != "1" else {}
    ended = call(tmp_path, *arguments, settings=settings, **launcher)
    assert ended.returncode == 2 and says in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.parametrize(
    "settings", [SETTINGS, re.sub("topk_s.*\n", "", SETTINGS)], ids=["k grows", "k is constant"]
)
def test_own_data_that_is_not_there_ends_with_status_3(tmp_path: Path, settings: str) -> None:
    ended = call(tmp_path, "--own-data", settings=f"{settings}data_path: [{tmp_path / 'nowhere'}]\n")
    assert ended.returncode == 3 and "nowhere" in ended.stderr and "ranks ..." not in ended.stderr, (
        ended.stderr
    )


FAULTS_IN_BF16 = ("ep=2,fault=expert-gradient", "tp=2,fault=aux-loss")


def test_bfloat16(tmp_path: Path) -> None:
    """Right layouts pass within what bfloat16 itself changes, faults do not, and the tolerance is no wider
    than that.
    """
    layouts = ("ep=2", "pp=2", "tp=2,ep=2,etp=1", *FAULTS_IN_BF16)
    output = tmp_path / "found.json"
    ended = call(tmp_path, "--layouts", *layouts, "--output", str(output), settings=f"{SETTINGS}bf16: true\n")
    assert ended.returncode == 1, ended.stderr
    for row in json.loads(output.read_text(encoding="utf-8")):
        failed = {each["number"]: each for each in row["differences"] if not each["ok"]}
        if row["layout"] not in FAULTS_IN_BF16:
            assert row["ok"] and failed == {}, row
        else:
            (cause,) = row["causes"]
            factor = re.search(r"(?:are|is) ([\d.]+) times", cause)
            assert failed and factor and float(factor[1]) == pytest.approx(2, rel=0.05), row
        allowed = {each["number"]: each["tolerance"] for each in row["differences"]}
        assert allowed["lm_loss"] < 0.03 and allowed["gradients"] <= 0.25 and allowed["frozen parts"] == 0


@pytest.mark.skipif(
    shutil.which("torchrun", path=str(Path(sys.executable).parent)) is None,
    reason="no torchrun beside this Python",
)
def test_under_a_launcher_on_the_runs_own_data(tmp_path: Path) -> None:
    """Four ranks of torchrun: ZeRO-2, VPP, distributed optimizer, TP2 x EP2, PP2 x EP2, on real text; one
    answer, from rank 0.
    """
    prefix = write_text(tmp_path / "text")
    settings = SETTINGS.replace("num_layers: 2", "num_layers: 4") + f'data_path: [{prefix}]\nsplit: "8,1,1"\n'
    layouts = ("dp=2,zero=2", "pp=2,vpp=2", "dp=2,use_distributed_optimizer=true", "tp=2,ep=2", "pp=2,ep=2")
    (tmp_path / "run.yaml").write_text(settings, encoding="utf-8")
    start = [
        str(Path(sys.executable).with_name("torchrun")),
        "--nproc_per_node",
        "4",
        "--master_port",
        str(free_port()),
    ]
    tool = [
        str(REPOSITORY / "tools" / "verify_layouts.py"),
        "--config",
        "run.yaml",
        "--own-data",
        "--steps",
        "2",
        "--output",
        "found.json",
    ]
    ended = subprocess.run(
        [*start, *tool, "--layouts", *layouts],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    right = {(row["layout"], row["engine"]) for row in rows if row["ok"] and len(row["differences"]) == 6}
    # use_distributed_optimizer has no effect on the DeepSpeed engine: a warning, and the same run
    refused = {(layouts[0], "megatron"), (layouts[1], "deepspeed")}
    assert {(row["layout"], row["engine"]) for row in rows if row["refused"]} == refused
    assert (
        right
        == {("1 process", "megatron"), *((layout, engine) for layout in layouts for engine in ENGINES)}
        - refused
    )
    assert ended.stdout.count("9 agree, 0 differ, 2 not allowed by the settings") == 1
    assert [path.name for path in tmp_path.glob("runs/*")] == []
