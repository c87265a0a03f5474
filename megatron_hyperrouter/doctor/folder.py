"""The run folder: shared by all ranks, with working renames and locks, fast enough, and with enough space."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hyperrouter.doctor.finding import Finding, fault, first_of, note, ok
from megatron_hyperrouter.doctor.ranks import Ranks

WAIT = 10.0  # seconds until a file of one machine must be visible on another
CHECKPOINTS = 3  # that must fit on the disk: one being written, the newest, and the one before
_BLOCK, _BLOCKS, _SECONDS = 4 << 20, 16, 2.0  # bytes; limits of the amount and of the time
_SLOW = 20e6  # bytes a second
_RENAMES = 100
_MOUNT = "mount the same file system on all machines, and use a folder on it for --run-dir"


def examine_folder(
    ranks: Ranks, names: Sequence[str], run_dir: Path, *, checkpoint: int | None, first_ranks: Sequence[int]
) -> list[Finding]:
    """All checks of the folder (collective); rank 0 returns the findings.

    ``names``: what each rank is called; ``checkpoint``: bytes of one; ``first_ranks``: one of each machine.
    """
    token = ranks.tell("folder/token", secrets.token_hex(4))
    # lexists raises nothing: a name may be too long, or a folder closed to this user
    new = [each for each in (run_dir, *run_dir.parents) if not os.path.lexists(each)]
    folder = run_dir / f".doctor-{token}"
    error = ""
    if ranks.rank == 0:
        error = _reason(lambda: _begin(folder, token))
    try:
        if error := ranks.tell("folder/error", error):
            return [fault("run folder", f"{run_dir} cannot be written: {error}", "give another --run-dir")]
        found = _shared(ranks, names, folder, token)
        if ranks.tell("folder/usable", all(each.level != "fault" for each in found)):
            found += _rename(ranks, folder)
            found += _lock(ranks, names, folder)
            found += _speed(ranks, names, folder, first_ranks)
        if ranks.rank == 0:
            found += _room(run_dir, checkpoint)
        ranks.meet("folder/done")
    finally:
        if ranks.rank == 0:
            _leave(folder, new)
    return found


def size_of_newest_checkpoint(run_dir: Path) -> int | None:
    """Bytes of the newest checkpoint in the folder; None if there is none."""
    with contextlib.suppress(OSError):
        steps = sorted((run_dir / "checkpoints").glob("step_*"))
        if steps:
            return sum(path.stat().st_size for path in steps[-1].rglob("*") if path.is_file())
    return None


def _leave(folder: Path, new: Sequence[Path]) -> None:
    """Remove the files of the checks, and the folders above them that the checks have made, innermost
    first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for each in new:
        with contextlib.suppress(OSError):  # it was never made, or something else has put a file there
            each.rmdir()


def _begin(folder: Path, token: str) -> None:
    folder.mkdir(parents=True)
    (folder / "content").write_text(token)


def _shared(ranks: Ranks, names: Sequence[str], folder: Path, token: str) -> list[Finding]:
    """Rank 0 writes, all read; all write, rank 0 reads."""
    told = ""
    if ranks.rank:
        told = "" if _appears(folder / "content", token) else "does not see the files of rank 0"
        why = "" if told else _reason(lambda: (folder / f"rank-{ranks.rank}").write_text(token))
        told = f"cannot write a file there ({why})" if why else told
    reports = ranks.gather("folder/shared", told)
    missing = [
        f"{names[rank]} {report}" if report else f"rank 0 does not see the files of {names[rank]}"
        for rank, report in enumerate(reports)
        if report or (rank and not _appears(folder / f"rank-{rank}", token))
    ]
    if missing:
        return [fault("run folder", f"{folder.parent} is not shared: {first_of(missing)}", _MOUNT)]
    who = "all ranks see the same folder" if ranks.size > 1 else "can be written"
    return [ok("run folder", f"{folder.parent}: {who}")]


def _appears(path: Path, content: str) -> bool:
    end = time.monotonic() + WAIT
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _rename(ranks: Ranks, folder: Path) -> list[Finding]:
    """A file that is replaced repeatedly must always exist and always be complete."""
    if ranks.rank:
        return []
    target, torn, over = folder / "renamed", [0], threading.Event()
    words = ["a" * 4096, "b" * 4096]

    def watch() -> None:
        while not over.is_set():
            try:
                torn[0] += target.read_text() not in words
            except OSError:
                torn[0] += 1

    def replace() -> None:
        target.write_text(words[0])
        reader.start()
        for number in range(_RENAMES):
            draft = folder / "draft"
            draft.write_text(words[number % 2])
            os.replace(draft, target)

    reader = threading.Thread(target=watch, daemon=True)
    error = _reason(replace)
    over.set()
    if reader.ident is not None:
        reader.join()
    remedy = "use a POSIX file system (Lustre, GPFS, NFS, local disk) for runs, not an object store"
    if error:
        return [fault("rename", f"a file cannot be replaced by a rename: {error}", remedy)]
    if torn[0]:
        return [
            fault(
                "rename",
                f"renames are not atomic: {torn[0]} reads found a missing or incomplete file",
                remedy,
            )
        ]
    return [ok("rename", f"all {_RENAMES} renames were atomic")]


