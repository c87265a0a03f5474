"""Index files: built once by any number of processes, complete or absent, and never used when they are
damaged.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from corpora import write_corpus
from distributed import environment

from megatron_hyperrouter import console
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order import index_files as cache
from megatron_hyperrouter.data.order.index_files import IndexCache, NamedArrays, file_identity
from megatron_hyperrouter.data.stream.dataset import SequenceDataset, Splits, build_splits

KEY = {"kind": "test", "numbers": [1, 2], "share": None}
NAMES = ("odd", "rows", "none", "words")


def made() -> NamedArrays:
    yield "odd", np.arange(13, dtype=np.int16)  # 26 bytes: no whole number of words
    yield "rows", np.arange(2 * 200_000, dtype=np.int64).reshape(-1, 2)
    yield "none", np.zeros((0, 2), np.int32)
    yield "words", np.arange(400_000, dtype=np.uint32)


def assert_made(arrays) -> None:
    expected = dict(made())
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


def never() -> NamedArrays:
    raise AssertionError("built again")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def arrays(folder: Path, build, key=KEY, names=NAMES):
    return IndexCache(str(folder), cached_from=1).arrays(key, names, build, beside="data/corpus", numbers=5)


def test_what_was_built_is_found_again(tmp_path):
    assert_made(arrays(tmp_path, made))
    (name,) = files(tmp_path)
    before = (tmp_path / name).read_bytes()
    found = arrays(tmp_path, never)
    assert_made(found)
    assert not any(array.flags.owndata or array.flags.writeable for array in found.values()), (
        "mapped, and nobody can change them"
    )
    assert (tmp_path / name).read_bytes() == before
    with pytest.raises(AssertionError, match="built again"):
        arrays(tmp_path, never, key=KEY | {"share": 0.5})


def test_a_file_may_lie_where_nobody_may_write(tmp_path):
    arrays(tmp_path, made)
    (tmp_path / files(tmp_path)[0]).with_suffix(".lock").unlink()
    os.chmod(tmp_path, 0o500)
    try:
        assert_made(arrays(tmp_path, never))
    finally:
        os.chmod(tmp_path, 0o700)
    assert len(os.listdir(tmp_path)) == 1, "not even a lock was made"


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "longer", "magic", "header", "bit", "zeroed page", "another key", "garbage"]
)
def test_a_damaged_or_foreign_file_is_built_again(tmp_path, damage):
    arrays(tmp_path, made)
    (path,) = [tmp_path / name for name in files(tmp_path)]
    good = path.read_bytes()
    bad = bytearray(good)
    if damage == "empty":
        bad = bytearray()
    elif damage == "cut":
        del bad[-1:]
    elif damage == "longer":
        bad += b"\0"
    elif damage == "magic":
        bad[0] ^= 1
    elif damage == "header":
        bad[8:16] = b"\xff" * 8
    elif damage == "bit":
        bad[len(bad) // 2] ^= 4
    elif damage == "zeroed page":
        bad[8192:12288] = bytes(4096)
    elif damage == "another key":
        bad = bytearray(good.replace(b'"share": null', b'"share": 1234', 1))
    else:
        bad = bytearray(random.Random(0).randbytes(len(good)))
    assert bytes(bad) != good
    path.write_bytes(bad)
    assert_made(arrays(tmp_path, made))
    assert path.read_bytes() == good
    assert files(tmp_path) == [path.name]


def test_many_at_once_build_it_once(tmp_path, monkeypatch):
    built, said = [], []
    monkeypatch.setattr(cache, "_SILENCE", 0.05)
    monkeypatch.setattr(console, "note", said.append)

    def build() -> NamedArrays:
        built.append(1)
        until = time.monotonic() + 30
        while not said and time.monotonic() < until:
            time.sleep(0.01)
        return made()

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: arrays(tmp_path, build), range(8)):
            assert_made(found)
    assert built == [1]
    assert {line.rsplit("/", 1)[-1] for line in said} == set(files(tmp_path)), "who waits says for what"


def test_no_array_is_kept_while_the_next_one_is_made(tmp_path):
    class Watched(np.ndarray):  # a plain array takes no weak reference on all versions
        pass

    def build() -> NamedArrays:
        one = np.arange(1000).view(Watched)
        seen = weakref.ref(one)
        yield "one", one
        del one
        assert seen() is None
        yield "two", np.arange(3)

    found = arrays(tmp_path, build, names=("one", "two"))
    np.testing.assert_array_equal(found["one"], np.arange(1000))


def test_a_builder_that_fails_leaves_nothing_and_the_next_one_builds(tmp_path):
    def fail() -> NamedArrays:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        arrays(tmp_path, fail)
    assert files(tmp_path) == []
    assert_made(arrays(tmp_path, made))


def test_a_full_disk_costs_the_file_and_not_the_run(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(console, "warn", said.append)

    def full(path, key, arrays) -> None:
        path.write_bytes(b"MHR")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "_write", full)
    assert_made(arrays(tmp_path, made))
    assert files(tmp_path) == []
    assert len(said) == 1 and "No space left" in said[0] and str(tmp_path) in said[0]


def test_where_files_lie(tmp_path, monkeypatch):
    beside = str(tmp_path / "data" / "corpus")
    (tmp_path / "data").mkdir()
    own, run = IndexCache(cached_from=1), IndexCache(fallback=str(tmp_path / "run"), cached_from=1)
    assert_made(own.arrays(KEY, NAMES, made, beside=beside, numbers=1))
    assert [path.parent for path in own.used] == [tmp_path / "data" / "cache" / "hyperrouter"]
    assert_made(run.arrays(KEY, NAMES, never, beside=beside, numbers=1))
    assert run.used == own.used

    mkdir = Path.mkdir

    def refuse(path: Path, **how) -> None:
        if "data" in path.parts:
            raise PermissionError(errno.EACCES, "no")
        mkdir(path, **how)

    monkeypatch.setattr(Path, "mkdir", refuse)
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    other = KEY | {"kind": "other"}
    assert_made(run.arrays(other, NAMES, made, beside=beside, numbers=1))
    assert run.used[-1].parent == tmp_path / "run"
    assert_made(own.arrays(other, NAMES, made, beside=beside, numbers=1))
    assert len(own.used) == 1, "nowhere to write: kept in memory"
    assert len(said) == 1 and "every process builds its own copy" in said[0]


def test_a_full_disk_beside_the_data_leaves_the_other_folder(tmp_path, monkeypatch):
    write = cache._write

    def full(path, *arguments) -> None:
        if "data" in path.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        write(path, *arguments)

    monkeypatch.setattr(cache, "_write", full)
    monkeypatch.setattr(console, "warn", lambda line: pytest.fail(line))
    run = IndexCache(fallback=str(tmp_path / "run"), cached_from=1)
    assert_made(run.arrays(KEY, NAMES, made, beside=str(tmp_path / "data" / "corpus"), numbers=1))
    assert [path.parent for path in run.used] == [tmp_path / "run"]


def test_without_locks_of_the_file_system_one_of_a_machine_builds(tmp_path, monkeypatch):
    """Each process of a machine takes a lock in the machine's own folder; nobody removes what another one is
    writing.
    """
    import fcntl

    flock, places = fcntl.flock, []

    def refuse(stream, how) -> None:
        places.append(Path(stream.name).parent)
        if tmp_path / "cache" in Path(stream.name).parents:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    built = []

    def build() -> NamedArrays:
        built.append(1)
        time.sleep(0.2)
        return made()

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: arrays(tmp_path / "cache", build), range(4)):
            assert_made(found)
    assert built == [1] and set(places) == {tmp_path / "cache", tmp_path}


def test_small_ones_are_not_worth_a_file(tmp_path):
    assert_made(IndexCache(str(tmp_path), cached_from=6).arrays(KEY, NAMES, made, beside="x", numbers=5))
    assert os.listdir(tmp_path) == []


def test_a_file_is_known_by_all_that_changes_with_it(tmp_path):
    path = tmp_path / "a.idx"
    path.write_bytes(b"a" * 10_000)
    os.utime(path, ns=(1, 1))
    first = file_identity(path)
    assert file_identity(path) == first
    for content, changed in (
        (b"a" * 10_001, 1),
        (b"a" * 10_000, 2),
        (b"b" + b"a" * 9_999, 1),
        (b"a" * 9_999 + b"b", 1),
    ):
        path.write_bytes(content)
        os.utime(path, ns=(changed, changed))
        assert file_identity(path) != first


# ---- in datasets ----


def splits(
    prefixes: list[str], folder: Path | None, *, cached_from: int = 1, weights: bool = False, **other
) -> Splits:
    words = [
        word
        for number, prefix in enumerate(prefixes, 1)
        for word in ((str(number), prefix) if weights else (prefix,))
    ]
    arguments = {
        "seq_length": 16,
        "seed": 1,
        "vocab_size": 1000,
        "train_samples": 300,
        "valid_samples": 20,
        "test_samples": 0,
    } | other
    where = IndexCache(None if folder is None else str(folder), cached_from=cached_from)
    return build_splits(DataConfig(data_path=tuple(words), split="8,2"), cache=where, **arguments)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("weights", [False, True])
def test_a_dataset_from_files_is_the_one_from_memory(tmp_path, count, weights):
    prefixes = [write_corpus(tmp_path / str(i), [40, 0, 7, 1] * 30, seed=i) for i in range(count)]
    memory = splits(prefixes, tmp_path / "never", cached_from=10**9, weights=weights)
    assert not (tmp_path / "never").exists()
    splits(prefixes, tmp_path / "cache", weights=weights)
    before = files(tmp_path / "cache")
    again = splits(prefixes, tmp_path / "cache", weights=weights)
    assert files(tmp_path / "cache") == before and len(before) >= 2
    for found, expected in ((again.train, memory.train), (again.valid, memory.valid)):
        assert len(found) == len(expected)
        for i in range(len(expected)):
            np.testing.assert_array_equal(found[i], expected[i])


def test_everything_that_changes_the_order_changes_the_file(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [40] * 100)
    seen = set()
    for other in ({}, {"seed": 2}, {"seq_length": 17}, {"train_samples": 3000}, {"train_samples": None}):
        splits([prefix], tmp_path / "cache", valid_samples=0, **other)
        now = set(files(tmp_path / "cache"))
        assert len(now - seen) == 1
        seen = now
    write_corpus(tmp_path / "corpus", [39, 41] * 50)
    found = splits([prefix], tmp_path / "cache", valid_samples=0).train
    assert len(set(files(tmp_path / "cache")) - seen) == 1, "the data changed under the same name"
    assert isinstance(found, SequenceDataset)


BUILDER = """
import sys, time
import numpy as np
from megatron_hyperrouter.data.order import index_files as cache
from megatron_hyperrouter.data.order import index

