"""Readers of four well-known sets, from the files that their authors publish.

Splits that a set does not have are held out of its training split. A hash decides, so the same texts are held
out on every machine; a note says so.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from megatron_hyperrouter.errors import DataError

LabelledText = tuple[str, str]  # text, label
Kind = TypeVar("Kind")


class Original(NamedTuple):
    """``labels``: in the set's own order; empty: the names that are found, sorted."""

    labels: tuple[str, ...]
    parts: Mapping[str, Sequence[LabelledText]]
    notes: tuple[str, ...]


# ----------------------------------------------------------------------------------------------- SST-2 (GLUE)
def is_sst2(folder: Path) -> bool:
    """``train.tsv`` and ``dev.tsv``."""
    return (folder / "train.tsv").is_file() and (folder / "dev.tsv").is_file()


def sst2(folder: Path) -> Original:
    """``test.tsv`` has no labels, so GLUE's dev split is the test split here, and dev is held out of
    train.
    """
    train, dev = _held_out(_table(folder / "train.tsv"), lambda row: row[0])
    note = "the test split of SST-2 has no labels, so dev.tsv is used as test and a tenth of train.tsv as dev"
    names = {"0": "negative", "1": "positive"}
    test = list(_table(folder / "dev.tsv"))
    parts = {
        part: [(text, names.get(label, label)) for text, label in rows]
        for part, rows in (("train", train), ("dev", dev), ("test", test))
    }
    return Original(("negative", "positive"), parts, (note,))


def _table(path: Path) -> Iterator[LabelledText]:
    """Columns ``sentence`` and ``label``; quotes are text."""
    for number, row in _rows(path, "\t", csv.QUOTE_NONE, ("sentence", "label")):
        yield _text(path, number, row["sentence"]), row["label"].strip()


# ------------------------------------------------------------------------------------------------------ SST-5
def is_sst5(folder: Path) -> bool:
    """Whether the folder has ``trees/train.txt`` or ``train.txt`` of the Stanford treebank."""
    return any((place / "train.txt").is_file() for place in (folder / "trees", folder))


def sst5(folder: Path) -> Original:
    """Whole sentences: the label of a tree's root, and its leaves."""
    place = folder / "trees" if (folder / "trees").is_dir() else folder
    names = ("very negative", "negative", "neutral", "positive", "very positive")
    parts = {part: list(_trees(_there(place / f"{part}.txt"), names)) for part in ("train", "dev", "test")}
    return Original(names, parts, ())


def _trees(path: Path, names: tuple[str, ...]) -> Iterator[LabelledText]:
    for number, line in enumerate(_content(path).split("\n"), 1):
        tree = line.strip()
        if not tree:
            continue
        root = re.match(r"\((\d)[ (]", tree)
        words = re.findall(r"\(\d ([^()]+)\)", tree)
        if root is None or int(root[1]) >= len(names) or not words:
            raise DataError(
                f"{path}, line {number}: the line must be a tree of the Stanford Sentiment Treebank",
                remedy="correct the line; a tree looks like (3 (2 The) (4 film))",
            )
        text = " ".join(words).replace("-LRB-", "(").replace("-RRB-", ")").replace("\\/", "/")
        yield text, names[int(root[1])]


# ------------------------------------------------------------------------------------------------------- IMDB
def is_imdb(folder: Path) -> bool:
    """``train/pos`` and so on, in the folder or in ``aclImdb``."""
    return any((place / "train/pos").is_dir() for place in (folder / "aclImdb", folder))


def imdb(folder: Path) -> Original:
    """Dev is a tenth of the films of train: reviews of one film are never on both sides."""
    place = folder / "aclImdb" if (folder / "aclImdb").is_dir() else folder
    reviews = list(_reviews(place / "train"))
    train, dev = _held_out(reviews, lambda row: row[2])
    test = [(text, label) for text, label, _ in _reviews(place / "test")]
    note = "IMDB has no dev split, so the reviews of a tenth of the films in train are used as dev"
    parts = {"train": [row[:2] for row in train], "dev": [row[:2] for row in dev], "test": test}
    return Original(("neg", "pos"), parts, (note,))


