"""The whole examination; each check uses only what the checks before it have shown to work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperrouter.doctor import folder, judge, machine, network
from megatron_hyperrouter.doctor.finding import Finding
from megatron_hyperrouter.doctor.ranks import Ranks


@dataclass(frozen=True)
class Report:
    """What was found; complete only on rank 0."""

    hosts: list[str]
    ranks: int
    findings: list[Finding]
    numbers: dict[str, Any]  # bytes a second of the collectives, operations a second of each rank

    @property
    def faults(self) -> list[Finding]:
        """The findings that must be corrected."""
        return [found for found in self.findings if found.level == "fault"]


def examine(ranks: Ranks, run_dir: Path, checkpoint: int | None) -> Report:
    """Examine this machine, or all machines of the job (collective).

    ``checkpoint``: bytes of one checkpoint; None: those of the newest in the folder, where there is one.
    """
    own = machine.facts_of_this_process()
    ranks.meet("rates")  # so that all ranks of a machine compute at the same time, as they train
    own["rate"] = machine.matmul_rate()
    own["offset"], own["offset_error"] = ranks.clock_offset()
    facts = ranks.gather("facts", own)
    names = ranks.tell("names", judge.names_of(facts))
    first_ranks = ranks.tell("first ranks", judge.first_ranks(facts))
    found = judge.judge(facts, names) if ranks.rank == 0 else []
    found += network.examine_ports(ranks, names)
    collectives, numbers = network.examine_collectives(ranks, names)
    found += collectives
    size = folder.size_of_newest_checkpoint(run_dir) if checkpoint is None else checkpoint
    found += folder.examine_folder(ranks, names, run_dir, checkpoint=size, first_ranks=first_ranks)
    if facts:
        numbers["matmul"] = [each["rate"] for each in facts]
    return Report([facts[rank]["host"] for rank in first_ranks] if facts else [], ranks.size, found, numbers)
