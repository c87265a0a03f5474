"""Extract the two texts of plan A from the unpacked packages, and write them as JSON lines.

python results/plan_a/corpus.py FOLDER OUTPUT

The essay (anarchism) is in HTML pages, and the manuals (linux-doc-6.1) are in gzipped text files.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "head"}


class Text(HTMLParser):
    """Collects the text of an HTML page, without scripts, styles and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the start of an element whose text is skipped."""
        if tag in SKIPPED:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Note the end of an element whose text is skipped."""
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        """Keep text outside the skipped elements."""
        if not self._inside:
            self.parts.append(data)


def words_of(page: str) -> str:
    """Return the text of an HTML page, with at most one empty line between paragraphs."""
    parser = Text()
    parser.feed(page)
    parser.close()
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(parser.parts)).strip()


def write(path: Path, documents: Iterable[str]) -> None:
    """Write one JSON object for each document. Documents of 500 characters or less are only tables of
    contents, so they are left out.
    """
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            if len(text) > 500:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    """Write both texts. The files of each text are read in the order of their names."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    pages = sorted((folder / "anarchism").rglob("*.html"))
    manuals = sorted(folder.glob("linux-doc-6.1/**/*.rst.gz"))
    if not pages or not manuals:
        sys.exit(f"{folder} does not contain the unpacked packages anarchism and linux-doc-6.1")
    write(output / "faq.jsonl", (words_of(page.read_text("utf-8", "replace")) for page in pages))
    write(
        output / "kernel.jsonl", (gzip.decompress(m.read_bytes()).decode("utf-8", "replace") for m in manuals)
    )


if __name__ == "__main__":
    main()
