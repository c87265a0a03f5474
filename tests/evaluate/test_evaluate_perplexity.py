"""Losses at several k, and the tool that writes them, with real token files and a real checkpoint folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fakes import Alone, FakeDataset, FakeEngine
from torch.nn import functional as F

import megatron_hyperrouter.engines
from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.commands.models import evaluate
from megatron_hyperrouter.config.cli import parse, replace_leaves
from megatron_hyperrouter.config.tree import RouterChoice, RunConfig
from megatron_hyperrouter.data.store.token_files import IndexedWriter, smallest_dtype
from megatron_hyperrouter.data.stream.dataset import build_splits
from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
from megatron_hyperrouter.errors import CheckpointError, ConfigError, DataError
from megatron_hyperrouter.evaluate.perplexity import check_topks, loss_by_topk
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.run_meta import run_meta


def test_each_k_by_hand() -> None:
    engine, data = FakeEngine(16, seed=3), FakeDataset(9, vocab_size=16)
    bytes_V = torch.arange(16) % 4
    results = loss_by_topk(engine, data, [1, 4], micro_batch_size=2, token_bytes_V=bytes_V)
    tokens_NS = torch.from_numpy(np.stack([data[index] for index in range(9)]))  # the last batch is not full
    for topk, result in zip((1, 4), results, strict=True):
        assert list(result) == ["topk", "lm_loss", "perplexity", "bits_per_byte", "tokens"]
        losses_NS = F.cross_entropy(
            (engine.table_VV[tokens_NS[:, :-1]] * (1 + 0.1 * topk)).transpose(1, 2),
            tokens_NS[:, 1:],
            reduction="none",
        )
        expected = losses_NS.double().mean().item()
        assert result["topk"] == topk and result["tokens"] == 72
        assert result["lm_loss"] == pytest.approx(expected, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
        total_bytes = sum(int(bytes_V[token]) for token in tokens_NS[:, 1:].flatten())
        assert result["bits_per_byte"] == pytest.approx(expected * 72 / math.log(2) / total_bytes, rel=1e-6)
    assert loss_by_topk(engine, data, [1], micro_batch_size=2)[0]["bits_per_byte"] is None


def test_every_k_out_of_range_is_named() -> None:
    check_topks([1, 8], 8)
    with pytest.raises(ConfigError) as caught:
        check_topks([0, 2, 9], 8)
    assert [problem.value for problem in caught.value.problems] == [0, 9] and caught.value.exit_status == 2
    grouped = RouterChoice(name="topk", options=ROUTERS["topk"].Config(num_groups=4, group_topk=2))
    check_topks([1, 4], 8, router=grouped)
    with pytest.raises(
        ConfigError,
        match=r"from 1 to 4, the number of experts in the groups that --router\.group-topk allows",
    ):
        check_topks([8], 8, router=grouped)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``mhr evaluate``, on a model of bytes."""

    def open_engine(
        config: RunConfig, *, vocab_size: int, eod: int | None, for_training: bool, classifier: object
    ) -> FakeEngine:
        assert not for_training and classifier is None and config.parallel.expert_model_parallel_size == 1
        return FakeEngine(vocab_size, seed=99)

    monkeypatch.setattr(megatron_hyperrouter.engines, "open_engine", open_engine)
    return evaluate


