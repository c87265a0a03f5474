"""Fine-tuning on every layout and engine is fine-tuning in one process; padding counts nowhere; frozen parts
keep their bytes.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks
from program.launched import Zygote

from megatron_hyperrouter.commands.models import finetune
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import CheckpointError, ConfigError
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.start import decide

WORKER = Path(__file__).with_name("finetune_worker.py")
FLAGS = "--topk 1 2 4 --epochs 1 --lr 3e-3 --batch-size 8 --micro-batch-size 2 --evaluations 2".split()
ALONE = {"deepspeed": "--engine deepspeed", "megatron": "--engine megatron"}
ON_TWO = {
    "deepspeed, EP2": "--engine deepspeed --expert-model-parallel-size 2",
    "deepspeed, TP2": "--engine deepspeed --tensor-model-parallel-size 2",
    "deepspeed, PP2": "--engine deepspeed --pipeline-model-parallel-size 2",
    "megatron, EP2": "--engine megatron --expert-model-parallel-size 2",
    "megatron, TP2": "--engine megatron --tensor-model-parallel-size 2 --sequence-parallel",
    "megatron, PP2": "--engine megatron --pipeline-model-parallel-size 2",
}


def write_task(folder: Path) -> None:
    """Texts of 1 to 30 letters and a rule that can be learned."""
    rng = random.Random(3)
    folder.mkdir()
    (folder / "labels.json").write_text('["short", "long", "x"]')
    for part, count in (("train", 32), ("dev", 11), ("test", 13)):
        lines = []
        for _ in range(count):
            text = "".join(rng.choice("abcx ") for _ in range(rng.randint(1, 30))).strip() or "x"
            label = 2 if "x" in text else int(len(text) > 12)
            lines.append(json.dumps({"text": text, "label": label}) + "\n")
        (folder / f"{part}.jsonl").write_text("".join(lines))


class Home:
    """A folder with pre-trained runs, a task, and the results of fine-tunings."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        write_task(folder / "task")

    def cases(self, *cases: dict[str, Any], ranks: int = 1) -> Any:
        place = self.folder / f"ranks{ranks}-{len(list(self.folder.iterdir()))}"
        return run_ranks(self.zygote, WORKER, {"cases": list(cases)}, ranks=ranks, folder=place)

    def command(self, name: str, flags: str, run: str = "topk") -> dict[str, Any]:
        words = ["--load", str(self.folder / run), "--task", str(self.folder / "task")]
        return {
            "do": "command",
            "flags": [*words, "--output", str(self.folder / name), *FLAGS, *flags.split()],
        }

    def numbers(self, name: str) -> dict[str, Any]:
        results = json.loads((self.folder / name / "results.json").read_text())["results"]
        lines = self.folder / name / "training.jsonl"  # a test has none
        steps = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        return {"results": results, "steps": steps}


