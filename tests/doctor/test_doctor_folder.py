"""The run folder after its examination is as it was before."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hyperrouter.commands.cluster.doctor import main
from megatron_hyperrouter.doctor import folder
from megatron_hyperrouter.doctor.finding import Finding
from megatron_hyperrouter.doctor.ranks import Ranks
from megatron_hyperrouter.errors import ConfigError


def examined(run_dir: Path) -> dict[str, Finding]:
    ranks = Ranks.of_this_process()
    found = folder.examine_folder(ranks, ["this rank"], run_dir, checkpoint=None, first_ranks=[0])
    return {each.check: each for each in found}


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize("there", ["", "runs", "runs/new", "runs/new/checkpoints"])
@pytest.mark.parametrize("relative", [False, True])
def test_what_did_not_exist_does_not_exist_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = tree(tmp_path)
    found = examined(Path("runs/new") if relative else tmp_path / "runs/new")
    assert {"run folder", "rename", "lock", "disk", "room"} == set(found)
    assert found["run folder"].level == "ok", found
    assert tree(tmp_path) == before


def test_a_disk_that_is_full_after_the_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    found = examined(tmp_path / "runs/new")
    assert found["run folder"].level == "fault" and "No space left" in found["run folder"].text
    assert tree(tmp_path) == []


def test_a_name_that_is_too_long_is_a_finding(tmp_path: Path) -> None:
    found = examined(tmp_path / "runs" / ("x" * 300))
    assert found["run folder"].level == "fault" and "File name too long" in found["run folder"].text
    assert tree(tmp_path) == []


def test_a_size_that_no_checkpoint_has() -> None:
    for words in ("1e300", "0"):
        with pytest.raises(ConfigError, match=r"--checkpoint-gb = .*: must be greater than 0 and less than"):
            main(["--checkpoint-gb", words])


def test_a_file_that_another_program_puts_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(run_dir: Path, checkpoint: int | None) -> list[Finding]:
        (run_dir / "config.yaml").touch()
        return []

    monkeypatch.setattr(folder, "_room", busy)
    examined(tmp_path / "runs/new")
    assert tree(tmp_path) == ["runs", "runs/new", "runs/new/config.yaml"]
