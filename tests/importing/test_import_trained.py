"""An imported model trains on: with made-up data alone, on either engine, and on two ranks as on one."""

from __future__ import annotations

import contextlib
import io
import shlex
from typing import Any

import pytest
from importing.given import make_model
from program.launched import Zygote, metrics

from megatron_hyperrouter.commands.models import import_hf

pytestmark = pytest.mark.processes
STEPS = 3
MODELS = {"deepseek_v3": ["--router", "hyper"], "qwen2_moe": []}
EP2 = ["--expert-model-parallel-size", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "deepspeed": (1, []),
    "deepspeed, EP2": (2, EP2),
    "megatron": (1, ["--engine", "megatron"]),
    "megatron, EP2": (2, ["--engine", "megatron", *EP2]),
}
Runs = dict[str, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The command that the import prints, with --mock-data, on each layout."""
    home = tmp_path_factory.mktemp("import-trained")
    found: Runs = {}
    for model, flags in MODELS.items():
        make_model(model, home / model)
        words = ["--input", str(home / model), "--output", str(home / f"{model}-run"), "--no-proof"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            import_hf.main([*words, *flags])
        (line,) = (line for line in out.getvalue().splitlines() if line.startswith("To train it: mhr train "))
        command = shlex.split(line.split(" (or")[0])[5:]
        more = f"--train-iters {STEPS} --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --eval-iters 0"
        found[model] = {}
        for name, (ranks, layout) in LAYOUTS.items():
            run_dir = home / f"{model}, {name}"
            flags_of_run = [word for word in command if word not in ("--data-path", "P")]
            flags_of_run[flags_of_run.index("NEW")] = str(run_dir)
            zygote.run([*flags_of_run, "--mock-data", *more.split(), *layout], ranks=ranks)
            found[model][name] = metrics(run_dir)
    return found


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "deepspeed"])
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_train_as_one_process_does(runs: Runs, model: str, layout: str) -> None:
    expected, found = runs[model]["deepspeed"], runs[model][layout]
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert expected[0]["lm_loss"] != pytest.approx(expected[-1]["lm_loss"], abs=1e-3)
