"""A run that continues elsewhere takes the file that it has read, and no other file of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import write_corpus
from tiny_run import settings
from train.loop_runs import change

from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.stream.file_identity import identity
from megatron_hyperrouter.train.resuming.found_data import with_found_data
from megatron_hyperrouter.train.resuming.start import Start


@pytest.mark.parametrize("left_behind", [None, [30, 7]])
def test_the_file_that_moved_with_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    left_behind: list[int] | None,
) -> None:
    """Also where another file has taken its old place."""
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    moved = write_corpus(tmp_path / "new/text", [20, 30, 40])
    if left_behind:
        write_corpus(tmp_path / "old/text", left_behind)
    meta = {
        "files": {"text": identity(IndexedDataset(moved))},
        "origin": {"folder": str(tmp_path / "old"), "run_dir": str(tmp_path / "old/run")},
    }
    start = Start(tmp_path / "new/run/checkpoints/step_0000002", {"step": 2, "meta": meta})
    config = change(settings(tmp_path / "new/run"), "data", data_path=("text",), train_data_path=())
    assert with_found_data(config, start).data.data_path == (moved,)
    assert f"text does not exist; using {moved}" in capsys.readouterr().out.replace("\n", " ")
    mixes = "[{from_step: 0, data_path: [2, text]}, {from_step: 3, data_path: [tezt]}]"
    scheduled = change(config, "data", data_path=(), data_schedule=mixes)
    found = json.loads(str(with_found_data(scheduled, start).data.data_schedule))
    assert [each["data_path"] for each in found] == [["2", moved], ["tezt"]]
    assert f"text does not exist; using {moved}" in capsys.readouterr().out.replace("\n", " ")
    # and again, after the run has continued from a third folder
    again = {"files": {moved: meta["files"]["text"]}, "origin": {**meta["origin"], "folder": str(tmp_path)}}
    second = Start(start.folder, {"step": 4, "meta": again})
    assert with_found_data(config, second).data.data_path == (moved,)
    assert capsys.readouterr().out
    other = change(config, "data", data_path=("tezt",))
    assert with_found_data(other, start) is other and not capsys.readouterr().out
