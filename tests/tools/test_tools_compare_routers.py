"""Comparing routers: an interrupted comparison of two routers with two seeds, its table against loops, and
what is refused.
"""

from __future__ import annotations

import csv
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from distributed import REPOSITORY, environment
from program.launched import Zygote, metrics
from program.settings import TINY_MODEL, write_text
from scipy import stats

pytestmark = pytest.mark.processes

TOOL = REPOSITORY / "tools" / "compare_routers.py"
SETTINGS = (
    TINY_MODEL
    + """\
micro_batch_size: 2
global_batch_size: 4
expert_model_parallel_size: 2
moe_router_topk: 2
router: {name: topk, bias: true}
lr: 1.0e-2
seed: 7
split: 8,1,1
eod_mask_loss: true
num_workers: 0
eval_interval: 20
eval_iters: 2
save_interval: 2
log_interval: 20
"""
)
OPTIONS = """
twins: {name: simsmoe, frequency: 0.5, threshold: 0.0, min_tokens: 4, max_pairs: 2}
"""
STEPS, SEEDS, LABELS, TOPKS = 30, (7, 8), ("twins", "topk"), (1, 2, 4)
ONE_DEGREE = 12.7062047364  # of freedom: half of a 95 % interval in standard errors, from a printed table


def folder_of(output: Path, label: str, seed: int) -> Path:
    return output / "runs" / f"{label}-seed{seed}"


def start(
    folder: Path, *arguments: object, settings: str = SETTINGS, options: str = OPTIONS
) -> subprocess.Popen[str]:
    (folder / "run.yaml").write_text(settings, encoding="utf-8")
    (folder / "options.yaml").write_text(options, encoding="utf-8")
    command = [sys.executable, TOOL, "--config", "run.yaml", "--output", "out", *arguments]
    quiet = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": folder,
        "env": environment(),
    }
    return subprocess.Popen([str(word) for word in command], **quiet)


