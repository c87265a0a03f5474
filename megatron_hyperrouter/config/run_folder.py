"""The folder of a run: what must be writable in it, and ``config.yaml``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_hyperrouter import files
from megatron_hyperrouter.config.cli import dump, replace_leaves
from megatron_hyperrouter.config.leaves import flag, value_of
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import ConfigError, Problem


def make_folders(config: RunConfig) -> None:
    """Create the folders that a run writes to; ConfigError names all that cannot be made or written."""
    problems = []
    for name in ("run_dir", "tensorboard_dir"):
        folder = value_of(config, name)
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                if name == "run_dir":
                    _try_files(Path(folder))
        except OSError as error:
            where = error.filename or folder
            reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
            problems.append(
                Problem(
                    flag(name),
                    folder,
                    f"{where} cannot be written ({reason})",
                    "give another folder, or move the existing file away",
                )
            )
    if problems:
        raise ConfigError(problems)


def _try_files(run_dir: Path) -> None:
    """Raise OSError now if a file of the run could not be written later; the steps until then would be
    lost.
    """
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists() or checkpoints.is_symlink():
        tempfile.TemporaryFile(dir=checkpoints).close()
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl"):
        if (run_dir / name).exists():
            (run_dir / name).open("ab").close()


def write_settings(config: RunConfig) -> Path:
    """Write ``config.yaml`` into the run folder atomically; it starts the same run again.

    If a run continues from its own checkpoints, it is still the same run, so its ``--load`` is left out.
    """
    folder = Path(config.logging.run_dir)
    load = config.checkpoint.load
    if load is not None and Path(load).resolve() == folder.resolve():
        config = replace_leaves(config, load=None)
    path = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(path, _started_in() + dump(config), durable=True)
    except OSError as error:
        rule = f"{path} cannot be written ({error.strerror})"
        remedy = "free up space on that disk, or give another folder"
        raise ConfigError([Problem("--run-dir", folder, rule, remedy)]) from error
    return path


def _started_in() -> str:
    """A comment for someone who uses the settings in another folder."""
    # YAML refuses control characters, even in a comment
    folder = os.fsencode(Path.cwd()).decode(errors="replace")
    here = "".join(each if each.isprintable() else "?" for each in folder)
    return f"# Relative paths in this file start from the folder in which the run was started: {here}\n"