def token_file(prefix: Path, *, documents: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), smallest_dtype(257)) as writer:
        for _ in range(documents):
            writer.add_document(
                random.integers(97, 123, size=random.integers(20, 60)).astype(smallest_dtype(257))
            )
    return str(prefix)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run on two ranks with expert parallelism 2: data and one checkpoint."""
    return finished_run(tmp_path, micro_batch_size=4)


def finished_run(folder: Path, *, micro_batch_size: int) -> Path:
    data = token_file(folder / "data", documents=60, seed=1)
    run = folder / "run"
    flags = (
        f"--data-path {data} --split 50,25,25 --seq-length 8 --micro-batch-size {micro_batch_size} "
        f"--global-batch-size {2 * micro_batch_size} --run-dir {run}"
    )
    config = parse(
        f"{flags} --expert-model-parallel-size 2 --num-experts 8".split(), routers=ROUTERS, world_size=2
    )
    engine = FakeEngine(build_tokenizer("ByteTokenizer").vocab_size, seed=7)
    described = describe(config)
    meta = run_meta(config, replace_place(engine, world_size=2)) | described.meta
    CheckpointFolders(run / "checkpoints", Alone()).save(30, engine.save, meta, texts=described.texts)
    # What somebody else has started in that folder since then; nothing may read it.
    (run / "config.yaml").write_text("num_layers: 99\n")
    return run


def replace_place(engine: FakeEngine, *, world_size: int) -> FakeEngine:
    engine.place = replace(engine.place, world_size=world_size, data_size=world_size)
    return engine


def score_by_hand(run_dir: Path, split: str, *, topk: int, data_path: str | None = None) -> tuple[float, int]:
    """(loss, tokens) of every sample of a split, through the data and the weights themselves."""
    tokenizer = build_tokenizer("ByteTokenizer")
    table_VV = torch.load(run_dir / "checkpoints/step_0000030/rank0.pt", weights_only=True)["table"]
    config = parse(["--config", str(run_dir / "checkpoints/step_0000030/settings.yaml")], routers=ROUTERS)
    if data_path is not None:
        config = replace_leaves(config, data_path=(data_path,))
    wanted: dict[str, Any] = {
        "train_samples": 0,
        "valid_samples": 0,
        "test_samples": 0,
        f"{split}_samples": None,
    }
    splits = build_splits(
        config.data, seq_length=8, seed=config.train.seed, vocab_size=tokenizer.vocab_size, **wanted
    )
    dataset = getattr(splits, split)
    count = len(dataset)
    tokens_NS = torch.from_numpy(np.stack([dataset[index] for index in range(count)]))
    logits_NSV = table_VV[tokens_NS[:, :-1]].double() * (1 + 0.1 * topk)
    return F.cross_entropy(logits_NSV.transpose(1, 2), tokens_NS[:, 1:]).item(), count * 8


class TestTool:
    def results(self, tool: ModuleType, run_dir: Path, *flags: str) -> list[dict[str, Any]]:
        output = run_dir.parent / "deep" / "er" / "scores.json"
        tool.main(["--load", str(run_dir), "--output", str(output), *flags])
        assert [path.name for path in output.parent.iterdir()] == ["scores.json"]
        content = json.loads(output.read_text())
        assert content["step"] == 30
        results: list[dict[str, Any]] = content["results"]
        return results

    def test_scores_the_whole_test_split_at_each_k(
        self, tool: ModuleType, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        results = self.results(tool, run_dir, "--topk", "1", "2", "8")
        assert [result["topk"] for result in results] == [1, 2, 8]
        for result in results:
            loss, tokens = score_by_hand(run_dir, "test", topk=result["topk"])
            assert result["tokens"] == tokens > 100
            assert result["lm_loss"] == pytest.approx(loss, rel=1e-6)
            assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
            # every target is one byte
            assert result["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)
        assert len(capsys.readouterr().out.splitlines()) == 4

    def test_another_split(self, tool: ModuleType, run_dir: Path) -> None:
        result = self.results(tool, run_dir, "--topk", "2", "--split", "train")[0]
        assert (result["lm_loss"], result["tokens"]) == pytest.approx(score_by_hand(run_dir, "train", topk=2))

    def test_as_many_batches_as_in_training(self, tool: ModuleType, run_dir: Path) -> None:
        assert self.results(tool, run_dir, "--topk", "2", "--eval-iters", "3")[0]["tokens"] == 3 * 8 * 8

    def test_more_batches_than_the_split_has_score_each_sample_once(
        self, tool: ModuleType, run_dir: Path, capsys: Any
    ) -> None:
        _, tokens = score_by_hand(run_dir, "test", topk=2)
        flags = ("--topk", "2", "--eval-iters", str(tokens))
        found = self.results(tool, run_dir, *flags)[0]
        assert (
            f"selects {8 * tokens:,} samples, but there are only {tokens // 8:,}" in capsys.readouterr().out
        )
        assert found == self.results(tool, run_dir, "--topk", "2")[0] and found["tokens"] == tokens
        (strided,) = self.results(tool, run_dir, *flags, "--eval-stride", "4")
        assert strided == self.results(tool, run_dir, "--topk", "2", "--eval-stride", "4")[0]

    def test_other_data_whole_or_in_part(self, tool: ModuleType, run_dir: Path, tmp_path: Path) -> None:
        other = token_file(tmp_path / "other", documents=30, seed=2)
        whole, part = (
            self.results(tool, run_dir, "--topk", "2", "--data-path", other, *more)[0]
            for more in ((), ("--split", "valid"))
        )
        assert part["tokens"] < whole["tokens"] / 3
        assert (part["lm_loss"], part["tokens"]) == pytest.approx(
            score_by_hand(run_dir, "valid", topk=2, data_path=other)
        )
        tokens = sum(np.fromfile(f"{other}.bin", np.uint16).shape)
        assert tokens - 8 * 5 < whole["tokens"] < tokens

    def test_a_blend_is_scored_whole(self, tool: ModuleType, run_dir: Path, tmp_path: Path) -> None:
        other = token_file(tmp_path / "other", documents=30, seed=2)
        alone = [
            self.results(tool, run_dir, "--topk", "2", "--data-path", path)[0]["tokens"]
            for path in (other, str(tmp_path / "data"))
        ]
        blend = self.results(
            tool, run_dir, "--topk", "2", "--data-path", "0.9", other, "0.1", str(tmp_path / "data")
        )[0]
        assert abs(blend["tokens"] - sum(alone)) <= 2 * 4 * 8

    def test_a_split_smaller_than_a_micro_batch(self, tool: ModuleType, tmp_path: Path) -> None:
        run_dir = finished_run(tmp_path, micro_batch_size=400)
        tiny = token_file(tmp_path / "tiny", documents=1, seed=3)
        tokens = np.fromfile(f"{tiny}.bin", np.uint16).size
        result = self.results(tool, run_dir, "--topk", "2", "--data-path", tiny)[0]
        assert result["tokens"] == (tokens - 1) // 8 * 8

    def test_the_same_tokens_whatever_the_micro_batch(self, tool: ModuleType, tmp_path: Path) -> None:
        runs = [finished_run(tmp_path / str(size), micro_batch_size=size) for size in (1, 3, 5)]
        found = [self.results(tool, run, "--topk", "2")[0] for run in runs]
        assert len({result["tokens"] for result in found}) == 1
        assert [result["lm_loss"] for result in found] == pytest.approx([found[0]["lm_loss"]] * 3, rel=1e-6)

    @pytest.mark.parametrize(
        ("flags", "error", "words"),
        [
            (["--topk", "2", "9"], ConfigError, "--topk = 9"),
            (["--topk", "0"], ConfigError, "--topk = 0"),
            (["--topk", "2", "--data-path", "/nowhere/data"], DataError, "/nowhere/data"),
        ],
    )
    def test_bad_input(
        self, tool: ModuleType, run_dir: Path, flags: list[str], error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            self.results(tool, run_dir, *flags)

    @pytest.mark.parametrize(
        "flags",
        [["--topk", "x"], ["--topk", "2", "--eval-iters", "0"], ["--topk", "2", "--split", "most"], []],
    )
    def test_bad_flags(self, tool: ModuleType, run_dir: Path, flags: list[str]) -> None:
        with pytest.raises(ConfigError):
            self.results(tool, run_dir, *flags)

    def test_no_checkpoint(self, tool: ModuleType, run_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no finished checkpoint"):
            self.results(tool, tmp_path, "--topk", "2")

    def test_a_damaged_checkpoint(self, tool: ModuleType, run_dir: Path) -> None:
        (run_dir / "checkpoints/step_0000030/rank0.pt").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"rank0\.pt has 0 bytes"):
            self.results(tool, run_dir, "--topk", "2")

    def test_a_checkpoint_of_an_older_version(
        self, tool: ModuleType, run_dir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It has no settings of its own: the run folder's are used, with a warning."""
        folder = run_dir / "checkpoints/step_0000030"
        expected = self.results(tool, run_dir, "--topk", "2")
        (folder / "settings.yaml").replace(run_dir / "config.yaml")
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["settings.yaml"], manifest["sha256"]
        (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
        assert self.results(tool, run_dir, "--topk", "2") == expected
        assert "older version" in capsys.readouterr().err
        (run_dir / "config.yaml").unlink()
        with pytest.raises(CheckpointError, match=r"config\.yaml is missing"):
            self.results(tool, run_dir, "--topk", "2")

    def test_layout_under_a_launcher(self, run_dir: Path) -> None:
        for world_size, expected in ((2, 2), (3, 1), (1, 1)):
            run = TrainedRun.open(run_dir, world_size=world_size)
            assert run.settings.parallel.expert_model_parallel_size == expected