def finish(process: subprocess.Popen[str], expect: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == expect, err
    return out, err


class Compared(NamedTuple):
    """A comparison that was interrupted and taken up again."""

    folder: Path
    results_when_stopped: list[Path]
    step_when_stopped: int
    message_when_stopped: str
    out: str

    def results(self, label: str, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (folder_of(self.folder / "out", label, seed) / "results.json").read_text()
        )
        return found

    def rows(self, name: str) -> list[Mapping[str, str]]:
        with (self.folder / "out" / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """SIGTERM comes when the first run has its first checkpoint."""
    folder = tmp_path_factory.mktemp("compare")
    data = write_text(folder / "text")
    words = [
        "--routers",
        *LABELS,
        "--seeds",
        len(SEEDS),
        "--options",
        "options.yaml",
        "--test-iters",
        2,
        "--jobs",
        2,
    ]
    words += ["--data-path", data, "--train-iters", STEPS, "--comparisons", "twins:topk@1", "topk:twins@2"]
    process = start(folder, *words)
    first = folder_of(folder / "out", LABELS[0], SEEDS[0])
    end = time.monotonic() + 120
    while not (first / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < end, finish(process)
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, message = finish(process, expect=1)
    stopped = int((first / "checkpoints" / "latest").read_text().strip().rpartition("_")[2])
    early = sorted((folder / "out").glob("runs/*/results.json"))
    out, _ = finish(start(folder, *words))
    return Compared(folder, early, stopped, message, out)


def test_an_interruption_saves_and_is_taken_up(compared: Compared) -> None:
    assert "stopped by SIGTERM" in compared.message_when_stopped
    assert not compared.results_when_stopped
    assert 2 <= compared.step_when_stopped < STEPS
    log = (folder_of(compared.folder / "out", LABELS[0], SEEDS[0]) / "log.txt").read_text()
    assert f"continuing after step {compared.step_when_stopped} of" in log


def test_the_interrupted_run_is_the_run_of_the_program_with_these_settings(
    compared: Compared, zygote: Zygote, tmp_path: Path
) -> None:
    """SimSMoE's pair counts survive: the same numbers to the last bit."""
    folder = folder_of(compared.folder / "out", LABELS[0], SEEDS[0])
    zygote.run(
        ["--config", folder / "settings.yaml", "--run-dir", tmp_path / "again"], env={"OMP_NUM_THREADS": "1"}
    )
    assert metrics(folder) == metrics(tmp_path / "again")


def test_runs_differ_in_router_and_seed_alone(compared: Compared) -> None:
    settings = {
        (label, seed): yaml.safe_load(
            (folder_of(compared.folder / "out", label, seed) / "settings.yaml").read_text()
        )
        for label in LABELS
        for seed in SEEDS
    }
    routers = {key: found.pop("router") for key, found in settings.items()}
    for (label, seed), found in settings.items():
        assert (found.pop("run_dir"), found.pop("seed")) == (f"out/runs/{label}-seed{seed}", seed)
    assert all(found == settings["topk", 7] for found in settings.values())
    assert settings["topk", 7]["expert_model_parallel_size"] == 1  # one process, whatever --config says
    assert routers["topk", 7] == routers["topk", 8]
    assert (routers["topk", 7]["name"], routers["topk", 7]["bias"]) == ("topk", True)
    assert (routers["twins", 7]["name"], routers["twins", 7]["frequency"], routers["twins", 7]["bias"]) == (
        "simsmoe",
        0.5,
        False,
    )


def test_what_a_run_tells_against_its_metrics(compared: Compared) -> None:
    for label in LABELS:
        for seed in SEEDS:
            records = metrics(folder_of(compared.folder / "out", label, seed), times=True)
            steps, results = (
                [record for record in records if "split" not in record],
                compared.results(label, seed),
            )
            assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
            last = steps[-3:]
            for name in ("entropy", "load_max_over_mean"):
                values = [record[f"router/{name}/{layer}"] for record in last for layer in (1, 2)]
                assert results[name] == pytest.approx(sum(values) / 6, rel=1e-12)
            assert results["step_time"] == statistics.median(record["step_time"] for record in steps)
            (test,) = (record for record in records if record.get("split") == "test")
            at_2 = next(row for row in results["results"] if row["topk"] == 2)
            assert at_2["lm_loss"] == pytest.approx(test["lm_loss"], rel=1e-6)
            assert at_2["bits_per_byte"] == pytest.approx(test["bits_per_byte"], rel=1e-6)
            assert [row["topk"] for row in results["results"]] == list(TOPKS)
            assert 0.0 < results["expert_similarity"] < 1.0


def test_table_against_loops(compared: Compared) -> None:
    rows, by_router = compared.rows("runs.csv"), {row["router"]: row for row in compared.rows("table.csv")}
    assert [(row["router"], int(row["seed"])) for row in rows] == [
        (label, seed) for label in LABELS for seed in SEEDS
    ]
    for label in LABELS:
        pair = [compared.results(label, seed) for seed in SEEDS]
        measures = {
            f"bits_per_byte_k{k}": [results["results"][at]["bits_per_byte"] for results in pair]
            for at, k in enumerate(TOPKS)
        }
        measures |= {
            name: [results[name] for results in pair]
            for name in ("entropy", "load_max_over_mean", "expert_similarity")
        }
        measures |= {
            name: [
                sum(layer["jacobian"][name] for layer in results["analysis"][-1]["layers"]) / 2
                for results in pair
            ]
            for name in ("effective_rank", "drift")
        }
        for name, values in measures.items():
            assert [float(row[name]) for row in rows if row["router"] == label] == values
            assert float(by_router[label][name]) == pytest.approx(sum(values) / 2, rel=1e-12)
            half = ONE_DEGREE * abs(values[0] - values[1]) / math.sqrt(2) / math.sqrt(2)
            assert float(by_router[label][f"{name}_half95"]) == pytest.approx(half, rel=1e-9)
        assert by_router[label]["seeds"] == "2"
        shown = (
            f"{float(by_router[label]['bits_per_byte_k2']):.4f} ± "
            f"{float(by_router[label]['bits_per_byte_k2_half95']):.4f}"
        )
        assert shown in compared.out
    assert compared.out == (compared.folder / "out" / "table.md").read_text(encoding="utf-8")


def test_differences_are_paired_by_seed(compared: Compared) -> None:
    (row,) = compared.rows("differences.csv")
    assert (row["router"], row["seeds"]) == (LABELS[1], "2")
    for at, k in enumerate(TOPKS):
        first, other = (
            [compared.results(label, seed)["results"][at]["bits_per_byte"] for seed in SEEDS]
            for label in LABELS
        )
        apart = [other[0] - first[0], other[1] - first[1]]
        assert float(row[f"bits_per_byte_k{k}"]) == pytest.approx(sum(apart) / 2, rel=1e-9)
        assert float(row[f"bits_per_byte_k{k}_half95"]) == pytest.approx(
            ONE_DEGREE * abs(apart[0] - apart[1]) / 2, rel=1e-6
        )
        assert f"{sum(apart) / 2:+.4f} ± " in compared.out
    assert f"| difference from {LABELS[0]} |" in compared.out


def test_verdicts_against_scipy(compared: Compared) -> None:
    """Two comparisons: the smaller p-value counts twice."""
    rows = compared.rows("verdicts.csv")
    assert [row["comparison"] for row in rows] == ["twins minus topk", "topk minus twins"]
    expected = []
    for left, right, at in (("twins", "topk", 0), ("topk", "twins", 1)):
        values = [
            [compared.results(label, seed)["results"][at]["bits_per_byte"] for seed in SEEDS]
            for label in (left, right)
        ]
        expected.append(stats.ttest_rel(*values).pvalue)
    low, high = sorted(expected)
    adjusted = {low: min(2 * low, 1.0), high: max(min(2 * low, 1.0), high)}
    for row, p in zip(rows, expected, strict=True):
        assert float(row["p (Holm)"]) == pytest.approx(adjusted[p], rel=0.01)
    assert "| topk minus twins |" in compared.out


def test_what_routers_do_is_measured_by_layer_and_work_is_counted(compared: Compared) -> None:
    results = compared.results("topk", 7)
    assert [each["topk"] for each in results["analysis"]] == [1, 2]  # the smallest k, and that of training
    layers = results["analysis"][-1]["layers"]
    assert [row["layer"] for row in layers] == [1, 2]
    similarity = sum(row["mean_similarity"] for row in layers) / 2
    assert results["expert_similarity"] == pytest.approx(similarity)
    flops = results["flops"]
    assert (
        flops["inference"]["2"] - flops["inference"]["1"] == 2 * 3 * 32 * 48 * 2
    )  # one more expert, 2 layers
    assert flops["training"] == 3 * flops["inference"]["2"] * STEPS * 4 * 16


def test_plots_are_there(compared: Compared) -> None:
    pytest.importorskip("matplotlib")
    for name in ("bits_per_byte", "differences", "learning_curves"):
        assert (compared.folder / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_trains_nothing_and_other_settings_are_refused(compared: Compared) -> None:
    words = [
        "--routers",
        *LABELS,
        "--options",
        "options.yaml",
        "--test-iters",
        2,
        "--data-path",
        compared.folder / "text",
    ]
    asked = ["--comparisons", "twins:topk@1", "topk:twins@2"]
    out, err = finish(start(compared.folder, *words, *asked, "--seeds", 2, "--train-iters", STEPS))
    assert out == compared.out
    assert "started" not in err
    later = ["--comparisons", "twins:topk@4"]
    _, err = finish(start(compared.folder, *words, *later, "--seeds", 2, "--train-iters", STEPS), expect=2)
    assert "cannot be changed once a run is finished; this study has twins:topk@1, topk:twins@2" in err
    _, err = finish(start(compared.folder, *words, "--seeds", 1, "--train-iters", STEPS + 1), expect=2)
    assert err.count("contains a run that was started with different settings") == 2


def test_a_run_that_fails_ends_the_comparison_with_its_log(tmp_path: Path) -> None:
    _, err = finish(
        start(tmp_path, "--routers", "topk", "--seeds", 1, "--data-path", tmp_path / "nothing"), expect=1
    )
    assert "topk-seed7: training ended with exit status 3" in err
    assert "nothing" in err.partition("end of the log of this run")[2]
    assert not list(tmp_path.glob("out/*.csv"))


REFUSED: dict[str, tuple[list[str], str, str]] = {
    "an unknown router": (
        ["--routers", "topk", "hiper"],
        "",
        "--routers = hiper: is not a router\n    remedy: did you mean hyper?",
    ),
    "an option of another router": (
        ["--routers", "topk", "--options", "options.yaml"],
        "topk: {frequency: 3.0}",
        "frequency",
    ),
    "a label without its router": (
        ["--routers", "mine", "--options", "options.yaml"],
        "mine: {bias: true}",
        "--routers = mine: is not a router\n    remedy: use competesmoe, hyper,",
    ),
    "options of nobody": (
        ["--routers", "topk", "--options", "options.yaml"],
        "hyper: {bias: true}",
        "which --routers does not contain",
    ),
    "options that are no mapping": (
        ["--routers", "topk", "--options", "options.yaml"],
        "[1, 2]",
        "must map labels to options",
    ),
    "no such file": (["--routers", "topk", "--options", "none.yaml"], "", "cannot be read"),
    "a flag of ours": (["--routers", "topk", "--run-dir", "x"], "", "set by this command"),
    "an option as a flag": (
        ["--routers", "topk", "--router.bias", "true"],
        "",
        "name it with --options",
    ),
    "a comparison that cannot be read": (
        ["--routers", "topk", "xmoe", "--comparisons", "topk@1"],
        "",
        "must have the form LEFT:RIGHT@K, with two different labels and a value of k",
    ),
    "a comparison with nobody": (
        ["--routers", "topk", "xmoe", "--comparisons", "topk:hyper@1", "topk:xmoe@3"],
        "",
        "hyper is not one of the compared routers",
    ),
    "twice": (["--routers", "topk", "topk"], "", "names topk twice"),
    "a label that is a path": (["--routers", "../x"], "", "must contain only letters"),
    "no seed": (["--routers", "topk", "--seeds", "0"], "", "--seeds = 0: must be at least 1"),
    "too many experts": (
        ["--routers", "topk", "--topk-eval", "2", "5"],
        "",
        "--topk-eval = 5: must be from 1 to 4, the number of experts",
    ),
    "more experts than groups allow": (
        ["--routers", "topk", "--topk-eval", "3", "--options", "options.yaml"],
        "topk: {num_groups: 2, group_topk: 1}",
        "--topk-eval = 3: must be from 1 to 2, the number of experts in the groups",
    ),
    "an unknown flag": (["--routers", "topk", "--no-such-flag", "1"], "", "unknown flag"),
}


@pytest.mark.parametrize(("arguments", "options", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_ends_with_status_2_before_anything_starts(
    tmp_path: Path, zygote: Zygote, arguments: list[str], options: str, says: str
) -> None:
    (tmp_path / "run.yaml").write_text(SETTINGS)
    (tmp_path / "options.yaml").write_text(options)
    given = [word if word != "options.yaml" else str(tmp_path / word) for word in arguments]
    words = ["--config", tmp_path / "run.yaml", "--output", tmp_path / "out", *given, "--data-path", "text"]
    job = zygote.run(words, program=TOOL, expect=2)
    assert says in job.stderr
    assert "Traceback" not in job.stderr
    assert not (tmp_path / "out").exists()
