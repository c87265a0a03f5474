"""A classification task: texts with labels in three splits, from a folder of JSON lines or of an original
set.

The project's own form is ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl`` with lines
``{"text": ..., "label": ...}``, and ``labels.json`` with the names of the labels.  A label is its position in
that list or its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.finetuning import originals

PARTS = ("train", "dev", "test")


class Example(NamedTuple):
    """A text and the number of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """``labels``: names, in order; ``notes``: what a reader of the results should know of the data."""

    labels: tuple[str, ...]
    parts: Mapping[str, Sequence[Example]]  # PARTS
    notes: tuple[str, ...] = field(default=())


def read_task(folder: Path) -> Task:
    """The task in ``folder``: the project's own form, or the files of SST-2, SST-5, IMDB or BANKING77.

    DataError if a file is missing or wrong, a split is empty, or a label is unknown.
    """
    if not folder.is_dir():
        raise DataError(f"--task {folder}: there is no such folder", remedy=_FORMS)
    original = next((read for here, read in _ORIGINALS if here(folder)), None)
    task = _own(folder) if original is None else _numbered(original(folder))
    for part in PARTS:
        if not task.parts[part]:
            raise DataError(
                f"--task {folder}: the {part} split has no texts",
                remedy="add texts to that split; train, dev and test each need texts",
            )
    if len(task.labels) < 2:
        remedy = "add labels; classification needs two or more"
        raise DataError(f"--task {folder}: there is only one label, {task.labels[0]!r}", remedy=remedy)
    return Task(task.labels, task.parts, (*task.notes, *_notes(task)))


_FORMS = (
    "use a folder with train.jsonl, dev.jsonl, test.jsonl and labels.json, or with "
    "the original files of SST-2, SST-5, IMDB or BANKING77"
)
_ORIGINALS: tuple[tuple[Callable[[Path], bool], Callable[[Path], originals.Original]], ...] = (
    (originals.is_sst2, originals.sst2),
    (originals.is_sst5, originals.sst5),
    (originals.is_imdb, originals.imdb),
    (originals.is_imdb_table, originals.imdb_table),
    (originals.is_banking77, originals.banking77),
)


def _own(folder: Path) -> Task:
    for name in (*(f"{part}.jsonl" for part in PARTS), "labels.json"):
        if not (folder / name).is_file():
            raise DataError(f"--task {folder}: {name} is missing", remedy=_FORMS)
    labels = _labels(folder / "labels.json")
    return Task(labels, {part: tuple(_examples(folder / f"{part}.jsonl", labels)) for part in PARTS})


def _labels(path: Path) -> tuple[str, ...]:
    found = _parsed(path, path.read_bytes(), 1)
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        raise DataError(
            (f"{path} must be a list of names"), remedy='write, for example, ["negative", "positive"]'
        )
    if len(set(found)) < len(found):
        raise DataError(f"{path} names a label twice", remedy="give each label a different name")
    return tuple(found)


def _examples(path: Path, labels: tuple[str, ...]) -> Iterator[Example]:
    numbers: dict[Any, int] = {name: number for number, name in enumerate(labels)}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        row = _parsed(path, line, number)
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not text.strip():
            remedy = 'write each line as {"text": "...", "label": 0}'
            raise DataError(f"{path}, line {number}: there is no text", remedy=remedy)
        place = numbers.get(label) if isinstance(label, str) else label
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(labels):
            known = f"by name, or by number from 0 to {len(labels) - 1}"
            raise DataError(
                f"{path}, line {number}: {json.dumps(label)} is not a label of labels.json",
                remedy=f"use a label of labels.json ({known}), or add this label to labels.json",
            )
        yield Example(text, place)


def _parsed(path: Path, content: bytes, line: int) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(
            (f"{path}, line {line}: the line is not JSON in UTF-8 ({error})"),
            remedy="correct or remove the line",
        ) from error


def _numbered(original: originals.Original) -> Task:
    """The labels of an original set in its own order, or sorted."""
    known = original.labels or tuple(sorted({label for rows in original.parts.values() for _, label in rows}))
    places = {name: place for place, name in enumerate(known)}
    parts = dict[str, tuple[Example, ...]]()
    for part, rows in original.parts.items():
        for _, label in rows:
            if label not in places:
                raise DataError(
                    f"the {part} split has the unknown label {label!r}",
                    remedy=f"use one of the labels {', '.join(known)}",
                )
        parts[part] = tuple(Example(text, places[label]) for text, label in rows)
    return Task(known, parts, original.notes)


def _notes(task: Task) -> Iterator[str]:
    """Texts that are in two splits, and labels that no training text has."""
    seen = {part: {_plain(text) for text, _ in task.parts[part]} for part in PARTS}
    for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
        if shared := len(seen[first] & seen[second]):
            count = "1 text" if shared == 1 else f"{shared} texts"
            yield f"{count} of {second} are also in {first}, so scores on {second} may be too high"
    trained = {label for _, label in task.parts["train"]}
    if missing := [name for place, name in enumerate(task.labels) if place not in trained]:
        yield f"no text in train has the label {', '.join(missing)}"


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip() or text
