"""The proof of an import: transformers on the given folder, and the run's own engine, on the same tokens."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.evaluate.perplexity import check_topks
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.export.sources import plain_run, weight_reader
from megatron_hyperrouter.proof.bounds import bounds, faults
from megatron_hyperrouter.proof.child import COMPARE, ask, require
from megatron_hyperrouter.proof.exports import Asked
from megatron_hyperrouter.proof.product import product_side
from megatron_hyperrouter.proof.samples import random_rows

if TYPE_CHECKING:
    from megatron_hyperrouter.importing.source import HfFolder

_LONGEST = 512  # positions of a sample: a folder may allow a hundred thousand


def check_other_side(python: str | None) -> None:
    """HostError where there is no transformers to compare with."""
    require(COMPARE, python=python)


def prove_import(
    draft: Path, folder: HfFolder, topks: list[int], asked: Asked | None, *, moved: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """``(import certificate, faults)`` of the run folder in ``draft``; without a proof if none is wanted.
    ``moved``: the run is meant to compute other numbers, so only what prevented the comparison is a fault.
    """
    run = TrainedRun.open(draft)
    proof = None if asked is None else _proof(run, folder, sorted(asked.topks or topks), asked)
    content = {
        "format": 1,
        "source": {
            "folder": folder.path.resolve().name,
            "class": folder.architecture,
            "weights_sha256": folder.reader.digest(),
        },
        "run": {
            "router": run.settings.router.name,
            "weights_sha256": weight_reader(run.checkpoint).digest(),
        },
        "proof": proof,
        "bounds": bounds("float32"),
    }
    if proof is None:
        return content, []
    return content, proof["problems"] if moved else proof["faults"]


def _proof(run: TrainedRun, folder: HfFolder, topks: list[int], asked: Asked) -> dict[str, Any]:
    model = run.settings.model
    check_topks(topks, model.num_experts, router=run.settings.router, flag="--proof-topk")
    plain, vocab_size = plain_run(run.settings), run.tokenizer().vocab_size
    length = min(plain.model.seq_length, _LONGEST)
    rows_BS = random_rows((asked.samples, length + 1), vocab_size)
    with TemporaryDirectory(prefix="mhr-reference-") as reference:
        product_side(plain, run.checkpoint, vocab_size, rows_BS, topks, Path(reference))
        task = {
            "folder": str(folder.path.resolve()),
            "reference": reference,
            "topks": topks,
            "dtype": "float32",
            "dense": folder.dense,
            "left_out": folder.predicting_layers,
        }
        answer = ask(task, python=asked.python)
    return {
        "data": "random token ids",
        "tokens": int(rows_BS[:, 1:].numel()),
        "versions": answer["versions"],
        "results": answer["results"],
        "problems": answer["problems"],
        "faults": faults(answer, "float32"),
    }
