"""Averages of checkpoints, beside NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import write_corpus
from fakes import Alone

from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, find
from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names, write_weights
from megatron_hyperrouter.commands.models.average import main
from megatron_hyperrouter.errors import CheckpointError, ConfigError
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.importing.settings import run_of

STEPS = (10, 20, 30)


def tensors(step: int, *, seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "matrix": torch.randn(4, 3, generator=generator),
        "rounded": torch.randn(5, generator=generator).bfloat16(),
        "frozen_hash": torch.full((32,), seed, dtype=torch.uint8),
    }


def make_run(home: Path, settings: dict[str, Any] | None = None, **seeds: int) -> Path:
    run = run_of({"run_dir": str(home), "num_layers": 1, **(settings or {})})
    described = describe(run)
    folders = CheckpointFolders(home / "checkpoints", Alone())
    meta: dict[str, Any] = {"order": {"global_batch_size": 4}, **described.meta}
    for step in STEPS:
        own = tensors(step, seed=seeds.get(f"step{step}", 7))
        folders.save(step, lambda folder, own=own: write_weights(folder, 0, own), meta, texts=described.texts)
    return home


CASES: dict[str, tuple[list[str], dict[int, float]]] = {
    "last two": (["--last", "2"], {20: 0.5, 30: 0.5}),
    "named, with weights": (["--steps", "30", "10", "--weights", "1", "3"], {10: 0.25, 30: 0.75}),
    "moving average": (["--last", "3", "--ema", "0.5"], {10: 1 / 7, 20: 2 / 7, 30: 4 / 7}),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_averaged(tmp_path: Path, name: str) -> None:
    words, weights = CASES[name]
    run = make_run(tmp_path / "run")
    main(["--load", str(run), "--output", str(tmp_path / "out"), *words])
    folder = find(tmp_path / "out")
    assert folder is not None and folder.name == "step_0000030"
    found = read_tensors(folder, weight_names(folder))
    for key, tensor in found.items():
        parts = [share * tensors(step)[key].double().numpy() for step, share in weights.items()]
        expected = torch.from_numpy(np.sum(parts, axis=0)).to(tensor.dtype)
        assert tensor.dtype == tensors(30)[key].dtype
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
    certificate = json.loads((tmp_path / "out" / "average_certificate.json").read_text())
    told = {each["step"]: each["weight"] for each in certificate["source"]}
    assert told == pytest.approx(weights)


def test_what_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", step20=9)  # another frozen part
    out = ["--output", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="frozen_hash, which cannot be averaged"):
        main(["--load", str(run), *out, "--last", "2"])
    with pytest.raises(CheckpointError, match="no checkpoint for step 11"):
        main(["--load", str(run), *out, "--steps", "10", "11"])
    with pytest.raises(
        ConfigError, match=r"must be at most 3, the number of checkpoints in .*\n.*use --last 3 or less"
    ):
        main(["--load", str(run), *out, "--last", "4"])
    with pytest.raises(ConfigError, match="one weight for each of the 2"):
        main(["--load", str(run), *out, "--steps", "10", "30", "--weights", "1"])
    with pytest.raises(ConfigError, match="finite sum greater than 0"):  # else each share would be 0
        main(["--load", str(run), *out, "--steps", "10", "30", "--weights", "1e308", "1e308"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("moved", [False, True])
def test_data_with_relative_paths_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_corpus(Path("corpus"), [30] * 10)
    make_run(Path("run"), {"data_path": ("corpus",)})
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "here"
    if moved:
        home = home.rename(tmp_path / "there")
    main(["--load", str(home / "run"), "--output", "out", "--last", "2"])
    run = TrainedRun.open("out", world_size=1)
    assert run.data().data_path == (str(home / "corpus"),)
