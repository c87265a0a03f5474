"""A trained run brings its own settings and tokenizer, and finds its data wherever they are now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import Alone, FakeEngine

from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, read_manifest
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.tree import DataConfig, RunConfig
from megatron_hyperrouter.data.store.token_files import IndexedDataset, IndexedWriter
from megatron_hyperrouter.data.stream.file_identity import identity
from megatron_hyperrouter.data.tokenize.bpe import train_bpe
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.errors import CheckpointError, ConfigError
from megatron_hyperrouter.evaluate.saved_settings import settings_of
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.evaluate.whereabouts import are_own, with_tokenizer
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.run_meta import run_meta


def token_file(prefix: Path, first: int) -> None:
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for number in range(40):
            writer.add_document(np.arange(number, number + 30).astype(np.uint16) % 90 + first)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, a tokenizer, and a run that was started in it with relative paths."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    token_file(home / "text", first=97)
    train_bpe(iter(["a text to learn from"] * 9), 300, str(home / "tok.json"))
    flags = (
        "--data-path text --split 50,25,25 --seq-length 8 --run-dir run "
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tok.json"
    )
    config = parse(flags.split(), routers=ROUTERS, world_size=1)
    described = describe(config, tokenizer=tokenizer_of(config.data).identity())
    described.meta["files"] = {"text": identity(IndexedDataset("text", whole=False))}
    engine = FakeEngine(300)
    meta = run_meta(config, engine) | described.meta
    CheckpointFolders(home / "run/checkpoints", Alone()).save(5, engine.save, meta, texts=described.texts)
    return home


def test_paths_relative_to_where_the_run_was_started(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    token_file(home / "elsewhere/text", first=300)  # another file by the same relative name
    run = TrainedRun.open(home / "run")
    assert run.step == 5 and run.data().data_path == (str(home / "text"),)
    assert run.tokenizer().sha256() == run.manifest["meta"]["tokenizer"]["sha256"]


def test_a_moved_run_finds_its_data(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    (moved / "tok.json").unlink()  # the checkpoint has its own
    run = TrainedRun.open(moved / "run/checkpoints/step_0000005")
    assert run.data().data_path == (str(moved / "text"),)
    assert len(run.dataset(run.tokenizer())) > 5


def test_the_runs_own_files_at_another_place_are_divided_as_in_the_run(home: Path, tmp_path: Path) -> None:
    run = TrainedRun.open(home / "run")
    before = len(run.dataset(run.tokenizer()))
    for ending in ("bin", "idx"):
        (home / f"text.{ending}").rename(tmp_path / f"moved.{ending}")
    token_file(home / "other", first=97)
    moved, other = str(tmp_path / "moved"), str(home / "other")
    assert len(run.dataset(run.tokenizer(), data_path=[moved])) == before
    assert len(run.dataset(run.tokenizer(), data_path=["1.0", moved])) == before
    with IndexedWriter(other, np.uint16) as writer:
        writer.add_document(np.arange(40 * 30, dtype=np.uint16) % 90 + 97)
    assert len(run.dataset(run.tokenizer(), data_path=[other])) > 3 * before  # used whole
    assert len(run.dataset(run.tokenizer(), data_path=[moved, other])) > 6 * before


def test_some_of_the_runs_own_files_are_divided_too(home: Path) -> None:
    token_file(home / "more", first=120)
    known = {name: identity(IndexedDataset(name, whole=False)) for name in ("text", "more")}
    own, meta = DataConfig(data_path=("0.3", "text", "0.7", "more")), {"files": known}
    assert are_own(["text"], own, meta) and are_own(["more", "text"], own, meta)
    token_file(home / "other", first=140)
    assert not are_own(["other"], own, meta) and not are_own(["text", "other"], own, meta)


def test_a_layout_that_does_not_fit_is_left_out_with_its_hypernetwork(tmp_path: Path) -> None:
    """64 columns of the hypernetwork cannot be divided by three ranks."""
    folder = tmp_path / "run/checkpoints/step_0000001"
    folder.mkdir(parents=True)
    settings = "mock_data: true\nvocab_size: 300\nhidden_size: 64\nshard_hypernetwork: true\n"
    (tmp_path / "run/config.yaml").write_text(settings)
    assert settings_of(folder, {}, 2, {}).engine.shard_hypernetwork is True
    assert settings_of(folder, {}, 3, {}).engine.shard_hypernetwork is None


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\x80"), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"8", b"9")), "has changed"),
    ],
)
def test_damaged_settings_are_refused(home: Path, damage: Callable[[Path], object], rule: str) -> None:
    """The ``config.yaml`` of the run folder, which may be that of another run, is not read instead."""
    path = home / "run/checkpoints/step_0000005/settings.yaml"
    shutil.copy(path, home / "run/config.yaml")
    damage(path)
    with pytest.raises(CheckpointError, match=rule) as caught:
        TrainedRun.open(home / "run")
    assert str(path.relative_to(home)) in caught.value.message


def test_a_file_that_has_changed_is_reported(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_file(home / "text", first=98)
    TrainedRun.open(home / "run").data()
    assert "has changed since the run read it" in capsys.readouterr().err


def test_another_tokenizer_is_refused(home: Path) -> None:
    train_bpe(iter(["other words altogether"] * 9), 300, str(home / "other.json"))
    with pytest.raises(ConfigError, match="is not the tokenizer of the run"):
        TrainedRun.open(home / "run", tokenizer_model=str(home / "other.json")).tokenizer()
    shutil.copy(home / "tok.json", home / "same.json")
    TrainedRun.open(home / "run", tokenizer_model=str(home / "same.json")).tokenizer()


def test_a_tokenizer_that_the_run_does_not_read_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = RunConfig(data=DataConfig(tokenizer_type="ByteTokenizer"))
    for given, told in (
        (None, ""),
        ("tok.json", "--tokenizer-model is ignored: ByteTokenizer needs no file"),
    ):
        found = with_tokenizer(settings, tmp_path, {"meta": {}}, given)
        assert found == settings
        assert told in capsys.readouterr().err


def test_the_checkpoint_lists_what_it_carries(home: Path) -> None:
    folder = home / "run/checkpoints/step_0000005"
    assert {"settings.yaml", "tokenizer/tok.json"} <= read_manifest(folder)["files"].keys()
