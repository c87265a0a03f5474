"""Makes the run folders of the table in one process, exports them, and writes what their engines compute."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from export.cases import CASES, REFUSED, Case
from export.untrained import make_run

from megatron_hyperrouter.checkpoint.folder import read_manifest
from megatron_hyperrouter.commands.models.export_hf import export_of, main, read_flags
from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.proof import exports
from megatron_hyperrouter.proof.product import Prompt, product_side
from megatron_hyperrouter.proof.samples import proof_rows

TOPKS, SAMPLES, PROMPT = (1, 2, 4, 8), 3, 16


def one(case: Case, home: Path, text: Path) -> dict[str, Any]:
    """Make the run and export it without a proof; the product's numbers go beside it."""
    make_run(home / "run", text, case.settings)
    flags = ["--load", home / "run", "--output", home / "folder", "--no-proof", *shlex.split(case.flags)]
    words = [str(word) for word in flags]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(words)
    except HyperRouterError as error:
        return {"refused": str(error), "status": error.exit_status, "left": [p.name for p in home.iterdir()]}
    job, _ = export_of(read_flags(words))
    run = TrainedRun(job.checkpoint, read_manifest(job.checkpoint), job.run)
    rows_BS, _ = proof_rows(run, job.tokenizer, samples=SAMPLES)
    prompt = [int(token) for token in rows_BS[0, :PROMPT]]
    (home / "reference").mkdir()
    topks = [k for k in TOPKS if k in job.gates.target.topks]
    own = product_side(
        job.run,
        job.checkpoint,
        job.tokenizer.vocab_size,
        rows_BS,
        topks,
        home / "reference",
        Prompt(prompt, job.topk),
        job.scales,
    )
    architecture = job.gates.target.architecture
    told = {"architecture": architecture, "prompt": prompt, "greedy": own, "topks": topks}
    return told | {"scales": None if job.scales is None else list(job.scales.items())}


def proved(home: Path) -> dict[str, Any]:
    """The whole command with its proof in a child process; then with a child that tells other numbers."""
    words = ["--load", str(home / "run"), "--proof-topk", "2", "--proof-samples", "1", "--license", "mit"]
    words += ["--dtype", "bfloat16", "--topk", "3"]
    answers: list[dict[str, Any]] = []

    def noted(task: dict[str, Any], python: str | None = None) -> dict[str, Any]:
        answers.append(ask(task, python=python))
        return answers[-1]

    def worse(task: dict[str, Any], python: str | None = None) -> dict[str, Any]:
        answers[-1]["results"][0]["perplexity_hf"] *= 2
        return answers[-1]

    ask, exports.ask = exports.ask, noted
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*words, "--output", str(home / "proved")])
        main(["--verify", str(home / "proved")])
    missing = refusal([*words, "--output", str(home / "bad"), "--python", "/nowhere/python"])
    exports.ask = worse
    failed = refusal([*words, "--output", str(home / "bad")])
    exports.ask = ask
    return {"stdout": out.getvalue(), "failed": failed, "missing": missing}


def refusal(words: list[str]) -> dict[str, Any]:
    """The error that the command ends with."""
    try:
        main(words)
    except HyperRouterError as error:
        return {"message": str(error), "status": error.exit_status}
    return {}


def run_all() -> None:
    """All cases of the task."""
    task, answer = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    skip_shm_build()
    asked = json.loads(task.read_text(encoding="utf-8"))
    table = CASES | REFUSED
    told = {
        name: one(table[name], answer.parent / str(number), Path(asked["text"]))
        for number, name in enumerate(asked["cases"])
    }
    told["proved"] = proved(answer.parent / "0")
    answer.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    run_all()