slow = index.shuffle
def shuffle(*arguments, **how):
    time.sleep(0.05)
    slow(*arguments, **how)
index.shuffle = shuffle
write = cache._write
def in_pieces(path, key, arrays):
    write(path, key, arrays)
    whole = path.read_bytes()
    with open(path, "wb") as stream:  # as a slow disk would have it
        for begin in range(0, len(whole), 1 << 18):
            stream.write(whole[begin : begin + (1 << 18)])
            stream.flush()
            time.sleep(0.01)
cache._write = in_pieces
sys.path.insert(0, TESTS)
from test_data_index_files import splits
from pathlib import Path
print("go", flush=True)
splits([sys.argv[1]], Path(sys.argv[2]), train_samples=400_000)
"""


@pytest.mark.processes
def test_kills_at_random_moments_end_in_identical_bytes(tmp_path):
    """MHR_KILLS=10 for as many kills; each of them hits one of two builders that race for the same files."""
    prefix = write_corpus(tmp_path / "corpus", [40] * 1000)
    splits([prefix], tmp_path / "good", train_samples=400_000)
    good = {name: (tmp_path / "good" / name).read_bytes() for name in files(tmp_path / "good")}
    assert len(good) == 2

    program = BUILDER.replace("TESTS", repr(str(Path(__file__).parent)))
    moments = random.Random(7)
    for _ in range(int(os.environ.get("MHR_KILLS", "2"))):
        command = [sys.executable, "-c", program, prefix, str(tmp_path / "cache")]
        builders = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) for _ in range(2)]
        for builder in builders:
            assert builder.stdout is not None and builder.stdout.readline() == b"go\n"
        time.sleep(moments.uniform(0, 1.0))
        builders[0].send_signal(signal.SIGKILL)
        builders[0].wait(60)
        assert builders[1].wait(120) == 0, "the other one takes over"
        found = {name: (tmp_path / "cache" / name).read_bytes() for name in files(tmp_path / "cache")}
        assert found == good
        for name in good:
            (tmp_path / "cache" / name).unlink()
