"""The loss study: a tiny grid from end to end, tables and fits of made-up runs, what it submits and collects,
and what is refused.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from distributed import REPOSITORY, environment
from program.launched import PROGRAM, Zygote, metrics
from program.settings import TINY_MODEL, write_text

TOOL = REPOSITORY / "tools" / "scaling_study.py"
SETTINGS = f"""{TINY_MODEL}micro_batch_size: 2
global_batch_size: 4
expert_model_parallel_size: 2
moe_router_topk: 2
topk_schedule: linear
topk_start: 1
router: {{name: hyper}}
lr: 1.0e-2
train_iters: 4
seed: 7
split: 8,1,1
num_workers: 0
eval_interval: 0
"""
VOCABULARY, LAYERS, SEQ, BATCH, STEPS = 264, 2, 16, 4, 4


def words_of(folder: Path, *arguments: object) -> list[str]:
    (folder / "run.yaml").write_text(SETTINGS, encoding="utf-8")
    words = [
        "loss",
        "--config",
        folder / "run.yaml",
        "--output",
        folder / "out",
        "--data-path",
        folder / "text",
        *arguments,
    ]
    return [str(word) for word in words]


def rows(path: Path) -> list[Mapping[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Study(NamedTuple):
    """A finished study of 2 x 2 models with one seed."""

    folder: Path
    arguments: list[str]
    out: str
    err: str


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("loss")
    write_text(folder / "text")
    axes = ["--axis", "hidden_size,moe-ffn-hidden-size", "16,24", "32,48", "--axis", "num_experts", "2", "4"]
    words = words_of(folder, *axes, "--seeds", 1, "--score-iters", 1, "--topk-eval", 1, 2, "--jobs", 2)
    ended = subprocess.run(
        [sys.executable, str(TOOL), *words], env=environment(), capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr
    return Study(folder, words, ended.stdout, ended.stderr)


def by_hand(hidden: int, experts: int, k: int) -> tuple[int, int]:
    """(all parameters, those that a token meets with k experts) of the tiny model with tied embeddings."""
    attention = hidden * (hidden + 2 * 2 * hidden // 4) + hidden * hidden
    shared = VOCABULARY * hidden + hidden + LAYERS * (2 * hidden + attention + hidden)
    expert = 3 * hidden * (hidden * 3 // 2)
    return shared + LAYERS * experts * expert, shared + LAYERS * k * expert


@pytest.mark.processes
@pytest.mark.slow
def test_a_row_for_each_run(study: Study) -> None:
    found = rows(study.folder / "out" / "runs.csv")
    assert [
        (int(row["hidden_size"]), int(row["moe_ffn_hidden_size"]), int(row["num_experts"])) for row in found
    ] == [
        (16, 24, 2),
        (16, 24, 4),
        (32, 48, 2),
        (32, 48, 4),
    ]
    for row in found:
        hidden, experts = int(row["hidden_size"]), int(row["num_experts"])
        total, active = by_hand(hidden, experts, 2)
        assert (int(row["seed"]), int(row["parameters_total"]), int(row["parameters_active"])) == (
            7,
            total,
            active,
        )
        assert int(row["tokens"]) == STEPS * BATCH * SEQ
        run = study.folder / "out" / "runs" / f"hidden_size={hidden},num_experts={experts}-seed7"
        records = [record for record in metrics(run, times=True) if "split" not in record]
        assert [record["topk"] for record in records] == [1, 1, 1, 2]
        attention = 12 * LAYERS * hidden * (SEQ + 1) // 2
        work = sum(
            BATCH * SEQ * (6 * by_hand(hidden, experts, record["topk"])[1] + attention) for record in records
        )
        assert float(row["flops"]) == work
        assert float(row["seconds"]) == pytest.approx(sum(record["step_time"] for record in records))
        results = json.loads((run / "results.json").read_text())
        assert (results["split"], results["step"]) == ("test", STEPS)
        for scored in results["results"]:
            assert float(row[f"lm_loss_k{scored['topk']}"]) == scored["lm_loss"]
            assert float(row[f"bits_per_byte_k{scored['topk']}"]) == scored["bits_per_byte"]


@pytest.mark.processes
@pytest.mark.slow
def test_two_by_two_have_no_fit_and_it_is_said_before_and_after(study: Study) -> None:
    reason = "E + A/N^alpha needs runs of at least 4 different sizes, but there are 2"
    assert study.err.startswith(f"note: the study will not fit a curve, because {reason}\n")
    assert f"No curve was fitted for k = 2: {reason}." in study.out
    assert [found["refused"] for found in json.loads((study.folder / "out" / "fit.json").read_text())] == [
        reason
    ] * 2
    assert study.out == (study.folder / "out" / "table.md").read_text(encoding="utf-8")
    pytest.importorskip("matplotlib")
    assert (study.folder / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
@pytest.mark.slow
def test_finished_runs_stay_and_a_cluster_gets_the_others(
    study: Study, zygote: Zygote, tmp_path: Path
) -> None:
    again = zygote.run(study.arguments, program=TOOL)
    assert again.stdout == study.out and "started" not in again.stderr
    shutil.copytree(study.folder / "out", tmp_path / "out")
    lost = tmp_path / "out" / "runs" / "hidden_size=32,num_experts=4-seed7"
    shutil.rmtree(lost)
    words = [word.replace(str(study.folder / "out"), str(tmp_path / "out")) for word in study.arguments]
    (line,) = zygote.run([*words, "--dry-run"], program=TOOL).stdout.splitlines()
    start, flags = line.split(" examples/cluster/slurm.sh ")
    assert shlex.split(start) == ["sbatch", f"--job-name={lost.name}", "--nodes=1", "--gpus-per-node=1"]
    assert shlex.split(flags) == [
        "--config",
        str(lost / "settings.yaml"),
        "--load",
        str(lost),
        "--engine",
        "deepspeed",
    ]
    partly = zygote.run([*words, "--collect"], program=TOOL)
    assert f"not finished: {lost}" in partly.stderr and len(rows(tmp_path / "out" / "runs.csv")) == 3
    zygote.run(shlex.split(flags), program=PROGRAM)  # what the job does
    zygote.run([*words, "--collect"], program=TOOL)
    for name in ("lm_loss_k1", "lm_loss_k2", "flops"):  # the same run, to the last bit
        assert (
            rows(tmp_path / "out" / "runs.csv")[3][name] == rows(study.folder / "out" / "runs.csv")[3][name]
        )
    _, other = study.arguments, zygote.run([*study.arguments, "--lr", "0.5"], program=TOOL, expect=2)
    assert other.stderr.count("contains a run that was started with different settings") == 4


def test_settings_of_the_grid(zygote: Zygote, tmp_path: Path) -> None:
    """--axes, an axis of routers, several ranks: every setting reaches its runs, and nothing else differs."""
    (tmp_path / "axes.yaml").write_text(
        "width: [{hidden_size: 16, moe_ffn_hidden_size: 8}, {hidden_size: 32, moe_ffn_hidden_size: 16}]\n"
    )
    words = words_of(
        tmp_path, "--axes", tmp_path / "axes.yaml", "--axis", "router.name", "topk", "hyper", "--seeds", 2
    )
    more = [
        "--ranks",
        16,
        "--global-batch-size",
        32,
        "--gpus-per-node",
        8,
        "--dry-run",
        "--engine",
        "megatron",
        "--topk-eval",
        4,
    ]
    job = zygote.run([*words, *more], program=TOOL)
    assert "router.name = topk: E + A/N^alpha" in job.stderr
    lines = [shlex.split(line) for line in job.stdout.splitlines()]
    assert all(line[2:5] == ["--nodes=2", "--gpus-per-node=8", "examples/cluster/slurm.sh"] for line in lines)
    assert all(line[-2:] == ["--engine", "megatron"] for line in lines)
    settings = [yaml.safe_load(Path(line[line.index("--config") + 1]).read_text()) for line in lines]
    assert [
        (each["hidden_size"], each["moe_ffn_hidden_size"], each["router"]["name"], each["seed"])
        for each in settings
    ] == [
        (width, inner, router, seed)
        for seed in (7, 8)
        for width, inner in ((16, 8), (32, 16))
        for router in ("topk", "hyper")
    ]
    # several ranks: the layout of --config
    assert all(each["expert_model_parallel_size"] == 2 for each in settings)
    for each in settings:
        for name in ("hidden_size", "moe_ffn_hidden_size", "router", "seed", "run_dir"):
            each.pop(name)
    assert all(each == settings[0] for each in settings)


@pytest.fixture
def made_up() -> list[tuple[Any, dict[str, Any]]]:
    """Two routers, five sizes, three lengths, two seeds; losses from known constants, that are all of the
    table.
    """
    told = []
    for router, irreducible in (("topk", 1.8), ("hyper", 1.7)):
        for n in (1e6, 3e6, 1e7, 3e7, 1e8):
            for tokens in (10**9, 10**10, 10**11):
                for seed in (1, 2):
                    loss = irreducible + 300.0 * n**-0.35 + 500.0 * tokens**-0.3
                    score = {"topk": 2, "lm_loss": loss, "bits_per_byte": None, "active": n, "total": 2 * n}
                    point = {"router.name": router, "hidden_size": int(n**0.5), "train_iters": tokens}
                    sizes = {
                        "parameters_total": 2 * n,
                        "parameters_active": n,
                        "tokens": tokens,
                        "flops": 6 * n * tokens,
                        "seconds": 1.5,
                    }
                    told.append((Namespace(point=point), {**point, "seed": seed, **sizes, "scores": [score]}))
    return told


def arguments(output: Path, **changed: Any) -> Namespace:
    output.mkdir(exist_ok=True)
    return Namespace(
        **(
            {
                "output": output,
                "topk_eval": None,
                "curve_for": [],
                "size": "active",
                "resamples": 20,
                "score": "valid",
            }
            | changed
        )
    )


def test_a_curve_for_each_router(
    made_up: list[tuple[Any, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_hyperrouter.studies.loss_tables import write_results

    write_results(made_up, arguments(tmp_path / "a"))
    topk, hyper = json.loads((tmp_path / "a" / "fit.json").read_text())
    for found, router, irreducible in ((topk, "topk", 1.8), (hyper, "hyper", 1.7)):
        assert (found["runs"], found["k"], found["N"]) == (f"router.name = {router}", None, "active")
        expected = {"E": irreducible, "A": 300.0, "alpha": 0.35, "B": 500.0, "beta": 0.3}
        assert found["parameters"] == pytest.approx(expected, rel=1e-5)
        assert (found["number_of_runs"], found["different_sizes"], found["level"]) == (30, 15, 0.95)
        assert found["optimal_exponents"]["N"] == pytest.approx(0.3 / 0.65, rel=1e-5)
    out = capsys.readouterr().out
    assert (
        "N grows as C^0.46 [0.46, 0.46]" in out
        and "do not determine" not in out
        and "Scores on the valid split" in out
        and "nats/token" in out
    )
    write_results(made_up, arguments(tmp_path / "b", size="total", topk_eval=[2]))
    for found in json.loads((tmp_path / "b" / "fit.json").read_text()):
        assert (found["k"], found["N"]) == (2, "total")
        assert found["parameters"]["A"] == pytest.approx(300.0 * 2**0.35, rel=1e-5)
    (first, *_) = rows(tmp_path / "b" / "table.csv")
    assert (first["router.name"], first["seeds"], first["bits_per_byte_k2"]) == ("topk", "2", "")


def test_what_the_runs_do_not_tell_stands_in_the_table(
    made_up: list[tuple[Any, dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_hyperrouter.studies.loss_tables import write_results

    for _, row in made_up:
        row["scores"][0]["lm_loss"] -= 1.8 if row["router.name"] == "topk" else 0.0
    write_results(made_up, arguments(tmp_path / "a"))
    assert (
        "router.name = topk: the runs do not determine E (the fit ended at a limit of its range)"
        in capsys.readouterr().out
    )
    assert [found["at_bounds"] for found in json.loads((tmp_path / "a" / "fit.json").read_text())] == [
        ["E"],
        [],
    ]


def test_curve_for_takes_axes_apart(made_up: list[tuple[Any, dict[str, Any]]], tmp_path: Path) -> None:
    from megatron_hyperrouter.studies.loss_tables import write_results

    write_results(made_up, arguments(tmp_path / "a", curve_for=["train_iters"]))
    found = json.loads((tmp_path / "a" / "fit.json").read_text())
    assert [each["runs"] for each in found][:2] == [
        "router.name = topk, train_iters = 1000000000",
        "router.name = topk, train_iters = 10000000000",
    ]
    assert found[0]["parameters"] == pytest.approx(
        {"E": 1.8 + 500.0 * 1e9**-0.3, "A": 300.0, "alpha": 0.35}, rel=1e-5
    )


AXIS = ["--axis", "hidden_size", "16", "32"]
REFUSED: dict[str, tuple[list[str], str, str]] = {
    "no axis": ([], "", "--axis: is missing"),
    "one value": (["--axis", "hidden_size", "16"], "", "must have at least two values"),
    "no such setting": (["--axis", "hiden_size", "16", "32"], "", "did you mean hidden_size"),
    "a bad value": (["--axis", "hidden_size", "16", "0"], "", "must be an integer >= 1"),
    "a size that cannot be": (["--axis", "hidden_size", "16", "33"], "", "--num-attention-heads"),
    "values that lack one": (
        ["--axis", "hidden_size,num_layers", "16,2", "32"],
        "",
        "must have 2 values, one for each setting of hidden_size,num_layers",
    ),
    "an axis twice": (
        [*AXIS, "--axis", "hidden_size,num_layers", "16,2", "32,2"],
        "",
        "hidden_size: is set more than once",
    ),
    "an axis twice, the same settings": (
        ["--axis", "lr", "1", "2", "--axis", "lr", "3", "4"],
        "",
        "lr: is set more than once",
    ),
    "the same value in other words": (
        ["--axis", "lr", "1e-3", "0.001", "2e-3"],
        "",
        "lr=1e-3, lr=0.001: would be the same model",
    ),
    "values of nothing": (["--axes", "axes.yaml"], "a: [{}, {}]", "must have at least two values"),
    "an axis that is a flag": ([*AXIS, "--hidden-size", "64"], "", "hidden_size: is set more than once"),
    "seeds": (["--axis", "seed", "1", "2"], "", "seed: is set by this command"),
    "a flag of ours": ([*AXIS, "--run-dir", "x"], "", "set by this command"),
    "the same twice": (["--axis", "hidden_size", "16", "16"], "", "would be the name of several run folders"),
    "a curve for nothing": (
        [*AXIS, "--curve-for", "num-layers"],
        "",
        "is not a setting of any --axis",
    ),
    "too many experts": ([*AXIS, "--topk-eval", "5"], "", "must be from 1 to 4, the number of experts"),
    "no seed": ([*AXIS, "--seeds", "0"], "", "--seeds = 0: must be at least 1"),
    "k = 0": ([*AXIS, "--topk-eval", "1", "0"], "", "--topk-eval = 1 0: must be at least 1"),
    "both": ([*AXIS, "--dry-run", "--collect"], "", "cannot be combined with --dry-run"),
    "nothing to collect": ([*AXIS, "--collect"], "", "none of the 6 runs of this study is finished"),
    "half a node": (
        [*AXIS, "--dry-run", "--ranks", "12", "--global-batch-size", "24"],
        "",
        "must be at most --gpus-per-node = 8, or divisible by it",
    ),
    "no such file": (["--axes", "none.yaml"], "", "cannot be read"),
    "a file of no axes": (["--axes", "axes.yaml"], "[1, 2]", "must map axes to lists"),
    "a file of other settings": (
        ["--axes", "axes.yaml"],
        "a: [{num_layers: 2}, {hidden_size: 32}]",
        "each value must set the same settings",
    ),
    "an unknown flag": ([*AXIS, "--no-such-flag", "1"], "", "unknown flag"),
}


@pytest.mark.parametrize(("arguments", "axes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_ends_with_status_2_before_anything_starts(
    tmp_path: Path, zygote: Zygote, arguments: list[str], axes: str, says: str
) -> None:
    (tmp_path / "axes.yaml").write_text(axes)
    given = [word if word != "axes.yaml" else str(tmp_path / word) for word in arguments]
    job = zygote.run(words_of(tmp_path, *given), program=TOOL, expect=2)
    assert says in job.stderr
    assert "Traceback" not in job.stderr
    assert not (tmp_path / "out").exists()
