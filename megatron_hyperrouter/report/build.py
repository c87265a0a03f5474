"""The report: reads the given folders and files, and writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hyperrouter import files
from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.report import comparisons, findings, runs, studies
from megatron_hyperrouter.report.figures import Drawing
from megatron_hyperrouter.report.page import Section, page
from megatron_hyperrouter.report.sources import (
    Comparison,
    Findings,
    Finetuning,
    ScalingStudy,
    Source,
    TrainingRun,
    names_of,
    path_of,
    read,
)


def write_report(paths: Sequence[Path], output: Path) -> None:
    """One page about all ``paths``; the same files give the same bytes.  Raises ConfigError for a path that
    contains nothing to report.
    """
    sources = read_all(paths)
    drawing = Drawing()
    title = ", ".join(names_of(paths))
    files.write_bytes(output, page(title, lead(sources), chapters(sources, drawing)).encode())


def read_all(paths: Sequence[Path]) -> list[Source]:
    """What the paths hold; raises ConfigError that names every one that contains nothing."""
    found, problems = [], list[Problem]()
    for path in paths:
        try:
            found.append(read(path))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def chapters(sources: Sequence[Source], drawing: Drawing) -> list[Section]:
    """Studies first, single runs after them."""
    found: list[Section] = []
    several = len(sources) > 1
    for name, source in zip(names_of([path_of(source) for source in sources]), sources, strict=True):
        own: list[Section] = []
        if isinstance(source, Comparison):
            own = comparisons.chapters(source, drawing)
        elif isinstance(source, ScalingStudy):
            own = studies.scaling_chapters(source, drawing)
        elif isinstance(source, Findings) and source.kind == "analysis":
            own = findings.analysis_chapters(source.content, drawing)
        if several:
            for section in own:
                section.title = f"{section.title}: {name}"
        found += own
    if tuned := [source for source in sources if isinstance(source, Finetuning)]:
        found += studies.finetuning_chapters(tuned, drawing)
    if scored := [each for each in sources if isinstance(each, Findings) and each.kind == "evaluation"]:
        names = names_of([each.path.with_suffix("") for each in scored])
        models = {name: each.content for name, each in zip(names, scored, strict=True)}
        found.append(findings.quality_chapter(models, drawing, "Quality against k"))
    if trained := [source for source in sources if isinstance(source, TrainingRun)]:
        found += runs.chapters(trained, drawing)
    return found


def lead(sources: Sequence[Source]) -> str:
    """What the page is about, in a sentence."""
    kinds = (
        (TrainingRun, "training run"),
        (Comparison, "comparison of routers"),
        (Finetuning, "fine-tuning"),
        (ScalingStudy, "scaling study"),
        (Findings, "file of mhr evaluate or mhr analyze"),
    )
    counts = [(sum(isinstance(source, kind) for source in sources), word) for kind, word in kinds]
    words = [f"{count} {_plural(word, count)}" for count, word in counts if count]
    return f"Report of {_listed(words)}, written by mhr report."


def _listed(words: Sequence[str]) -> str:
    head = ", ".join(words[:-1])
    return f"{head} and {words[-1]}" if head else words[-1]


def _plural(word: str, count: int) -> str:
    if count == 1:
        return word
    head, between, tail = word.partition(" of ")
    return f"{head.removesuffix('y')}ies" if head.endswith("y") else f"{head}s{between}{tail}"
