"""tools/build_index.py makes the files that a run then finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write_corpus

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.stream.dataset import Builder, build_splits
from megatron_hyperrouter.data.stream.mix_schedule import mixes_of
from megatron_hyperrouter.data.stream.segments import splits_of_run
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.samples import samples_needed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_index.py"


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_a_run_finds_what_was_built_ahead(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [40] * 500)
    flags = [
        "--data-path",
        prefix,
        "--seq-length",
        "16",
        "--train-iters",
        "30000",
        "--micro-batch-size",
        "4",
        "--split",
        "9,1",
    ]
    told = tool(*flags, "--data-cache-path", tmp_path / "cache", "--world-size", 3)
    assert told.returncode == 0, told.stderr
    paths = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".index"]
    assert (
        paths and all(str(path) in told.stdout for path in paths) and "train:  360,000 samples" in told.stdout
    )

    config = parse(flags, routers=ROUTERS)
    cache = IndexCache(str(tmp_path / "cache"))
    states = {path: os.stat(path).st_mtime_ns for path in paths}
    build_splits(
        config.data,
        seq_length=16,
        seed=config.train.seed,
        vocab_size=1000,
        cache=cache,
        **samples_needed(config, 3),
    )
    assert set(cache.used) == set(paths)
    assert {
        path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache").iterdir() if path.suffix == ".index"
    } == states


def test_the_mixes_of_a_schedule_are_built_ahead(tmp_path):
    """The first mix as megatron-core orders it; of a file that is gone on with, nothing is built."""
    one, other = (write_corpus(tmp_path / name, [40] * 500) for name in ("one", "other"))
    (tmp_path / "mixes.yaml").write_text(
        f"- {{from_step: 0, data_path: [{one}]}}\n- {{from_step: 10000, data_path: [0.5, {one}, 0.5, "
        f"{other}]}}\n"
    )
    flags = [
        "--data-path",
        one,
        "--data-schedule",
        str(tmp_path / "mixes.yaml"),
        "--data-cache-path",
        str(tmp_path / "cache"),
    ]
    flags += [
        "--seq-length",
        "4",
        "--train-iters",
        "60000",
        "--micro-batch-size",
        "40",
        "--split",
        "1",
        "--eval-interval",
        "0",
    ]
    told = tool(*flags)
    assert told.returncode == 0, told.stderr
    states = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.index")}
    assert len(states) == 3, "the first mix, the second file, and how the two are mixed"

    config = parse(flags, routers=ROUTERS)
    cache = IndexCache(str(tmp_path / "cache"))
    builder = Builder(config.data, seq_length=4, seed=config.train.seed, vocab_size=1000, cache=cache)
    splits_of_run(
        builder,
        mixes_of(config.data),
        [],
        step=0,
        train_iters=60_000,
        sizes=BatchSizes(40),
        valid_samples=0,
        test_samples=0,
    )
    assert set(cache.used) == set(states) == set((tmp_path / "cache").glob("*.index"))
    assert states == {path: path.stat().st_mtime_ns for path in states}


def test_a_folder_that_cannot_be_written_is_an_error_and_not_silence(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [40] * 500)
    flags = [
        "--data-path",
        prefix,
        "--seq-length",
        16,
        "--train-iters",
        30000,
        "--micro-batch-size",
        12,
        "--split",
        "1",
    ]
    told = tool(*flags, "--data-cache-path", f"{prefix}.idx/cache")
    assert (
        told.returncode == 3
        and "1 of 1 index files could not be written" in told.stderr
        and "--data-cache-path" in told.stderr
    )
    assert "no index file is needed" not in told.stdout


def test_small_data_needs_no_file(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [40] * 50)
    told = tool("--data-path", prefix, "--seq-length", 16, "--train-iters", 3, "--split", "1")
    assert told.returncode == 0 and "no index file is needed" in told.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (["--data-path", "nothing-here"], 3),
        (["--no-such-flag", "1"], 2),
        (["--world-size", "0"], 2),
        (["--help"], 0),
    ],
)
def test_exit_statuses(flags, status):
    assert tool(*flags).returncode == status