def _reviews(half: Path) -> Iterator[tuple[str, str, str]]:
    """(text, label, film); the film is in line ID of ``urls_pos.txt`` for ``pos/ID_RATING.txt``."""
    for label in ("neg", "pos"):
        if not (half / label).is_dir():
            raise DataError(f"{half / label} is missing", remedy="unpack aclImdb_v1.tar.gz again")
        listed = half / f"urls_{label}.txt"
        urls = _content(listed).splitlines() if listed.is_file() else []
        for path in sorted((half / label).glob("*.txt")):
            digits = re.match(r"\d+", path.stem)
            number = int(digits[0]) if digits else len(urls)
            film = re.search(r"tt\d+", urls[number]) if number < len(urls) else None
            yield _no_breaks(_content(path)), label, film[0] if film else path.stem


def is_imdb_table(folder: Path) -> bool:
    """One table of all reviews."""
    return any(folder.glob("IMDB*.csv"))


def imdb_table(folder: Path) -> Original:
    """``review,sentiment``: both halves are mixed, so a tenth of the texts is the test and a tenth dev."""
    path = min(folder.glob("IMDB*.csv"))
    rows = [
        (_no_breaks(_text(path, number, row["review"])), row["sentiment"].strip())
        for number, row in _rows(path, ",", csv.QUOTE_MINIMAL, ("review", "sentiment"))
    ]
    parts: dict[str, list[LabelledText]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        share = _share(row[0])
        parts["test" if share < 0.1 else "dev" if share < 0.2 else "train"].append(row)
    note = (
        "this IMDB file has no splits, so a tenth of the texts is used for testing and another tenth for dev"
    )
    return Original(("negative", "positive"), parts, (note,))


def _no_breaks(text: str) -> str:
    return re.sub(r"(?:<br\s*/?>\s*)+", "\n", text)


# -------------------------------------------------------------------------------------------------- BANKING77
def is_banking77(folder: Path) -> bool:
    """Whether the folder has BANKING77's ``train.csv`` and ``test.csv``."""
    return (folder / "train.csv").is_file() and (folder / "test.csv").is_file()


def banking77(folder: Path) -> Original:
    """``text,category``, some texts with line ends; the labels are the categories, sorted."""
    train, dev = _held_out(_questions(folder / "train.csv"), lambda row: row[0])
    note = "BANKING77 has no dev split, so a tenth of train.csv is used as dev"
    labels = tuple(sorted({label for _, label in (*train, *dev)}))
    return Original(
        labels, {"train": train, "dev": dev, "test": list(_questions(folder / "test.csv"))}, (note,)
    )


def _questions(path: Path) -> Iterator[LabelledText]:
    for number, row in _rows(path, ",", csv.QUOTE_MINIMAL, ("text", "category")):
        yield _text(path, number, row["text"]), row["category"].strip()


# ------------------------------------------------------------------------------------------ what they share
def _rows(
    path: Path, delimiter: str, quoting: Literal[0, 3], columns: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    """(last line of the row, the row) of a table with a header."""
    csv.field_size_limit(2**31 - 1)
    with io.StringIO(_content(path).removeprefix("\ufeff"), newline="") as file:
        table = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
        if missing := [name for name in columns if name not in (table.fieldnames or ())]:
            raise DataError(
                f"{path} has no column {missing[0]!r} in its first line",
                remedy=f"use the original file, which has the columns {', '.join(columns)}",
            )
        for row in table:
            if any(row[name] is None for name in columns):
                raise DataError(
                    f"{path}, line {table.line_num}: the row is too short", remedy="correct or remove the row"
                )
            yield table.line_num, row


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, byte {error.start}: the text is not UTF-8", remedy="convert the file to UTF-8"
        ) from error


def _text(path: Path, line: int, text: str) -> str:
    if not text.strip():
        raise DataError(f"{path}, line {line}: there is no text", remedy="correct or remove the row")
    return text.strip()


def _there(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path} is missing", remedy="copy that file from the original data set into the folder"
        )
    return path


def _held_out(rows: Iterable[Kind], group: Callable[[Kind], str]) -> tuple[list[Kind], list[Kind]]:
    """(the rest, a tenth) of the rows; rows of one group stay together."""
    known = list(rows)
    return (
        [row for row in known if _share(group(row)) >= 0.1],
        [row for row in known if _share(group(row)) < 0.1],
    )


def _share(group: str) -> float:
    """A number from 0 to 1 that depends on the group alone."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
