"""The command line that starts a layout."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_hyperrouter.planning.layouts import Candidate


def start_command(candidate: Candidate, config: str, more: Sequence[str], per_node: int) -> str:
    """``more``: flags of the program that the plan was made with."""
    nodes = max(candidate.world_size // per_node, 1)
    ranks = min(candidate.world_size, per_node)
    if candidate.config.engine.engine == "deepspeed":
        launcher = f"deepspeed --num_gpus {ranks}"
        if nodes > 1:
            launcher = f"deepspeed --hostfile HOSTFILE --num_nodes {nodes} --num_gpus {ranks}"
    else:
        launcher = f"torchrun --nproc-per-node {ranks}"
        if nodes > 1:
            launcher = (
                f"torchrun --nnodes {nodes} --nproc-per-node {ranks} --rdzv-backend c10d "
                "--rdzv-endpoint FIRST_HOST:29500"
            )
    lines = [launcher, f"pretrain_gpt_hyperrouter.py --config {shlex.quote(config)}"]
    words = _without_engine(more)
    if words:
        lines.append(shlex.join(words))
    lines.append(shlex.join(candidate.flags()))
    return "  " + " \\\n    ".join(lines)


def _without_engine(words: Sequence[str]) -> list[str]:
    """The layout's own flags name the engine, micro-batch and global batch."""
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("_", "-")
            skipping = name in ("--engine", "--micro-batch-size", "--global-batch-size")
        if not skipping:
            kept.append(word)
    return kept
