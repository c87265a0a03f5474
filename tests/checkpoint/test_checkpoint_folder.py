"""A checkpoint is complete or absent, at whatever moment the process is killed or the disk becomes full."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint.saved import REPOSITORY, run_python, saved, visible, write_two_files
from fakes import Alone, ThreadRanks
from safetensors.torch import save_file

from megatron_hyperrouter.checkpoint.folder import (
    CheckpointFolders,
    find,
    folder_name,
    read_manifest,
    read_meta,
    verify,
)
from megatron_hyperrouter.errors import CheckpointError


def test_layout_on_disk(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 50, 100)
    assert visible(tmp_path / "checkpoints") == ["latest", "step_0000050", "step_0000100"]
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_0000100"
    manifest = json.loads((tmp_path / "checkpoints/step_0000100/manifest.json").read_text())
    assert manifest["step"] == 100
    assert manifest["files"] == {
        "optimizer/state.bin": {"bytes": 5, "crc32": f"{zlib.crc32(b'state'):08x}"},
        "weights.bin": {"bytes": 5120, "crc32": f"{zlib.crc32(bytes(range(256)) * 20):08x}"},
    }
    assert visible(tmp_path / "checkpoints/step_0000100") == ["manifest.json", "optimizer", "weights.bin"]


def test_find_takes_a_run_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 50, 100)
    newest = tmp_path / "checkpoints/step_0000100"
    assert find(tmp_path) == find(tmp_path / "checkpoints") == find(newest) == newest
    assert find(newest.with_name("step_0000050")) == newest.with_name("step_0000050")
    assert find(tmp_path / "elsewhere") is None
    assert read_meta(newest) == {"hidden_size": 8, "step": 100}


def test_the_same_step_is_not_overwritten(tmp_path: Path) -> None:
    folders = saved(tmp_path, 5)
    with pytest.raises(CheckpointError, match="already exists"):
        folders.save(5, write_two_files, {})
    verify(find(tmp_path) or tmp_path, Alone())


def test_planted_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    victim, root = tmp_path / "victim", tmp_path / "checkpoints"
    victim.mkdir()
    (victim / "file").write_text("mine")
    folders = saved(root, 10)
    for name in (".writing-step_0000020", ".removing-step_0000005", ".latest-step_0000020"):
        (root / name).symlink_to(victim, target_is_directory=True)
    folders.save(20, write_two_files, {})
    assert visible(victim) == ["file"] and (victim / "file").read_text() == "mine"
    assert visible(root) == ["latest", "step_0000010", "step_0000020"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        save_file({"a": torch.zeros(4)}, folder / "weights-00000.safetensors")  # which nobody else may read

    before = os.umask(0o027)
    try:
        folder = CheckpointFolders(tmp_path, Alone()).save(1, write, {}, texts={"settings.yaml": b"a: 1\n"})
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        "manifest.json": "0o640",
        "settings.yaml": "0o640",
        "weights-00000.safetensors": "0o640",
    }


class TestDamage:
    """Any damage is found on load, and the message names the file and the remedy."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        saved(tmp_path, 50, 100)
        return tmp_path / "step_0000100"

    def test_none(self, folder: Path) -> None:
        verify(folder, Alone())

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.unlink(), "missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 5119 bytes instead of 5120"),
            (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), "checksum"),
        ],
    )
    def test_of_a_file(self, folder: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
        damage(folder / "weights.bin")
        with pytest.raises(CheckpointError, match=message) as caught:
            verify(folder, Alone())
        assert "weights.bin" in caught.value.message
        assert f"--load {folder.parent / 'step_0000050'}" in caught.value.remedy

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "[" * 10**5, '{"format": 1}', '{"format": 2, "step": 100, "files": {}}']
    )
    def test_of_the_manifest(self, folder: Path, text: str) -> None:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(folder)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify(folder, Alone())

    @pytest.mark.parametrize(
        "change",
        [
            {"step": 50},
            {"step": -3},
            {"step": True},
            {"step": 10**30},
            {"format": 3},
            {"meta": []},
            {"meta": {"hidden_size": 9}},
            {"files": {}},
            {"files": {"../step_0000050/weights.bin": {"bytes": 1, "crc32": "0"}}},
            {"files": {"/etc/hostname": {"bytes": 1, "crc32": "0"}}},
            {"files": {"weights.bin": 5120}},
            {"sha256": "0" * 64},
            {"sha256": None},
        ],
    )
    def test_of_what_the_manifest_says(self, folder: Path, change: dict[str, object]) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        for read in (read_manifest, read_meta, lambda folder: verify(folder, Alone())):
            with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
                read(folder)
            assert caught.value.remedy

    @pytest.mark.parametrize(
        "name", ["weights-99999.safetensors", "state-00007.pt", "tokenizer/tokenizer.json"]
    )
    def test_of_a_file_too_many(self, folder: Path, name: str) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"manifest\.json does not list it") as caught:
            verify(folder, Alone())
        assert name in caught.value.message

    def test_not_of_hidden_files(self, folder: Path) -> None:
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer/.DS_Store").touch()
        verify(folder, Alone())

    def test_of_the_folders_name(self, folder: Path) -> None:
        folder.rename(folder.with_name("step_0000200"))
        with pytest.raises(
            CheckpointError, match="is for step 100, but its folder is named after another step"
        ):
            find(folder.with_name("step_0000200")) and read_manifest(folder.with_name("step_0000200"))
        folder.with_name("step_0000200").rename(folder.with_name("the-best"))  # which names no step
        assert read_manifest(folder.with_name("the-best"))["step"] == 100

    def test_without_an_older_one(self, folder: Path) -> None:
        shutil.rmtree(folder.with_name("step_0000050"))
        (folder / "weights.bin").unlink()
        with pytest.raises(CheckpointError) as caught:
            verify(folder, Alone())
        assert "no older checkpoint" in caught.value.remedy


