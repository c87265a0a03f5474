"""The sources of a report: folders of runs and studies, recognised by the files in them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hyperrouter.config.reading.yaml_text import load_yaml, why_not
from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.guard.events import read_events

Record = Mapping[str, Any]


@dataclass(frozen=True)
class TrainingRun:
    """A run folder."""

    folder: Path
    settings: Mapping[str, Any]
    steps: Sequence[Record]
    evaluations: Sequence[Record]
    events: Sequence[Record]
    extra: Mapping[str, Any] = field(default_factory=dict)  # "evaluation", "analysis": what tools wrote there

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a measure, where it was recorded; nan for null."""
        found = [(record["step"], record[name]) for record in self.steps if name in record]
        return [float(step) for step, _ in found], [math.nan if v is None else float(v) for _, v in found]

    def layers(self, name: str) -> list[int]:
        """The layers that have the measure ``router/name``."""
        pattern = re.compile(rf"router/{name}/(\d+)$")
        found = {int(match[1]) for record in self.steps for key in record if (match := pattern.match(key))}
        return sorted(found)


@dataclass(frozen=True)
class Comparison:
    """A folder of ``mhr compare``: label -> seed -> results of the run."""

    folder: Path
    runs: Mapping[str, Mapping[int, Record]]
    study: Mapping[str, Any]  # study.json; empty for folders of earlier versions


@dataclass(frozen=True)
class Finetuning:
    """A folder of ``mhr finetune``."""

    folder: Path
    results: Sequence[Record]


@dataclass(frozen=True)
class ScalingStudy:
    """A folder of ``mhr scaling``: the rows of runs.csv, and the fitted curves."""

    folder: Path
    rows: Sequence[Mapping[str, str]]
    curves: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Findings:
    """A file that ``mhr evaluate`` or ``mhr analyze`` has written."""

    path: Path
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """ "analysis" or "evaluation"."""
        return _kind(self.content)


Source = TrainingRun | Comparison | Finetuning | ScalingStudy | Findings


def path_of(source: Source) -> Path:
    """The folder or the file that it was read from."""
    return source.path if isinstance(source, Findings) else source.folder


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each path: its last part, with as many folders before it as needed to make the
    names differ.
    """
    whole = [path.resolve() for path in paths]
    deepest = max((len(path.parts) for path in whole), default=1)
    for depth in range(1, deepest + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(set(whole)):
            break
    return names


def read(path: Path) -> Source:
    """Read ``path`` as a source of a report; raises ConfigError if it is none."""
    if path.is_file():
        content = _json(path)
        if _kind(content):
            return Findings(path, content)
        raise _unknown(path, "must be an output file of mhr evaluate or mhr analyze, but is not")
    if not path.is_dir():
        raise _unknown(path, "must be an existing file or folder")
    if finished := sorted(path.glob("runs/*/results.json")):
        first = _json(finished[0])
        if "expert_similarity" in first:
            return _comparison(path, finished)
    if (path / "runs.csv").is_file():
        return _scaling(path)
    if (path / "results.json").is_file():
        rows = _rows(_json(path / "results.json"))
        if rows and "accuracy" in rows[0]:
            return Finetuning(path, rows)
    if (path / "metrics.jsonl").is_file():
        return read_run(path)
    raise _unknown(path, "must be the folder of a run or of a study with finished runs, but is not")


def read_run(folder: Path) -> TrainingRun:
    """A run folder."""
    records = list(_lines(folder / "metrics.jsonl"))
    settings = folder / "config.yaml"
    extra: dict[str, Any] = {}
    named = [folder / "evaluation.json", folder / "analysis.json"]  # they count before any other file
    others = sorted((path for path in folder.glob("*.json") if path not in named), reverse=True)
    for path in [*named, *others]:
        try:
            content = _json(path) if path.is_file() else None
        except ConfigError:
            if path in named:
                raise
            continue  # not a file of this program
        if kind := _kind(content):
            extra.setdefault(kind, content)
    return TrainingRun(
        folder=folder,
        settings=settings_in(settings),
        steps=[record for record in records if "split" not in record],
        evaluations=[record for record in records if "split" in record],
        events=read_events(folder / "events.jsonl"),
        extra=extra,
    )


def _comparison(folder: Path, finished: Sequence[Path]) -> Comparison:
    study = _json(folder / "study.json") if (folder / "study.json").is_file() else {}
    runs: dict[str, dict[int, Record]] = {label: {} for label in study.get("labels", [])}
    for path in finished:
        if match := re.fullmatch(r"(.+)-seed(\d+)", path.parent.name):
            runs.setdefault(match[1], {})[int(match[2])] = _json(path)
    whole = {label: dict(sorted(seeds.items())) for label, seeds in runs.items() if seeds}
    return Comparison(folder, whole, study)


def _scaling(folder: Path) -> ScalingStudy:
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    fits = folder / "fit.json"
    return ScalingStudy(folder, rows, _json(fits) if fits.is_file() else [])


def _kind(content: Any) -> str:
    """What tool wrote this: "analysis", "evaluation", or ""."""
    rows = _rows(content)
    if not rows or "topk" not in rows[0]:
        return ""
    return "analysis" if "layers" in rows[0] else "evaluation" if "lm_loss" in rows[0] else ""


def _rows(content: Any) -> list[Record]:
    """The list "results"; empty if it is missing, or if it has other items than objects."""
    rows = content.get("results") if isinstance(content, dict) else None
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []


def settings_in(path: Path) -> dict[str, Any]:
    """The settings of a run in its YAML file; none without the file. ConfigError for a damaged one."""
    if not path.is_file():
        return {}
    remedy = "restore the file from settings.yaml in a checkpoint, or remove the file"
    try:
        found = load_yaml(str(path))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("settings", path, why_not(error), remedy)]) from error
    if not isinstance(found, dict):
        raise ConfigError([Problem("settings", path, "must map names to values", remedy)])
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unknown(path, f"cannot be read as JSON ({error})") from error


def _lines(path: Path) -> list[Record]:
    """All whole lines: a kill may have left the last one half-written."""
    found: list[Record] = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            found.append(record)
    return found


def _unknown(path: Path, rule: str) -> ConfigError:
    remedy = (
        "give a run folder, an output folder of mhr compare, finetune or scaling, or an output file "
        "of mhr evaluate or analyze"
    )
    return ConfigError([Problem("RUN_OR_STUDY", path, rule, remedy)])
