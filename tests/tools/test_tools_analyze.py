"""``mhr analyze`` on runs of both engines: properties of any trained run, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import REPOSITORY
from program.launched import Zygote
from program.settings import TINY, write_text

from megatron_hyperrouter.evaluate.calibration import apply
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.generation.attention import KeyValueCache
from megatron_hyperrouter.generation.decoder import Loaded
from megatron_hyperrouter.generation.load import load

pytestmark = pytest.mark.processes

TOOL, WORKER = REPOSITORY / "tools" / "analyze.py", Path(__file__).with_name("experts_worker.py")
LAYERS, EXPERTS, K = 2, 4, 3
RUNS = {
    "hyper": "--engine deepspeed --train-iters 6",
    "stablemoe": "--engine deepspeed --train-iters 3 --router.stage1-steps 1",
    "smoe_dropout": "--engine megatron --train-iters 3 --moe-layer-freq [0,1]",
    "xmoe": "--engine megatron --train-iters 3",
}


@pytest.fixture(scope="module")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each router, two of them on each engine."""
    folder = tmp_path_factory.mktemp("analyze")
    text = write_text(folder / "text")
    for name, flags in RUNS.items():
        words = [*TINY, "--moe-router-topk", K, "--router.name", name, *flags.split()]
        zygote.run([*words, "--data-path", text, "--run-dir", folder / name])
    return folder


def analyze(zygote: Zygote, run: Path, *words: object) -> dict[str, Any]:
    zygote.run(["--load", run, "--eval-iters", 4, "--output", run / "a.json", *words], program=TOOL)
    found: dict[str, Any] = json.loads((run / "a.json").read_text())
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_layer_and_measure(zygote: Zygote, runs: Path, name: str) -> None:
    found = analyze(zygote, runs / name, "--topk", 1, K)
    assert [result["topk"] for result in found["results"]] == [1, K]
    layers = [2] if name == "smoe_dropout" else [1, 2]  # there the first layer is dense
    for result in found["results"]:
        assert [row["layer"] for row in result["layers"]] == layers
        for row in result["layers"]:
            check_row(row, result["topk"], name)
    over = found["checkpoints"]
    assert over["steps"] == ([3, 6] if name == "hyper" else [3])
    assert over["topk"] == K and over["tokens"] == 512
    for row in over["layers"]:
        assert row["saturation"][-1] == 1.0
        assert len(row["fluctuation"]) == len(over["steps"]) - 1
        assert all(0.0 <= value <= 1.0 for value in row["saturation"] + row["fluctuation"])
    if name == "hyper":
        assert all(row["saturation"][0] > row["saturation_by_chance"] for row in over["layers"])


