"""The content of ``certificate.json``: the source of a folder, its files, and what was proved about it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.checkpoint.folder import read_manifest
from megatron_hyperrouter.checkpoint.tensor_files import digest_of_bytes
from megatron_hyperrouter.data.tokenize.transformers_files import tokenizer_json
from megatron_hyperrouter.export.classes.names import ModelShape
from megatron_hyperrouter.export.sources import run_name, weight_reader
from megatron_hyperrouter.export.verify import CERTIFICATE, FORMAT
from megatron_hyperrouter.files import write_json
from megatron_hyperrouter.processes import processor_name

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.export.folder import Export
    from megatron_hyperrouter.routers.base import Router

_LIBRARIES = ("torch", "safetensors", "tokenizers")


def source(run: RunConfig, checkpoint: Path, routers: Mapping[int, Router]) -> dict[str, Any]:
    """The run and the weights that the folder comes from."""
    manifest = read_manifest(checkpoint)
    hashes = [getattr(router, "frozen_hash", None) for router in routers.values()]
    return {
        "run": run_name(run, checkpoint),
        "checkpoint": checkpoint.name,
        "step": manifest["step"],
        "router": run.router.name,
        "frozen_hash": [None if each is None else bytes(each.flatten().tolist()).hex() for each in hashes],
        "files": manifest["files"],
        "weights_sha256": weight_reader(checkpoint).digest(),
    }


def certificate(
    job: Export,
    folder: Path,
    *,
    came_from: dict[str, Any],
    tensors: dict[str, str],
    proof: dict[str, Any] | None,
    bounds: dict[str, float],
) -> dict[str, Any]:
    """The certificate of a folder that is otherwise complete."""
    model, sizes = job.run.model, ModelShape.of(job.run)
    text = tokenizer_json(job.tokenizer)
    return {
        "format": FORMAT,
        "product": {
            "name": "megatron-hyperrouter",
            "version": _version("megatron-hyperrouter"),
            "commit": _commit(),
        },
        "versions": {
            **{name: _version(name) for name in _LIBRARIES},
            **(proof["versions"] if proof else {}),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "processor": processor_name(),
        },
        "source": came_from,
        "model": {
            "class": job.gates.target.architecture,
            "custom_code": job.gates.target.custom_code,
            "dtype": job.dtype,
            "topk": job.topk,
            "scales": None if job.scales is None else [job.scales[layer] for layer in sorted(job.scales)],
            "router": job.gates.options,
            "norm_epsilon": model.norm_epsilon,
            "rotary_base": model.rotary_base,
            "tied": sizes.tied,
            "qk_layernorm": sizes.qk_norm,
            "head_width": sizes.heads.channels,
            "tokenizer_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        },
        "tensors": tensors,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": digest_of_bytes(path)}
            for path in sorted(folder.iterdir())
        },
        "proof": proof,
        "bounds": bounds,
    }


def write_certificate(folder: Path, content: dict[str, Any]) -> None:
    """Write the certificate, which is the last file: a folder without it is incomplete."""
    write_json(folder / CERTIFICATE, content)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout; None if the program was installed without one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    asked = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
