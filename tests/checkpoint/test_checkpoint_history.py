"""Which checkpoint is used, and what a rewind leaves: no complete checkpoint is ever lost or overlooked."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from checkpoint.saved import run_python, saved, visible, write_two_files
from fakes import Alone

from megatron_hyperrouter.checkpoint.folder import (
    CheckpointFolders,
    find,
    verify,
)
from megatron_hyperrouter.errors import CheckpointError


class TestLatest:
    """Whatever happened to ``latest``, checkpoints beside it are never overlooked."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        saved(tmp_path / "checkpoints", 50, 100)
        return tmp_path / "checkpoints"

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda latest: latest.unlink(), "is missing"),
            (lambda latest: latest.write_bytes(b""), "is empty"),
            (lambda latest: latest.write_bytes(b" \n\n"), "is empty"),
            (lambda latest: latest.write_bytes(bytes(13)), "is empty"),
            (
                lambda latest: latest.write_bytes(bytes(range(128, 200)) * 9),
                "not a checkpoint in this folder",
            ),
            (
                lambda latest: latest.write_text("step_0000075"),
                "names step_0000075, which is not a complete checkpoint",
            ),
            (lambda latest: latest.write_text("step_50"), "not a checkpoint in this folder"),
            (
                lambda latest: latest.write_text("../../other/checkpoints/step_0000050"),
                "not a checkpoint in this folder",
            ),
            (
                lambda latest: latest.write_text(str(latest.with_name("step_0000050"))),
                "not a checkpoint in this folder",
            ),
            (lambda latest: (latest.unlink(), latest.mkdir()), "cannot be read (Is a directory)"),
            (lambda latest: (latest.unlink(), os.mkfifo(latest)), "is empty"),  # nobody writes into it
            (lambda latest: (latest.unlink(), latest.symlink_to(latest)), "cannot be read (Too many levels"),
        ],
    )
    def test_lost(self, root: Path, capsys: pytest.CaptureFixture[str], damage, words: str) -> None:  # type: ignore[no-untyped-def]
        damage(root / "latest")
        assert find(root.parent) == root / "step_0000100"
        warning = " ".join(capsys.readouterr().err.split())
        assert warning.startswith("warning: ") and words in warning and "step_0000100" in warning

    def test_lost_beside_a_damaged_checkpoint(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (root / "latest").unlink()
        (root / "step_0000100/weights.bin").write_bytes(b"")
        assert find(root.parent) == root / "step_0000050"
        assert "skipped: " in capsys.readouterr().err
        (root / "step_0000050/manifest.json").write_text("{")
        with pytest.raises(CheckpointError, match="and no checkpoint in that folder is complete:") as caught:
            find(root.parent)
        assert all(step in caught.value.message for step in ("step_0000100", "step_0000050"))

    def test_without_any_checkpoint(self, root: Path) -> None:
        for step in (50, 100):
            shutil.rmtree(root / f"step_{step:07d}")
        with pytest.raises(CheckpointError, match="names step_0000100, which is not a complete checkpoint"):
            find(root)
        (root / "latest").unlink()
        assert find(root) is None

    @pytest.mark.parametrize("mark", ["", "\ufeff"])  # as some editors begin a file
    def test_edited_is_a_rewind(self, root: Path, mark: str) -> None:
        (root / "latest").write_text(f"{mark}step_0000050\r\n", encoding="utf-8")
        assert find(root) == root / "step_0000050"
        aside = CheckpointFolders(root, Alone()).rewind(50)
        assert aside is not None and visible(aside) == ["step_0000100"]

    def test_a_save_that_was_killed_between_rename_and_publishing_counts(self, root: Path) -> None:
        (root / "latest").replace(root / ".latest-step_0000100")
        (root / "latest").write_text("step_0000050\n")
        assert find(root) == root / "step_0000100"
        assert CheckpointFolders(root, Alone()).rewind(100) is None
        assert (root / "latest").read_text() == "step_0000100\n"
        assert visible(root) == ["latest", "step_0000050", "step_0000100"]


def test_a_name_that_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x cannot be read: File name too long"):
        find(tmp_path / ("x" * 256))


def test_keep_prunes_the_oldest(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 3, 4, keep=2).steps() == [3, 4]
    assert visible(tmp_path) == ["latest", "step_0000003", "step_0000004"]


def test_rewind_sets_later_checkpoints_aside_and_sweeps(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    folders = saved(root, 10, 20, 30)
    (root / ".writing-step_0000040").mkdir()
    (root / ".latest-step_0000040").write_text("step_0000040")
    aside = folders.rewind(10)
    assert visible(root) == ["latest", "step_0000010"]
    assert find(root) == root / "step_0000010"
    assert aside is not None and visible(aside) == ["step_0000020", "step_0000030"]
    verify(aside / "step_0000030", Alone())
    assert folders.rewind(10) is None
    assert folders.rewind(0) not in (None, aside)
    assert find(root) is None
    folders.save(10, write_two_files, {})
    assert find(root) == root / "step_0000010"


def test_a_rewind_drops_only_what_is_set_aside_already(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    folders = saved(root, 10, 20)
    first = folders.rewind(10)
    folders.save(20, write_two_files, {"another": "host"})
    assert folders.rewind(10) == first == tmp_path / "checkpoints-earlier-1"
    folders.save(20, lambda folder: (folder / "weights.bin").write_bytes(b"others"), {})
    second = folders.rewind(10)
    assert second == tmp_path / "checkpoints-earlier-2"
    (first / "step_0000020" / "weights.bin").write_bytes(b"damaged")
    folders.save(20, write_two_files, {})
    third = folders.rewind(10)
    assert third == tmp_path / "checkpoints-earlier-3" and folders.steps() == [10]
    verify(third / "step_0000020", Alone())


def test_a_rewind_keeps_a_copy_of_the_metrics(tmp_path: Path) -> None:
    folders = saved(tmp_path / "checkpoints", 10, 20)
    (tmp_path / "metrics.jsonl").write_text('{"step": 20}\n')
    aside = folders.rewind(10)
    assert aside is not None and visible(aside) == ["metrics.jsonl", "step_0000020"]


class TestProved:
    """The newest checkpoint that a healthy step has followed is kept, and is the way back."""

    def test_stays_when_older_ones_go(self, tmp_path: Path) -> None:
        folders = saved(tmp_path, 1, 2, keep=1)
        folders.prove(2)
        for step in (3, 4):
            folders.save(step, write_two_files, {})
        assert folders.steps() == [2, 4]
        assert folders.back_to_proved() == 2 and find(tmp_path) == tmp_path / "step_0000002"
        aside = folders.rewind(2)
        assert aside is not None and visible(aside) == ["step_0000004"]

    def test_nothing_is_proved_that_is_not_there(self, tmp_path: Path) -> None:
        folders = saved(tmp_path, 1)
        folders.prove(7)
        assert folders.back_to_proved() is None and find(tmp_path) == tmp_path / "step_0000001"
        (tmp_path / "proved").write_text("../elsewhere\n")
        assert folders.back_to_proved() is None


def test_a_rewind_where_the_checkpoints_are_on_a_disk_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, rename = tmp_path / "checkpoints", os.rename
    folders = saved(root, 50, 100)

    def from_disk_to_disk(source: Path, target: Path) -> None:
        if (root in Path(source).parents) != (root in Path(target).parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", from_disk_to_disk)
    assert folders.rewind(50) == root / "earlier-1"
    assert visible(root) == ["earlier-1", "latest", "step_0000050"]
    assert visible(root / "earlier-1") == ["step_0000100"] and find(tmp_path) == root / "step_0000050"
    saved(root, 100)  # the same files again
    assert folders.rewind(50) == root / "earlier-1"
    assert visible(tmp_path) == ["checkpoints"]


def test_a_folder_in_the_place_of_latest_is_named(tmp_path: Path) -> None:
    folders = saved(tmp_path, 50)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match="latest is a folder") as caught:
        folders.rewind(50)
    assert caught.value.remedy == "rename that folder"


def test_rewind_before_anything_was_saved(tmp_path: Path) -> None:
    assert CheckpointFolders(tmp_path / "none", Alone()).rewind(0) is None


KILLED_WHILE_REWINDING = """
    import json, os, shutil, signal, sys
    from pathlib import Path
    from types import SimpleNamespace
    from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, find, verify
    alone = SimpleNamespace(place=SimpleNamespace(rank=0, world_size=1), any_rank=bool)

    top = Path(sys.argv[1])
    watched = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile"}
    killed = 0
    for target in (100, 0):
        call = 0
        while True:
            call += 1
            run = top / f"run-{target}-{call}"
            root = run / "checkpoints"
            folders = CheckpointFolders(root, alone)
            for step in (100, 200, 300):
                folders.save(step, lambda folder: (folder / "a").write_bytes(b"a" * 500) and None, {})
            child = os.fork()
            if child == 0:
                left = call
                def count(event, arguments):
                    global left
                    if event in watched:
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(count)
                CheckpointFolders(root, alone).rewind(target)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            found = sorted(int(p.parent.name[-7:]) for p in run.glob("checkpoints*/step_*/manifest.json"))
            assert found == [100, 200, 300], f"to {target}, killed at call {call}: {found} are left"
            CheckpointFolders(root, alone).rewind(target)  # the same command again
            found = sorted(int(p.parent.name[-7:]) for p in run.glob("checkpoints*/step_*/manifest.json"))
            assert found == [100, 200, 300], f"to {target}, again after call {call}: {found} are left"
            folder = find(root)
            assert (folder is None) if target == 0 else (folder.name == "step_0000100"), (call, folder)
            if status == 0:
                break
            killed += 1
    print(killed)
"""


def test_a_rewind_that_is_killed_anywhere_loses_no_checkpoint(tmp_path: Path) -> None:
    result = run_python(KILLED_WHILE_REWINDING, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10
