"""The command line that starts a layout."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from megatron_hyperrouter.paths import unexpanded
from megatron_hyperrouter.planning.layouts import Candidate


def start_command(
    candidate: Candidate, config: str, more: Sequence[str], per_node: int, named: Collection[str]
) -> str:
    """``more``: flags of the program that the plan was made with; ``named``: settings of its file."""
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
    lines = [launcher, f"pretrain_gpt_hyperrouter.py --config {shlex.quote(unexpanded(config))}"]
    chosen = candidate.flags(named)
    if words := _without(chosen, more):
        lines.append(shlex.join(words))
    lines.append(shlex.join(chosen))
    return "  " + " \\\n    ".join(lines)


def _without(chosen: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words of flags about which the layout has not its own."""
    own = {_setting(word) for word in chosen if word.startswith("--")}
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = _setting(word) in own
        if not skipping:
            kept.append(word)
    return kept


def _setting(word: str) -> str:
    """``--no_sequence_parallel`` and ``--sequence-parallel=true`` are about ``sequence-parallel``."""
    return word.partition("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-")