class TestFailedSave:
    """The old checkpoint and ``latest`` stay, and no part of the new one does."""

    @staticmethod
    def check(root: Path, error: object) -> None:
        assert isinstance(error, CheckpointError) and error.exit_status == 4
        assert visible(root) == ["latest", "step_0000050"]
        assert find(root) == root / "step_0000050"
        verify(root / "step_0000050", Alone())

    @pytest.mark.parametrize(
        "kind", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
    )
    def test_in_the_writer(self, tmp_path: Path, kind: Exception) -> None:
        def fill_the_disk(folder: Path) -> None:
            write_two_files(folder)
            raise kind

        with pytest.raises(CheckpointError, match="step 100 could not be saved") as caught:
            saved(tmp_path, 50).save(100, fill_the_disk, {})
        assert str(kind) in caught.value.message
        assert "continue from step_0000050" in caught.value.remedy and "MB are free" in caught.value.remedy
        self.check(tmp_path, caught.value)

    @pytest.mark.parametrize("call", range(1, 10))
    def test_in_each_flush(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
        folders = saved(tmp_path, 50)
        calls, real = 0, os.fsync

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match="No space left") as caught:
            folders.save(100, write_two_files, {})
        if call < 9:
            self.check(tmp_path, caught.value)
        else:  # `latest` was already replaced: the new checkpoint stands
            assert find(tmp_path) == tmp_path / "step_0000100"
            verify(tmp_path / "step_0000100", Alone())

    def test_on_one_rank_is_told_to_all(self, tmp_path: Path) -> None:
        saved(tmp_path, 50)

        def work(ranks: ThreadRanks) -> Path:
            def write(folder: Path) -> None:
                (folder / f"rank{ranks.place.rank}").write_bytes(b"x" * 1000)
                if ranks.place.rank == 1:
                    raise OSError(errno.ENOSPC, "No space left on device")

            return CheckpointFolders(tmp_path, ranks).save(100, write, {})

        answers = ThreadRanks.run(3, work)
        for answer in answers:
            self.check(tmp_path, answer)
        assert "rank 1" not in str(answers[1])
        for answer in answers:  # rank 0 tells it, whoever it happened to
            assert "No space left on device" in str(answer)
        assert all("rank 1: [Errno 28] No space left" in str(answers[rank]) for rank in (0, 2))

    def test_a_reason_without_words(self, tmp_path: Path) -> None:
        def work(ranks: ThreadRanks) -> Path:
            def write(folder: Path) -> None:
                if ranks.place.rank == 1:
                    raise AssertionError

            return CheckpointFolders(tmp_path, ranks).save(100, write, {})

        assert "rank 1: AssertionError\n" in str(ThreadRanks.run(2, work)[0])

    def test_by_a_real_limit_on_file_sizes(self, tmp_path: Path) -> None:
        saved(tmp_path, 50)
        result = run_python(
            """
            import resource, sys, torch
            from pathlib import Path
            from types import SimpleNamespace
            from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
            from megatron_hyperrouter.errors import HyperRouterError
            alone = SimpleNamespace(place=SimpleNamespace(rank=0, world_size=1), any_rank=bool,
            first_word=str)  # without torch
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                CheckpointFolders(Path(sys.argv[1]), alone).save(100,
                lambda f: torch.save(torch.zeros(100_000), f / "weights.pt"), {})
            except HyperRouterError as error:
                sys.exit(error.exit_status)
            """,
            str(tmp_path),
        )
        assert result.returncode == 4, result.stderr
        assert visible(tmp_path) == ["latest", "step_0000050"]

    @pytest.fixture
    def tiny_disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk],
            check=False,
            capture_output=True,
            text=True,
        )
        if mounted.returncode:
            pytest.skip(f"no right to mount a small file system: {mounted.stderr.strip()}")
        yield disk
        subprocess.run(["umount", disk], check=True)

    def test_by_a_full_disk(self, tiny_disk: Path) -> None:
        folders = saved(tiny_disk, 50)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            folders.save(
                100, lambda folder: (folder / "weights.bin").write_bytes(bytes(500_000)) and None, {}
            )
        self.check(tiny_disk, caught.value)
        folders.save(150, write_two_files, {})  # room again
        assert find(tiny_disk) == tiny_disk / folder_name(150)


