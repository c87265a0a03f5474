"""The proof of an export: the run's own engine and transformers on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor

from megatron_hyperrouter.checkpoint.folder import read_manifest
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.export.folder import Export
from megatron_hyperrouter.proof.bounds import faults
from megatron_hyperrouter.proof.child import ask
from megatron_hyperrouter.proof.reference import greedy, write_reference
from megatron_hyperrouter.proof.samples import proof_rows

_NEW_TOKENS, _PROMPT = 16, 16
_TOPKS = (1, 2, 4, 8)


class Asked(NamedTuple):
    """What a proof is asked for."""

    topks: Sequence[int] | None = None  # default: 1, 2, 4, 8, and the k of the folder
    samples: int = 4
    data_path: Sequence[str] | None = None  # default: the run's test split
    python: str | None = None  # that has transformers; default: this one


def prove(job: Export, folder: Path, asked: Asked) -> tuple[dict[str, Any], list[str]]:
    """The run's engine and transformers on the same tokens: the numbers, and what is out of bounds."""
    topks = asked.topks or [k for k in _TOPKS if k <= job.run.model.num_experts]
    topks = sorted({*topks, job.topk})
    run = TrainedRun(job.checkpoint, read_manifest(job.checkpoint), job.run)
    rows_BS, data = proof_rows(run, job.tokenizer, samples=asked.samples, data_path=asked.data_path)
    prompt = [int(token) for token in rows_BS[0, :_PROMPT]]
    with TemporaryDirectory(prefix="mhr-reference-") as reference:
        own = product_side(job, rows_BS, topks, prompt, Path(reference))
        task = {
            "folder": str(folder.resolve()),
            "reference": reference,
            "topks": topks,
            "dtype": job.dtype,
            "custom_code": job.gates.target.custom_code,
            "prompt": prompt,
            "prompt_topk": job.topk,
            "new_tokens": _NEW_TOKENS,
        }
        answer = ask(task, python=asked.python)
    generated = answer["generated"]
    found = faults(answer, job.dtype, greedy=own)
    proof = {
        "data": data,
        "tokens": int(rows_BS[:, 1:].numel()),
        "rows": rows_BS.tolist(),
        "versions": answer["versions"],
        "results": answer["results"],
        "prompt": prompt,
        "greedy": own,
        "greedy_hf": generated,
        "faults": found,
    }
    return proof, found


def product_side(
    job: Export, rows_BS: Tensor, topks: Sequence[int], prompt: list[int], folder: Path
) -> dict[str, list[int]]:
    """Write what the run's own engine computes; returns its greedy text at the exported k."""
    engine = open_engine(job.run, vocab_size=job.tokenizer.vocab_size, for_training=False)
    try:
        engine.load(job.checkpoint, weights_only=True)
        write_reference(engine, rows_BS, topks, folder)
        length = rows_BS.size(1) - 1
        return {str(job.topk): greedy(engine, prompt, _NEW_TOKENS, topk=job.topk, length=length)}
    finally:
        engine.close()
