"""resuming/kept_tokenizer.py: a run continues although its tokenizer's file has gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.manifest import fingerprint
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.tokenize.bpe import train_bpe
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.kept_tokenizer import with_kept_tokenizer
from megatron_hyperrouter.train.resuming.start import Start


def settings(file: Path) -> RunConfig:
    words = f"--mock-data --tokenizer-type HuggingFaceTokenizer --tokenizer-model {file}"
    return parse(words.split(), routers=ROUTERS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    train_bpe(iter(["a text of a few words, a text of a few words"]), 260, str(tmp_path / "own.json"))
    return tmp_path / "own.json"


@pytest.fixture
def start(file: Path, tmp_path: Path) -> Start:
    """From a checkpoint that keeps the tokenizer."""
    return started(settings(file), tmp_path / "step_0000001")


def started(config: RunConfig, folder: Path) -> Start:
    """From a checkpoint of a run with these settings."""
    description = describe(config, tokenizer=tokenizer_of(config.data).identity())
    for name, content in description.texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    files = {"settings.yaml": fingerprint(folder / "settings.yaml")}
    return Start(folder, {"step": 1, "meta": description.meta, "files": files})


def test_the_checkpoint_has_the_tokenizer(file: Path, start: Start) -> None:
    before = tokenizer_of(settings(file).data).identity()
    file.unlink()
    found = with_kept_tokenizer(settings(file), start)
    assert tokenizer_of(found.data).identity() == before


def test_the_same_command_continues_a_second_time(file: Path, start: Start, tmp_path: Path) -> None:
    """The first continuation's checkpoint names the copy in the earlier one, which may be gone."""
    file.unlink()
    first = with_kept_tokenizer(settings(file), start)
    again = started(first, tmp_path / "step_0000002")
    before = tokenizer_of(first.data).identity()
    shutil.rmtree(tmp_path / "step_0000001")
    assert tokenizer_of(with_kept_tokenizer(settings(file), again).data).identity() == before
    other = settings(file.with_name("misspelt.json"))
    assert with_kept_tokenizer(other, again) == other


def test_damaged_settings_are_a_message(file: Path, start: Start) -> None:
    file.unlink()
    (start.folder or file).joinpath("settings.yaml").write_bytes(b"\xff: [")
    with pytest.raises(CheckpointError, match=r"settings\.yaml"):
        with_kept_tokenizer(settings(file), start)


def test_a_file_that_is_there_counts(file: Path, start: Start) -> None:
    assert with_kept_tokenizer(settings(file), start) == settings(file)


def test_another_file_that_is_missing_is_not_replaced(file: Path, start: Start) -> None:
    file.unlink()
    other = settings(file.with_name("misspelt.json"))
    assert with_kept_tokenizer(other, start) == other
    assert with_kept_tokenizer(settings(file), Start()) == settings(file)
