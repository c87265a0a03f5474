"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem


def write_json(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


@contextmanager
def unfinished_folder(output: Path) -> Iterator[Path]:
    """A folder under a temporary name, for :func:`publish`; what is left of it at the end is removed."""
    if output.exists():
        rule = "is already there"
        raise ConfigError([Problem("--output", output, rule, "give another folder, or move it away")])
    draft = output.with_name(f".{output.name}.unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if draft.exists():  # of a command that was killed
            shutil.rmtree(draft)
        draft.mkdir()
        yield draft
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written: {error.strerror or error}",
            remedy="make room on that disk, or give another --output",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, output: Path, *, failed: bool = False) -> Path:
    """Give the folder its name, or ``FOLDER.failed`` where it is not fit for use; returns that name."""
    target, number = output.with_name(f"{output.name}.failed") if failed else output, 1
    while failed and target.exists():
        number += 1
        target = output.with_name(f"{output.name}.failed-{number}")
    draft.rename(target)
    return target
