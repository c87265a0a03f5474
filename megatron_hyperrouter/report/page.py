"""The page: HTML that needs no JavaScript and no network, and can be printed."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto;
  max-width: 70rem; padding: 1rem 1.25rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid #d5d5d5 }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem }
nav { font-size: .9rem; margin: .75rem 0 }
nav a { margin-right: 1rem; white-space: nowrap }
p, figcaption { max-width: 46rem }
figure { margin: 1rem 0 1.5rem; max-width: 60rem; overflow-x: auto }
figure svg { width: 100%; min-width: 36rem; height: auto; display: block }
figcaption, .note { font-size: .88rem; color: #555 }
.wide { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .65rem; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap }
th { border-bottom: 2px solid #999 }
th:first-child, td:first-child { text-align: left }
td.text { text-align: left; white-space: normal; min-width: 14rem }
pre { font-size: .8rem; overflow-x: auto; background: #f6f6f6; padding: .75rem }
details { margin: .75rem 0 }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0 }
  nav, details, .download { display: none }
  h2, h3 { break-after: avoid }
  figure, table { break-inside: avoid }
  .wide, figure { overflow: visible }
  figure svg { min-width: 0 }
  th, td { padding: .15rem .35rem; white-space: normal }
}
"""


@dataclass
class Section:
    """A chapter of the page; ``parts`` are HTML."""

    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, words: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{html.escape(words, quote=False)}</p>")

    def heading(self, words: str) -> None:
        """A heading within the chapter."""
        self.parts.append(f"<h3>{html.escape(words, quote=False)}</h3>")

    def figure(self, svg: str, caption: str = "") -> None:
        """A plot and its caption."""
        below = f"<figcaption>{html.escape(caption, quote=False)}</figcaption>" if caption else ""
        self.parts.append(f"<figure>{svg}{below}</figure>")

    def table(
        self, heads: Sequence[str], rows: Sequence[Sequence[object]], *, name: str = "", note: str = ""
    ) -> None:
        """A table; ``name``: of the CSV file that its link offers; words are set to the left, the rest to the
        right.
        """
        if not rows:
            return
        head = "".join(f'<th scope="col">{html.escape(word)}</th>' for word in heads)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        link = _download(heads, rows, name) if name else ""
        self.parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            f"{link}"
        )
        if note:
            self.parts.append(f'<p class="note">{html.escape(note, quote=False)}</p>')

    def hidden(self, title: str, text: str) -> None:
        """Text that opens on a click."""
        inside = f"<pre>{html.escape(text, quote=False)}</pre>"
        self.parts.append(f"<details><summary>{html.escape(title)}</summary>{inside}</details>")


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole file; sections without content are left out."""
    shown = [section for section in sections if section.parts]
    links = " ".join(f'<a href="#s{number}">{html.escape(s.title)}</a>' for number, s in enumerate(shown, 1))
    body = "".join(
        f'<section><h2 id="s{number}">{html.escape(section.title)}</h2>{"".join(section.parts)}</section>\n'
        for number, section in enumerate(shown, 1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(lead, quote=False)}</p>\n<nav>{links}</nav>\n"
        f"{body}</body>\n</html>\n"
    )


def _cell(value: object) -> str:
    text = str(value)
    kind = ' class="text"' if len(text) > 40 else ""
    return f"<td{kind}>{html.escape(text, quote=False)}</td>"


def _download(heads: Sequence[str], rows: Sequence[Sequence[object]], name: str) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([heads, *rows])
    data = base64.b64encode(text.getvalue().encode()).decode()
    return (
        f'<p class="note download"><a download="{html.escape(name)}.csv" '
        f'href="data:text/csv;base64,{data}">CSV</a></p>'
    )
