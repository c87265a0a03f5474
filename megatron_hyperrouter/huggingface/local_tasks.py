"""Two tasks of lm-evaluation-harness that need no download, made from given texts.

``next_line``: which of four lines comes next, by accuracy.  ``held_out``: bits per byte of whole texts,
and perplexity per byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

TASKS = ("held_out", "next_line")
_CHOICES, _CONTEXT_LINES, _QUESTIONS, _SEED = 4, 6, 100, 1234

_HELD_OUT = """task: held_out
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
metadata: {{version: 1.0}}
"""
_NEXT_LINE = """task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, texts: Sequence[str]) -> list[str]:
    """Both tasks with their data, as files that the harness reads with ``include_path``; returns those that
    have no data.
    """
    rows = {"held_out": [{"text": text} for text in texts], "next_line": list(questions(texts))}
    empty = [name for name, found in rows.items() if not found]
    for name, form in (("held_out", _HELD_OUT), ("next_line", _NEXT_LINE)):
        data = folder / f"{name}.jsonl"
        lines = [json.dumps(row) for row in rows[name]]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(form.format(file=json.dumps(str(data))), encoding="utf-8")
    return empty


def questions(texts: Sequence[str]) -> Iterator[dict[str, object]]:
    """Lines of text with the line that follows and three others, in a random but fixed order."""
    order = random.Random(_SEED)
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    distinct = sorted(set(lines))
    if len(distinct) < _CHOICES:
        return
    for at in range(_CONTEXT_LINES, len(lines), _CONTEXT_LINES)[:_QUESTIONS]:
        others = [line for line in distinct if line != lines[at]]
        choices = [*order.sample(others, _CHOICES - 1), lines[at]]
        order.shuffle(choices)
        prompt = "\n".join(lines[at - _CONTEXT_LINES : at]) + "\n"
        yield {"prompt": prompt, "choices": choices, "label": choices.index(lines[at])}
