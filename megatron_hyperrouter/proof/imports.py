"""The proof of an import: transformers on the given folder, and the run's own engine, on the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.checkpoint.folder import find
from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
from megatron_hyperrouter.export.sources import plain_run, weight_reader
from megatron_hyperrouter.proof.bounds import bounds, faults
from megatron_hyperrouter.proof.child import ask
from megatron_hyperrouter.proof.exports import Asked
from megatron_hyperrouter.proof.product import product_side
from megatron_hyperrouter.proof.samples import proof_rows

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.importing.source import HfFolder

_LONGEST = 512  # positions of a sample: a folder may allow a hundred thousand


def prove_import(
    draft: Path, run: RunConfig, folder: HfFolder, topks: list[int], asked: Asked | None
) -> tuple[dict[str, Any], list[str]]:
    """``(import certificate, faults)`` of the run folder in ``draft``; without a proof where none is asked
    for.
    """
    checkpoint = find(draft)
    assert checkpoint is not None
    data = run.data
    tokenizer = build_tokenizer(
        data.tokenizer_type, _moved(data.tokenizer_model, run, draft), data.vocab_size
    )
    proof = None if asked is None else _proof(checkpoint, run, folder, topks, asked, tokenizer.vocab_size)
    content = {
        "format": 1,
        "source": {
            "folder": folder.path.resolve().name,
            "class": folder.architecture,
            "weights_sha256": folder.reader.digest(),
        },
        "run": {"router": run.router.name, "weights_sha256": weight_reader(checkpoint).digest()},
        "proof": proof,
        "bounds": bounds("float32"),
    }
    return content, proof["faults"] if proof else []


def _proof(
    checkpoint: Path, run: RunConfig, folder: HfFolder, topks: list[int], asked: Asked, vocab_size: int
) -> dict[str, Any]:
    plain = plain_run(run)
    plain = replace(plain, model=replace(plain.model, seq_length=min(run.model.seq_length, _LONGEST)))
    rows_BS, data = proof_rows(plain, vocab_size, samples=asked.samples)
    chosen = sorted(asked.topks or topks)
    with TemporaryDirectory(prefix="mhr-reference-") as reference:
        product_side(plain, checkpoint, vocab_size, rows_BS, chosen, Path(reference))
        task = {
            "folder": str(folder.path.resolve()),
            "reference": reference,
            "topks": chosen,
            "dtype": "float32",
            "dense": folder.dense,
        }
        answer = ask(task, python=asked.python)
    return {
        "data": data,
        "tokens": int(rows_BS[:, 1:].numel()),
        "versions": answer["versions"],
        "results": answer["results"],
        "faults": faults(answer, "float32"),
    }


def _moved(path: str | None, run: RunConfig, draft: Path) -> str | None:
    """The tokenizer's place while the run folder is a draft."""
    home = str(Path(run.logging.run_dir).resolve())
    return None if path is None else path.replace(home, str(draft.resolve()), 1)
