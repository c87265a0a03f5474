"""The proof of an export: the run's own engine and transformers on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from megatron_hyperrouter.checkpoint.folder import read_manifest
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.export.folder import Export
from megatron_hyperrouter.proof.bounds import faults
from megatron_hyperrouter.proof.child import ask
from megatron_hyperrouter.proof.product import Prompt, product_side
from megatron_hyperrouter.proof.samples import proof_rows

_PROMPT, _NEW_TOKENS = 16, 16
_TOPKS = (1, 2, 4, 8)


class Asked(NamedTuple):
    """What a proof has to compare."""

    topks: Sequence[int] | None = None  # default: 1, 2, 4, 8, and the k of the folder
    samples: int = 4
    data_path: Sequence[str] | None = None  # default: the run's test split
    python: str | None = None  # that has transformers; default: this one


def prove(job: Export, folder: Path, asked: Asked) -> tuple[dict[str, Any], list[str]]:
    """The run's engine and transformers on the same tokens: the numbers, and what is out of bounds."""
    topks = asked.topks or [k for k in _TOPKS if k in job.gates.target.topks]
    topks = sorted({*topks, job.topk})
    run = TrainedRun(job.checkpoint, read_manifest(job.checkpoint), job.run)
    rows_BS, data = proof_rows(run, job.tokenizer, samples=asked.samples, data_path=asked.data_path)
    length = rows_BS.size(1) - 1
    prompt = [int(token) for token in rows_BS[0, : min(_PROMPT, length // 2 or 1)]]
    with TemporaryDirectory(prefix="mhr-reference-") as reference:
        text = Prompt(prompt, job.topk, min(_NEW_TOKENS, length - len(prompt)))
        own = product_side(
            job.run,
            job.checkpoint,
            job.tokenizer.vocab_size,
            rows_BS,
            topks,
            Path(reference),
            text,
            job.scales,
        )
        task = {
            "folder": str(folder.resolve()),
            "reference": reference,
            "topks": topks,
            "dtype": job.dtype,
            "custom_code": job.gates.target.custom_code,
            "prompt": prompt,
            "prompt_topk": job.topk,
            "new_tokens": text.new_tokens,
            "vocab_size": job.tokenizer.vocab_size,
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
