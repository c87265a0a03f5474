"""Imports folders in one process, and writes what the runs' own engines compute, on both engines."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_hyperrouter.commands.models import export_hf, import_hf
from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.export.sources import plain_run
from megatron_hyperrouter.proof.product import product_side
from megatron_hyperrouter.proof.samples import random_rows


def one(case: dict[str, Any], home: Path) -> dict[str, Any]:
    """Import; then the numbers of each engine, and the way out again."""
    home.mkdir()
    words = ["--input", case["folder"], "--output", str(home / "run"), *case["flags"]]
    if not case.get("proof"):
        words.append("--no-proof")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import_hf.main(words)
    except HyperRouterError as error:
        return {"refused": str(error), "status": error.exit_status, "left": [p.name for p in home.iterdir()]}
    trained = TrainedRun.open(home / "run")
    run, checkpoint = plain_run(trained.settings), trained.checkpoint
    rows_BS = random_rows((2, run.model.seq_length + 1), 90)
    for engine in case["engines"]:
        chosen = replace(run, engine=replace(run.engine, engine=engine))
        (home / engine).mkdir()
        product_side(chosen, checkpoint, case["rows"], rows_BS, case["topks"], home / engine)
    if case.get("back"):
        with contextlib.redirect_stdout(io.StringIO()):
            words = ["--load", str(home / "run"), "--output", str(home / "back"), "--no-proof"]
            export_hf.main([*words, "--dtype", case["back"]])
    return {"home": str(home)}


def run_all() -> None:
    """All cases of the task."""
    task, answer = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    skip_shm_build()
    asked = json.loads(task.read_text(encoding="utf-8"))
    told = {name: one(case, answer.parent / f"run-{n}") for n, (name, case) in enumerate(asked.items())}
    answer.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    run_all()