def check_row(row: dict[str, Any], k: int, name: str) -> None:
    assert 0.0 < row["entropy"] <= math.log(EXPERTS) + 1e-6
    assert row["logit_std"] > 0.0 and -1e-9 <= row["mutual_information"] <= math.log(EXPERTS)
    assert sum(row["load"]) == pytest.approx(EXPERTS)
    assert max(row["load"]) == pytest.approx(row["load_max_over_mean"])
    assert row["dead_experts"] == sum(load < 0.05 for load in row["load"])
    matrix = row["similarity"]
    assert all(matrix[i][i] == pytest.approx(1.0, abs=1e-5) for i in range(EXPERTS))
    assert all(matrix[i][j] == pytest.approx(matrix[j][i]) for i in range(EXPERTS) for j in range(EXPERTS))
    pairs = [matrix[i][j] for i in range(EXPERTS) for j in range(EXPERTS) if i != j]
    assert row["mean_similarity"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    part = row["jacobian"]
    if name in ("hyper", "smoe_dropout"):  # a linear map, softmax over the kept logits
        assert part["rank"] == k - 1 and (part["share"] == 0.0) == (k == 1)
        assert part["inputs_by_chance"] == EXPERTS / 32
    if name == "smoe_dropout":
        assert part["drift"] == pytest.approx(0.0, abs=1e-9)
    if name == "hyper":
        assert 0.0 < part["drift"] < 0.1
    if name in ("xmoe", "stablemoe"):
        assert part["drift"] is None and part["rank"] >= 1 and part["share"] > 0.0


@pytest.mark.parametrize("name", ["hyper", "xmoe"])
def test_experts_read_from_the_checkpoint_are_those_of_the_engine(
    zygote: Zygote, runs: Path, name: str
) -> None:
    job = zygote.run([runs / name], program=WORKER)
    assert float(job.stdout.splitlines()[-1]) < 1e-5


def test_refusals(zygote: Zygote, runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    common = ["--load", runs / "hyper", "--output", output]
    job = zygote.run([*common, "--topk", 0, 5], program=TOOL, expect=2)
    assert "must be from 1 to 4, the number of experts" in job.stderr and job.stderr.count("--topk = ") == 2
    job = zygote.run(["--load", tmp_path, "--output", output], program=TOOL, expect=4)
    assert "no finished checkpoint" in job.stderr
    job = zygote.run(common, program=TOOL, ranks=2, expect=2)
    assert "without a launcher" in job.stderr
    assert not output.exists()


def test_a_calibrated_evaluation_is_that_of_a_router_with_the_factor(zygote: Zygote, runs: Path) -> None:
    """In a run with one MoE layer its scale is --router.scaling-factor."""
    run = runs / "smoe_dropout"
    words = ["--load", run, "--topk", 1, K, "--calibrate-k", "--output", run / "e.json"]
    zygote.run(words, program=REPOSITORY / "tools" / "evaluate.py")
    found = json.loads((run / "e.json").read_text())
    at_1, at_k = found["calibrated"]
    (scale,) = at_1["scales"]
    assert scale < 1.0 and at_k["scales"] == [1.0]
    assert at_k["lm_loss"] == pytest.approx(found["results"][1]["lm_loss"], rel=1e-7)
    job = zygote.run([run, 1, scale], program=WORKER.with_name("scaled_worker.py"))
    assert at_1["lm_loss"] == pytest.approx(float(job.stdout.splitlines()[-1]), rel=1e-6)
    assert at_1["lm_loss"] != pytest.approx(found["results"][0]["lm_loss"], rel=1e-7)


def test_calibrated_texts_and_folders_have_the_scales_of_the_evaluation(
    zygote: Zygote, runs: Path, tmp_path: Path
) -> None:
    """With these scales the decoder has the loss that the evaluation reports, and so has the folder."""
    run, folder = runs / "hyper", tmp_path / "folder"
    common = ["--load", run, "--topk", 1, "--calibrate-k"]
    zygote.run([*common, "--output", run / "c.json"], program=REPOSITORY / "tools" / "evaluate.py")
    (row,) = json.loads((run / "c.json").read_text())["calibrated"]
    words = ["--prompt", "ab", "--json", "--max-new-tokens", 4, "--prompt", "b"]
    job = zygote.run([*common, *words], program=REPOSITORY / "tools" / "generate.py")
    told = json.loads(job.stdout[job.stdout.index("{") :])
    assert (
        told["calibrated"][0]["scales"] == pytest.approx(row["scales"], rel=1e-9) and len(row["scales"]) == 2
    )
    assert "scales" not in told["results"][0]
    assert [row["prompt"] for row in told["results"]] == ["ab", "b"]
    words = ["--output", folder, "--no-proof"]
    zygote.run([*common, *words], program=REPOSITORY / "tools" / "export_hf.py")
    plain, exported = load(run), load(folder)
    with apply(plain.decoder.routers, dict(enumerate(row["scales"], 1))):
        assert loss_of(plain, run) == pytest.approx(row["lm_loss"], rel=1e-6)
    assert loss_of(exported, run) == pytest.approx(row["lm_loss"], rel=1e-6)
    assert loss_of(plain, run) != pytest.approx(row["lm_loss"], rel=1e-4)
    words = ["--load", folder, "--calibrate-k", "--prompt", "ab"]
    job = zygote.run(words, program=REPOSITORY / "tools" / "generate.py", expect=2)
    assert "mhr export-hf --calibrate-k" in job.stderr


def loss_of(loaded: Loaded, run_dir: Path) -> float:
    """The mean loss of the run's test split at k = 1, sample by sample."""
    run = TrainedRun.open(run_dir)
    dataset = run.dataset(run.tokenizer())
    losses = []
    for number in range(len(dataset)):
        ids_1Q = torch.from_numpy(dataset[number])[None]
        cache = KeyValueCache(torch.zeros(1, 0, dtype=torch.bool))
        logits_QV = loaded.decoder.logits(ids_1Q[:, :-1], cache, topk=1)[0]
        losses.append(torch.nn.functional.cross_entropy(logits_QV, ids_1Q[0, 1:], reduction="sum"))
    return float(sum(losses)) / sum(len(dataset[number]) - 1 for number in range(len(dataset)))


def test_overlapping_windows_score_every_token_once(zygote: Zygote, runs: Path) -> None:
    run = runs / "hyper"
    tokens = []
    for stride in (16, 4):
        words = ["--load", run, "--topk", 2, "--eval-stride", stride, "--output", run / "s.json"]
        zygote.run(words, program=REPOSITORY / "tools" / "evaluate.py")
        (row,) = json.loads((run / "s.json").read_text())["results"]
        tokens.append(row["tokens"])
        assert 0.0 < row["lm_loss"] < 8.0
    assert tokens[0] % 16 == 0 and 0 <= tokens[1] - tokens[0] < 16
    job = zygote.run(
        ["--load", run, "--topk", 2, "--eval-stride", 17, "--output", run / "s.json"],
        program=REPOSITORY / "tools" / "evaluate.py",
        expect=2,
    )
    assert "must be from 1 to 16, the number of tokens in a sample" in job.stderr


def test_a_run_that_began_with_other_weights_drifts_from_its_first_checkpoint(
    zygote: Zygote, runs: Path
) -> None:
    """Its own first draw was never used: the router of the first run has moved far from it."""
    words = [*TINY, "--moe-router-topk", K, "--router.name", "topk", "--data-path", runs / "text"]
    zygote.run([*words, "--train-iters", 6, "--run-dir", runs / "before"])
    later = ["--load", runs / "before", "--finetune", "--seed", 99, "--save-interval", 1, "--lr", 1e-5]
    zygote.run([*words, *later, "--train-iters", 3, "--run-dir", runs / "after"])
    for row in analyze(zygote, runs / "after", "--no-checkpoints")["results"][0]["layers"]:
        assert row["jacobian"]["drift"] < 1e-3
    for row in analyze(zygote, runs / "before", "--no-checkpoints")["results"][0]["layers"]:
        assert row["jacobian"]["drift"] > 1e-2
