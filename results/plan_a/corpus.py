"""The two texts of plan A from the unpacked packages: HTML and gzipped manuals to JSON lines.

python results/plan_a/corpus.py FOLDER OUTPUT
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
    """The words of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """What is skipped begins."""
        if tag in SKIPPED:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """What is skipped ends."""
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        """Words between tags."""
        if not self._inside:
            self.parts.append(data)


def words_of(page: str) -> str:
    """The text of an HTML page, without runs of empty lines."""
    parser = Text()
    parser.feed(page)
    parser.close()
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(parser.parts)).strip()


def write(path: Path, documents: Iterable[str]) -> None:
    """One JSON object a line; short documents are indexes and are left out."""
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            if len(text) > 500:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    """Both texts, files in the order of their names."""
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    pages = sorted((folder / "anarchism").rglob("*.html"))
    manuals = sorted(folder.glob("linux-doc-6.1/**/*.rst.gz"))
    if not pages or not manuals:
        sys.exit(f"{folder} does not hold the unpacked packages anarchism and linux-doc-6.1")
    write(output / "faq.jsonl", (words_of(page.read_text("utf-8", "replace")) for page in pages))
    write(
        output / "kernel.jsonl", (gzip.decompress(m.read_bytes()).decode("utf-8", "replace") for m in manuals)
    )


if __name__ == "__main__":
    main()
