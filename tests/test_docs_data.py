"""docs/data.md agrees with the code: flags, files, statuses and numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from test_definitions import ROOT

from megatron_hyperrouter import console
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order import index_files as cache
from megatron_hyperrouter.data.order import on_demand
from megatron_hyperrouter.data.order import shuffled as order
from megatron_hyperrouter.data.store import token_files as store
from megatron_hyperrouter.data.stream import dataset, loader
from megatron_hyperrouter.data.stream.mix_schedule import mixes_of
from megatron_hyperrouter.data.tokenize import preprocess
from megatron_hyperrouter.engines import world as launch

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
PLAIN = re.sub(r"\s+", " ", PAGE)


@pytest.fixture(scope="module")
def helped() -> str:
    """What --help of the program and of the data tools says."""
    programs = [
        "pretrain_gpt_hyperrouter.py",
        *(f"tools/{name}.py" for name in ("preprocess_data", "merge_data", "inspect_data", "build_index")),
    ]
    told = [
        subprocess.run(
            [sys.executable, str(ROOT / name), "--help"], capture_output=True, text=True, check=True
        ).stdout
        for name in programs
    ]
    return "\n".join(told)


@pytest.mark.processes
def test_every_flag_is_there(helped: str) -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert len(flags) >= 20
    assert {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", helped)} == set()


@pytest.mark.processes
def test_preprocess_writes_the_files_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"KEY": "one"}\n{"KEY": "two"}\n')
    command = "--input text.jsonl --output-prefix P --json-keys KEY --tokenizer-type ByteTokenizer"
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *command.split()],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    told = re.findall(r"^\| `(P_KEY_[\w.]+)` \|", PAGE, re.MULTILINE)
    assert sorted(told) == sorted(path.name for path in tmp_path.glob("P*"))


def test_the_numbers_are_those_of_the_code() -> None:
    windows = f"{on_demand.BLOCK * on_demand.REGION:,}"
    for told in (
        f"every {preprocess.SAVE_SECONDS:g} seconds",
        f"8 bytes for each block of {on_demand.BLOCK} documents, and a few regions of {windows} documents",
        f"the blocks of {on_demand.BLOCK} documents",
        f"the documents in each region of {on_demand.REGION} blocks",
        f"less than {order._SEPARATE_BELOW:.0%} of the last epoch is used".replace("%", " %"),
        f"a file of 2**{dataset.ON_DEMAND_FROM.bit_length() - 1} documents",
        f"An index of fewer than 2**{cache.CACHED_FROM.bit_length() - 1} numbers",
        f"(default: {DataConfig().num_workers}) read ahead; each prefetches {loader._AHEAD} micro-batches",
        f"After {console.SILENCE:.0f} seconds of waiting",
        f"after {launch._PATIENCE // timedelta(hours=1)} hours",
    ):
        assert told in PLAIN, told
    for power in (dataset.ON_DEMAND_FROM, cache.CACHED_FROM):
        assert power & (power - 1) == 0
    if dist.constants.default_pg_nccl_timeout is not None:
        assert dist.constants.default_pg_nccl_timeout == timedelta(minutes=10)
    assert [str(store.smallest_dtype(size)) for size in (65499, 65500)] == ["uint16", "int32"]


def test_the_example_of_a_schedule_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "data").mkdir()
    for name in ("web", "code", "books"):
        for ending in ("bin", "idx"):
            (tmp_path / "data" / f"{name}_text_document.{ending}").touch()
    (tmp_path / "mixes.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    assert [step for step, _ in mixes_of(DataConfig(data_schedule="mixes.yaml"))] == [0, 8000]