def _lock(ranks: Ranks, names: Sequence[str], folder: Path) -> list[Finding]:
    """While rank 0 holds a lock, no other rank must get it."""
    path, told = folder / "lock", ""
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            why = _reason(lambda: stack.enter_context(_locked(path)))
            told = f"cannot lock a file ({why})" if why else ""
        if told := ranks.tell("folder/lock", told):
            got = [told]
        else:
            got = ranks.gather("folder/lock/tried", _try_lock(path))
        ranks.meet("folder/lock/over")
    wrong = [f"{names[rank]} {word}" for rank, word in enumerate(got) if word]
    if wrong:
        remedy = (
            "mount the file system with locks (Lustre: -o flock; NFS: without nolock), or take care "
            "never to start two runs in one folder"
        )
        return [fault("lock", f"locks do not work in the run folder: {wrong[0]}", remedy)]
    return [ok("lock", "locks work: a second process cannot lock a locked file")] if ranks.rank == 0 else []


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _try_lock(path: Path) -> str:
    try:
        with _locked(path):
            return "could lock a file that rank 0 had already locked"
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"cannot lock a file ({error.strerror or error})"


def _speed(ranks: Ranks, names: Sequence[str], folder: Path, first_ranks: Sequence[int]) -> list[Finding]:
    """One rank of each machine writes and reads at the same time."""
    own: dict[str, Any] = {}
    if ranks.rank in first_ranks:
        own["error"] = _reason(lambda: own.update(_write_and_read(folder / f"speed-{ranks.rank}")))
    told = {rank: each for rank, each in enumerate(ranks.gather("folder/speed", own)) if each}
    bad = [
        f"{names[rank]} cannot write and read a file there ({each['error']})"
        for rank, each in told.items()
        if each["error"]
    ]
    if bad:
        return [
            fault(
                "disk",
                f"the run folder cannot be used: {bad[0]}",
                "free up space on that disk, or repair the disk",
            )
        ]
    if ranks.rank:
        return []
    writes = {rank: each["write"] for rank, each in told.items()}
    slowest = min(writes, key=lambda rank: writes[rank])
    text = (
        f"{len(told)} machine{' writes' if len(told) == 1 else 's together write'} "
        f"{sum(writes.values()) / 1e6:,.0f} MB/s and read{'s' if len(told) == 1 else ''} "
        f"{sum(each['read'] for each in told.values()) / 1e6:,.0f} MB/s (partly from the page cache)"
    )
    if writes[slowest] < min(_SLOW, statistics.median(writes.values())):
        slow = f"; the slowest, {names[slowest]}, writes {writes[slowest] / 1e6:,.1f} MB/s"
        return [
            note(
                "disk",
                text + slow,
                "use --async-save or a faster disk, because saving a checkpoint is slow on this disk",
            )
        ]
    return [ok("disk", text)]


def _write_and_read(path: Path) -> dict[str, float]:
    block, begun, blocks = os.urandom(_BLOCK), time.perf_counter(), 0
    with path.open("wb") as file:
        while blocks < _BLOCKS and time.perf_counter() - begun < _SECONDS:
            blocks += file.write(block) == len(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - begun
    begun, size = time.perf_counter(), len(path.read_bytes())
    return {"write": size / written, "read": size / (time.perf_counter() - begun)}


def _room(run_dir: Path, checkpoint: int | None) -> list[Finding]:
    free = shutil.disk_usage(run_dir).free
    inodes = os.statvfs(run_dir).f_favail
    if inodes and inodes < 10_000:
        return [
            fault(
                "room",
                f"only {inodes:,} more files can be created in {run_dir}",
                "remove files from that file system",
            )
        ]
    if checkpoint is None:
        text = f"{free / 1e9:,.1f} GB free; three checkpoints of a bfloat16 run take 42 bytes per parameter"
        return [ok("room", text)]
    needed = CHECKPOINTS * checkpoint
    text = f"{free / 1e9:,.1f} GB free; {CHECKPOINTS} checkpoints take {needed / 1e9:,.1f} GB"
    if free < needed:
        return [fault("room", f"{run_dir}: {text}", "free up space, or give another --run-dir")]
    return [ok("room", text)]


def _reason(act: Callable[[], object]) -> str:
    """Try the action; returns why it failed, or an empty text."""
    try:
        act()
    except OSError as error:
        return str(error.strerror or error)
    return ""
