"""files.py: a folder that appears complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.files import publish, unfinished_folder


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    """The second one used to remove what the first one was writing."""
    output = tmp_path / "export"
    with unfinished_folder(output) as draft:
        (draft / "weights").write_text("all")
        with (
            pytest.raises(ConfigError, match="is being written by another process"),
            unfinished_folder(output),
        ):
            pass
        publish(draft, output)
    assert [path.name for path in tmp_path.iterdir()] == ["export"] and (
        output / "weights"
    ).read_text() == "all"


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".export.unfinished").mkdir()
    (tmp_path / ".export.unfinished" / "old").touch()
    with unfinished_folder(tmp_path / "export") as draft:
        assert not list(draft.iterdir())
    assert not list(tmp_path.iterdir())