def test_ranks_share_the_work(tmp_path: Path) -> None:
    def work(ranks: ThreadRanks) -> Path:
        def write(folder: Path) -> None:
            (folder / f"rank{ranks.place.rank}").write_bytes(bytes([ranks.place.rank]) * 1000)

        folder = CheckpointFolders(tmp_path, ranks).save(7, write, {"layout": 3})
        verify(folder, ranks)
        return folder

    assert ThreadRanks.run(3, work) == [tmp_path / "step_0000007"] * 3
    verify(tmp_path / "step_0000007", Alone())
    assert visible(tmp_path / "step_0000007") == ["manifest.json", "rank0", "rank1", "rank2"]
    (tmp_path / "step_0000007/rank2").write_bytes(b"")
    answers = ThreadRanks.run(3, lambda ranks: verify(tmp_path / "step_0000007", ranks))
    assert all(isinstance(answer, CheckpointError) for answer in answers)
    # rank 0 tells it, whoever read the file
    assert all("rank2 has 0 bytes instead of 1000" in str(answer) for answer in answers)
    assert all(str(answer).count("remedy") == 1 for answer in answers)


KILLED_AT_EACH_CALL = """
    import os, signal, sys
    from pathlib import Path
    from types import SimpleNamespace
    from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, find, verify
    alone = SimpleNamespace(place=SimpleNamespace(rank=0, world_size=1),
    any_rank=bool)  # without torch: starts at once

    def write(folder):
        for name in "ab":
            (folder / name).write_bytes(name.encode() * 5000)

    root = Path(sys.argv[1])
    watched = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.listdir",
    "shutil.rmtree"}
    CheckpointFolders(root, alone).save(1, write, {})
    step, call, killed = 1, 0, 0
    while True:  # one more call of the system each time, until the save comes through
        call += 1
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
            folders = CheckpointFolders(root, alone, keep=2)
            folders.rewind(step)
            folders.save(step + 1, write, {})
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        folder = find(root)
        assert folder is not None, f"call {call}: no checkpoint left"
        verify(folder, alone)
        found = int(folder.name[-7:])
        assert found in (step, step + 1), f"call {call}: {folder} after a save of {step + 1}"
        step = found
        if status == 0:
            assert found > 1
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, f"call {call}: status {status}"
        killed += 1
    print(killed, len([p for p in root.iterdir() if p.name.startswith(".")]))
"""


def test_killed_before_each_call_of_a_save(tmp_path: Path) -> None:
    """Kill the saver before its 1st, 2nd, 3rd, ... call that opens, renames or removes: latest is always
    good.
    """
    result = run_python(KILLED_AT_EACH_CALL, str(tmp_path / "checkpoints"))
    assert result.returncode == 0, result.stderr
    killed, hidden = map(int, result.stdout.split())
    assert killed >= 15
    assert hidden == 0  # what the killed ones left is gone after the next save


SAVE_FOREVER = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace
    from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, find
    alone = SimpleNamespace(place=SimpleNamespace(rank=0, world_size=1),
    any_rank=bool)  # without torch: starts at once

    root = Path(sys.argv[1])
    folders = CheckpointFolders(root, alone, keep=2)
    folder = find(root)
    step = int(folder.name[-7:]) if folder else 0
    folders.rewind(step)
    def write(folder):
        for name in "abc":
            (folder / name).write_bytes(bytes([step % 256]) * 1_000_000)
    print("ready", flush=True)
    while True:
        step += 1
        folders.save(step, write, {"step": step})
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    moments, reached = random.Random(1), 0
    for _ in range(8):
        saver = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(tmp_path)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
        )
        assert saver.stdout is not None and saver.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.0, 0.12))
        saver.send_signal(signal.SIGKILL)
        saver.communicate()
        if folder := find(tmp_path):
            verify(folder, Alone())
            step = read_meta(folder)["step"]
            assert folder.name == folder_name(step) and step >= reached
            assert set((folder / "c").read_bytes()) == {step % 256}
            reached = step
    assert reached > 0