@pytest.fixture(scope="module")
def home(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(zygote, tmp_path_factory.mktemp("finetuning"))
    runs = {"topk": [], "hyper": ["--router.name", "hyper"]}
    home.cases(
        *(
            {"do": "pretrain", "run_dir": str(home.folder / name), "flags": flags}
            for name, flags in runs.items()
        ),
        *(home.command(name, flags) for name, flags in ALONE.items()),
        home.command("hyper-head", "--seeds 2 --freeze router", run="hyper"),
        home.command("frozen", "--freeze router,experts"),
    )
    on_two = ON_TWO | {"frozen, EP2": "--freeze router,experts --expert-model-parallel-size 2"}
    home.cases(*(home.command(name, flags) for name, flags in on_two.items()), ranks=2)
    return home


@pytest.mark.parametrize(
    "name, alone", [*((name, "deepspeed") for name in [*ALONE, *ON_TWO][1:]), ("frozen, EP2", "frozen")]
)
def test_a_layout_equals_one_process(home: Home, name: str, alone: str) -> None:
    found, expected = home.numbers(name), home.numbers(alone)
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for ours, theirs in zip(found["results"], expected["results"], strict=True):
        assert ours.pop("split") == theirs.pop("split")
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_results_are_those_of_the_contract(home: Home) -> None:
    results = home.numbers("hyper-head")["results"]
    wanted = {(k, seed, split) for k in (1, 2, 4) for seed in (1, 2) for split in ("dev", "test")}
    assert {(row["topk"], row["seed"], row["split"]) for row in results} == wanted
    assert all(
        list(row) == ["topk", "seed", "split", "accuracy", "macro_f1", "loss", "ece"] for row in results
    )
    assert len({row["loss"] for row in results}) == len(results)


def test_the_step_that_is_tested_is_the_best_on_dev(home: Home) -> None:
    steps = [step for step in home.numbers("hyper-head")["steps"] if "dev_accuracy" in step]
    chosen = json.loads((home.folder / "hyper-head/finetuning.json").read_text())["chosen_steps"]
    assert set(chosen) == {"1", "2"}
    for seed, step in chosen.items():
        own = [each for each in steps if each["seed"] == int(seed)]
        best = max(own, key=lambda each: (each["dev_accuracy"], -each["dev_loss"]))
        assert step == best["step"] and len(own) == 2


@pytest.mark.parametrize("name", ["deepspeed, EP2", "megatron, PP2"])
def test_saved_weights_give_the_same_results_on_another_layout(home: Home, name: str) -> None:
    """And no other tool takes them for a language model."""
    flags = ["--load", str(home.folder / name / "seed-1"), "--task", str(home.folder / "task"), "--test"]
    flags += ["--output", str(home.folder / f"{name}, tested"), "--topk", "1", "2", "4"]
    home.cases({"do": "command", "flags": flags})
    found, expected = (home.numbers(each)["results"] for each in (f"{name}, tested", name))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("split") == theirs.pop("split")
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert [path.name for path in (home.folder / name / "seed-1").iterdir() if path.is_dir()] == [
        "checkpoints"
    ]
    with pytest.raises(CheckpointError, match="is a fine-tuned classifier"):
        TrainedRun.open(home.folder / name / "seed-1")
    load = ["--mock-data", "--vocab-size", "300", "--load", str(home.folder / name / "seed-1")]
    for more in ([], ["--finetune"]):
        with pytest.raises(CheckpointError, match="is a fine-tuned classifier"):
            decide(parse([*load, *more, "--run-dir", str(home.folder / "new")], routers=ROUTERS))


def test_what_was_stopped_continues_to_the_same_bytes(home: Home) -> None:
    """Stopped after an evaluation, with its second save lost, and again in the middle of the second seed."""
    flags = "--seeds 2 --dropout 0.2"
    (status,) = home.cases({"do": "stopped", "after": 1} | {"flags": home.command("parts", flags)["flags"]})
    assert status == 6
    parts = home.folder / "parts"
    assert not (parts / "results.json").exists()
    with pytest.raises(ConfigError, match=r"unfinished fine-tuning run with other settings \(lr was 0.003"):
        finetune.main([*home.command("parts", flags)["flags"], "--lr", "1e-3"])
    shutil.rmtree(parts / "seed-1/checkpoints")
    asked = home.command("parts", flags)
    stopped = {"do": "stopped", "after": 4, "flags": asked["flags"]}
    told = home.cases(stopped, asked, home.command("whole", flags))
    assert told[0] == 6
    for name in ("training.jsonl", "predictions.jsonl", "results.json"):
        assert (parts / name).read_bytes() == (home.folder / "whole" / name).read_bytes(), name
    assert not list(parts.glob("*/unfinished"))


def test_the_loss_falls(home: Home) -> None:
    steps = home.numbers("deepspeed")["steps"]
    assert (
        np.mean([step["loss"] for step in steps[-2:]]) < np.mean([step["loss"] for step in steps[:2]]) - 0.02
    )


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_padding_counts_nowhere(home: Home, engine: str) -> None:
    (told,) = home.cases({"do": "padding", "load": str(home.folder / "topk"), "engine": engine})
    less, more = told["steps"]
    assert less["loss"] == pytest.approx(more["loss"], abs=1e-6)
    assert less["norm"] == pytest.approx(more["norm"], rel=1e-6)
    for name in ("entropy", "load_max_over_mean", "aux", "z"):
        assert less[name] == pytest.approx(more[name], abs=1e-6)
    assert np.allclose(told["together"], told["alone"], rtol=0, atol=1e-6)
    assert np.ptp(np.array(told["together"]), axis=0).max() > 1e-3  # the texts do not look alike


def test_without_padding_routers_see_what_a_language_model_s_see(home: Home) -> None:
    (told,) = home.cases({"do": "without_padding", "load": str(home.folder / "topk")})
    head, plain = told["layers"]
    for name, values in plain.items():
        assert head[name] == pytest.approx(values, abs=1e-6), name


CHOICES: list[list[str]] = [[], ["router"], ["experts"], ["router", "experts"]]


@pytest.mark.parametrize(
    "host, choices",
    [
        ({"engine": "deepspeed"}, CHOICES),
        ({"engine": "deepspeed", "zero_stage": 0}, CHOICES[-1:]),
        ({"engine": "deepspeed", "zero_stage": 2}, CHOICES[-1:]),
        ({"engine": "megatron"}, CHOICES),
    ],
)
def test_frozen_parts_keep_their_bytes(home: Home, host: dict[str, Any], choices: list[list[str]]) -> None:
    asked = {"do": "freezing", "load": str(home.folder / "topk"), **host}
    for freeze, told in zip(
        choices, home.cases(*(asked | {"freeze": freeze} for freeze in choices)), strict=True
    ):
        words = {"router": ".mlp.router.", "experts": ".mlp.experts."}
        frozen = {name for name in told["all"] for part in freeze if words[part] in name}
        assert frozen or not freeze
        assert set(told["changed"]) == set(told["all"]) - frozen
        assert not frozen & set(told["trained"])
