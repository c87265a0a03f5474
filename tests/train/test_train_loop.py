"""The loop: what it records, when it evaluates and saves, and that a resumed run is the run that was never
stopped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from corpora import write_corpus
from fakes import FakeDataset, FakeEngine, FakeStaged
from tiny_run import VOCAB_SIZE, settings, splits
from train.loop_runs import Diary, KillAt, Killed, change, lines, run

from megatron_hyperrouter.checkpoint.folder import find, folder_name, read_meta
from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.stream.dataset import Builder
from megatron_hyperrouter.data.stream.segments import build_training_samples
from megatron_hyperrouter.engines.base import Batch, EvalResult, RankPlace, StepResult
from megatron_hyperrouter.errors import CheckpointError, DataError, HyperRouterError
from megatron_hyperrouter.train.loop import train
from megatron_hyperrouter.train.lr import learning_rate_at
from megatron_hyperrouter.train.metrics import score
from megatron_hyperrouter.train.reporters import hooks_for
from megatron_hyperrouter.train.resuming.start import decide
from megatron_hyperrouter.train.samples import samples_needed


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return settings(tmp_path / "run")


@pytest.fixture
def again(config: RunConfig) -> RunConfig:
    """The same command with --load."""
    return change(config, "checkpoint", load=config.logging.run_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run that was never stopped."""
    config = settings(tmp_path_factory.mktemp("whole") / "run")
    run(config)
    return lines(config)


class TestRecords:
    def test_steps_and_evaluations_stand_in_order(self, whole: list[dict[str, Any]]) -> None:
        written = [(record["step"], record.get("split")) for record in whole]
        evaluated = {4: ["valid"], 8: ["valid"], 12: ["valid", "test"]}
        assert written == [
            (step, split) for step in range(1, 13) for split in [None, *evaluated.get(step, [])]
        ]

    def test_numbers_of_a_step(self, config: RunConfig, whole: list[dict[str, Any]]) -> None:
        for record in (record for record in whole if "split" not in record):
            step = record["step"]
            assert record["consumed_samples"] == 4 * step and record["consumed_tokens"] == 32 * step
            assert record["learning_rate"] == learning_rate_at(step, config.optimizer, 12)
            assert record["topk"] == 1 + (step - 1) // 5  # k of the step: after step - 1 completed ones
        run(config)
        for record in lines(config, timeless=False)[:3]:
            assert record["tokens_per_second"] == pytest.approx(32 / record["step_time"])
            assert 0 < record["data_time"] < record["step_time"]

    def test_only_steps_with_a_line_compute_the_details_of_layers(self, config: RunConfig) -> None:
        asked = []

        class Asked(FakeEngine):
            def train_step(self, batches: Iterator[Batch], *, detailed: bool, **more: Any) -> StepResult:
                asked.append(detailed)
                return super().train_step(batches, detailed=detailed, **more)

        train(Asked(VOCAB_SIZE), change(config, "logging", log_interval=5), splits(), [])
        assert [step for step, detailed in enumerate(asked, 1) if detailed] == [5, 10, 12]

    def test_what_was_consumed_before_batch_and_length_changed(
        self, config: RunConfig, again: RunConfig, tmp_path: Path
    ) -> None:
        words = (write_corpus(tmp_path / "corpus", [700], vocab_size=VOCAB_SIZE),)
        batches, lengths = [4] * 6 + [6] * 3 + [2] * 3, [8] * 6 + [5] * 3 + [10] * 3  # of each step
        for last in (6, 9, 12):
            now = change(
                change(again, "train", global_batch_size=batches[last - 1]),
                "model",
                seq_length=lengths[last - 1],
            )
            data = change(now, "data", data_path=words, split="1,0,0").data
            start = decide(now)
            course = build_training_samples(
                Builder(data, lengths[last - 1], 7, VOCAB_SIZE, IndexCache()),
                ((0, words), (8, words)),  # the schedule cuts a segment, the counts go on
                start.ledger,
                step=start.step,
                train_iters=12,
                sizes=BatchSizes(batches[last - 1]),
            )
            with contextlib.suppress(Killed):
                run(now, KillAt(last + 1), data=SimpleNamespace(train=course, valid=None, test=None))
        told = lines(config)
        samples = list(accumulate(batches))
        tokens = list(accumulate(batch * length for batch, length in zip(batches, lengths, strict=True)))
        assert [(record["consumed_samples"], record["consumed_tokens"]) for record in told] == list(
            zip(samples, tokens, strict=True)
        )

    def test_evaluation_is_that_of_the_weights_at_that_moment(
        self, config: RunConfig, whole: list[dict[str, Any]]
    ) -> None:
        engine = run(config)
        data = splits().test
        tokens_NS = torch.from_numpy(np.stack([data[index] for index in range(8)]))
        logits_NSV = engine.table_VV[tokens_NS[:, :-1]].double() * (1 + 0.1 * 3)  # k = 1 + 12 // 5
        expected = -logits_NSV.log_softmax(-1).gather(-1, tokens_NS[:, 1:, None]).mean().item()
        record = whole[-1]
        assert record["split"] == "test" and record["topk"] == 3
        assert record["lm_loss"] == pytest.approx(expected, rel=1e-6)
        assert record["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
        bytes_a_token = tokens_NS[:, 1:].double().mean().item()  # token id n counts n bytes in this test
        assert record["bits_per_byte"] == pytest.approx(expected / math.log(2) / bytes_a_token, rel=1e-6)

    def test_evaluation_changes_no_step(self, config: RunConfig, whole: list[dict[str, Any]]) -> None:
        silent = change(config, "train", eval_interval=0)
        run(silent, data=SimpleNamespace(train=splits().train, valid=None, test=None))
        assert lines(silent) == [record for record in whole if "split" not in record]

    def test_a_run_without_valid_and_test(self, config: RunConfig) -> None:
        run(config, data=SimpleNamespace(train=splits().train, valid=None, test=None))
        assert len(lines(config)) == 12

    def test_the_model_learns(self, whole: list[dict[str, Any]]) -> None:
        losses = [record["lm_loss"] for record in whole if record.get("split") == "valid"]
        assert losses[0] > losses[1] > losses[2]

    def test_samples_come_in_order_and_in_micro_batches(self, config: RunConfig) -> None:
        asked: list[int] = []

        class Noted(FakeDataset):
            def __getitem__(self, index: int) -> np.ndarray:
                asked.append(index)
                return super().__getitem__(index)

        engine = run(
            change(config, "train", eval_interval=0),
            data=SimpleNamespace(train=Noted(48), valid=None, test=None),
        )
        assert asked == list(range(48))
        assert engine.steps_taken == list(range(12))
        assert engine.micro_batches == [2] * 12


class TestMoments:
    def test_evaluates_then_saves(self, config: RunConfig) -> None:
        diary = Diary()
        run(config, diary)
        assert diary.events == [
            *["start 0", "save 3", "valid 4", "save 6", "valid 8", "save 9"],
            *["valid 12", "test 12", "save 12", "end"],
        ]

    def test_no_interval_saves_at_the_end(self, config: RunConfig) -> None:
        diary = Diary()
        run(change(change(config, "checkpoint", save_interval=0), "train", eval_iters=0), diary)
        assert diary.events == ["start 0", "save 12", "end"]

    def test_keeps_the_newest(self, config: RunConfig) -> None:
        run(change(config, "checkpoint", keep_checkpoints=2))
        names = sorted(path.name for path in (Path(config.logging.run_dir) / "checkpoints").iterdir())
        # "proved" names the newest checkpoint that a healthy step followed
        assert names == ["latest", "proved", "step_0000009", "step_0000012"]

    def test_a_rank_that_asks_to_stop_stops_all_after_a_save(self, config: RunConfig) -> None:
        class AskedElsewhere(FakeEngine):
            answers: tuple[bool, ...] = ()

            def train_step(self, batches: Iterator[Batch], *, step: int, **more: Any) -> StepResult:
                result = super().train_step(batches, step=step, **more)
                self.answers = (False, True) if step == 3 else ()  # no save has failed; stop
                return replace(result, stop=step == 3)

            def any_rank(self, flag: bool) -> bool:
                first, self.answers = self.answers[:1], self.answers[1:]
                return flag or first == (True,)

            def first_word(self, word: str) -> str:
                return word or "SIGTERM"

        diary = Diary()
        assert train(AskedElsewhere(VOCAB_SIZE), config, splits(), [diary]) == 4
        # saved before it takes time to evaluate
        assert diary.events == [
            "start 0",
            "save 3",
            "save 4",
            "valid 4",
            "end",
        ]

    @pytest.mark.parametrize(
        ("at", "events"), [(4, ["start 0", "save 3", "save 4", "end"]), (0, ["start 0", "end"])]
    )
    def test_a_step_that_is_given_up_leaves_no_trace(
        self, config: RunConfig, at: int, events: list[str]
    ) -> None:
        class GivesUp(FakeEngine):
            def _forward_backward(self, stop: Callable[[], int]) -> StepResult:
                return replace(super()._forward_backward(stop), give_up=self.steps_taken[-1] == at)

        engine, diary = GivesUp(VOCAB_SIZE), Diary()
        config = change(config, "train", eval_interval=0)
        assert train(engine, config, splits(), [diary, *hooks_for(config, engine.place)]) == at
        assert diary.events == events
        assert [line["step"] for line in lines(config)] == list(range(1, at + 1))
        again = change(config, "checkpoint", load=config.logging.run_dir)
        assert run(again).steps_taken[0] == at

    def test_hooks_end_when_the_run_breaks(self, config: RunConfig) -> None:
        diary = Diary()
        with pytest.raises(Killed):
            run(config, diary, KillAt(2))
        assert diary.events == ["start 0", "end"]


class TestLostLoss:
    def test_is_recorded_told_and_not_saved(
        self, config: RunConfig, again: RunConfig, whole: list[dict[str, Any]]
    ) -> None:
        class Diverging(FakeEngine):
            def train_step(self, batches: Iterator[Batch], *, step: int, **more: Any) -> StepResult:
                self.loss_offset = math.nan if step == 5 else 0.0
                return super().train_step(batches, step=step, **more)

        with pytest.raises(HyperRouterError, match="step 6: lm_loss is nan") as caught:
            run(config, engine=Diverging(VOCAB_SIZE, topk_at=lambda step: 1 + step // 5))
        assert (
            f"continue from the checkpoint of step 3 with --load {config.logging.run_dir}"
            in caught.value.remedy
        )
        assert lines(config)[-1]["step"] == 6 and lines(config)[-1]["lm_loss"] is None
        assert find(Path(config.logging.run_dir)) == Path(
            config.logging.run_dir
        ) / "checkpoints" / folder_name(3)
        run(again)
        assert lines(config) == whole


class TestResume:
    @pytest.mark.parametrize("step", range(1, 13))
    def test_equals_the_run_that_was_never_stopped(
        self, config: RunConfig, again: RunConfig, whole: list[dict[str, Any]], step: int
    ) -> None:
        with pytest.raises(Killed):
            run(config, KillAt(step))
        (Path(config.logging.run_dir) / "metrics.jsonl").open("a").write('{"step": 1')
        engine = run(again)
        assert engine.steps_taken[0] == (step - 1) // 3 * 3
        assert lines(config) == whole

    def test_of_a_finished_run_does_nothing(
        self,
        config: RunConfig,
        again: RunConfig,
        whole: list[dict[str, Any]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run(config)
        assert run(again).steps_taken == []
        assert lines(config) == whole
        assert "nothing to do" in capsys.readouterr().out

    def test_one_older_checkpoint_by_name(self, config: RunConfig, whole: list[dict[str, Any]]) -> None:
        run(config)
        root = Path(config.logging.run_dir) / "checkpoints"
        back = change(config, "checkpoint", load=str(root / folder_name(6)))
        assert run(back).steps_taken[0] == 6
        assert lines(config) == whole
        assert sorted(path.name for path in root.with_name("checkpoints-earlier-1").iterdir()) == [
            "metrics.jsonl",
            "step_0000009",
            "step_0000012",
        ]

    def test_into_another_run_folder(
        self, config: RunConfig, tmp_path: Path, whole: list[dict[str, Any]]
    ) -> None:
        run(change(config, "train", train_iters=12), KillAt(99))
        other = change(
            change(config, "logging", run_dir=str(tmp_path / "other")),
            "checkpoint",
            load=f"{config.logging.run_dir}/checkpoints/{folder_name(9)}",
        )
        run(other)
        assert lines(other) == [record for record in whole if record["step"] > 9]
        assert lines(config) == whole  # the source is left alone

    def test_finetune_takes_weights_alone(self, config: RunConfig, tmp_path: Path) -> None:
        trained = run(config).table_VV.detach().clone()
        tuned = change(
            change(config, "logging", run_dir=str(tmp_path / "tuned")),
            "checkpoint",
            load=config.logging.run_dir,
            finetune=True,
        )
        seen: list[torch.Tensor] = []

        class Watched(FakeEngine):
            def load(self, folder: Path, *, weights_only: bool = False) -> None:
                super().load(folder, weights_only=weights_only)
                seen.append(self.table_VV.detach().clone())
                assert not self.optimizer.state

        engine = run(tuned, engine=Watched(VOCAB_SIZE, seed=5))
        assert torch.equal(seen[0], trained)
        assert engine.steps_taken == list(range(12))

    def test_a_used_run_folder_without_load_starts_again(
        self, config: RunConfig, whole: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for _ in range(2):
            run(config)
        assert lines(config) == whole
        aside = Path(config.logging.run_dir) / "checkpoints-earlier-1"
        assert find(aside / folder_name(12)) is not None and (aside / "metrics.jsonl").exists()
        assert "checkpoints-earlier-1" in capsys.readouterr().err

    def test_own_run_without_a_checkpoint_starts_from_scratch(
        self,
        config: RunConfig,
        again: RunConfig,
        whole: list[dict[str, Any]],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(Killed):
            run(config, KillAt(2))
        run(again)
        assert lines(config) == whole
        assert "starts from scratch" in capsys.readouterr().out

    def test_anything_else_without_a_checkpoint_is_an_error(self, config: RunConfig, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no finished checkpoint") as caught:
            run(change(config, "checkpoint", load=str(tmp_path / "nowhere")))
        assert caught.value.exit_status == 4 and caught.value.remedy

    def test_other_sizes_are_all_named(self, config: RunConfig, again: RunConfig) -> None:
        run(config)
        with pytest.raises(CheckpointError, match="has different sizes") as caught:
            run(change(again, "model", hidden_size=512, num_experts=4, mlp_type="residual"))
        for words in (
            "--hidden-size was 256 in the checkpoint and is now 512",
            "--mlp-type was standard",
            "--num-experts was 8 in",
            "--kv-channels was 64",
        ):
            assert words in caught.value.message
        run(change(again, "model", num_query_groups=4, moe_ffn_hidden_size=1024))  # the defaults, written out

    def test_a_refused_load_leaves_the_run_as_it_was(self, config: RunConfig, again: RunConfig) -> None:
        engine, files = (
            FakeEngine(VOCAB_SIZE),
            [Path(config.logging.run_dir) / name for name in ("config.yaml", "metrics.jsonl")],
        )
        train(engine, config, splits(), hooks_for(config, engine.place))
        before = [path.read_bytes() for path in files]
        other = change(again, "model", hidden_size=512)
        with pytest.raises(CheckpointError, match="has different sizes"):
            train(engine, other, splits(), hooks_for(other, engine.place))
        assert [path.read_bytes() for path in files] == before
        assert "hidden_size: 256" in files[0].read_text()

    def test_another_layout_is_reported(
        self, config: RunConfig, again: RunConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(config)
        run(change(change(again, "engine", zero_stage=2), "parallel", sequence_parallel=True))
        told = capsys.readouterr().out
        assert "--zero-stage was 1 in the checkpoint and is now 2: the optimizer state is redist" in told
        assert "--sequence-parallel was false in the checkpoint and is now true" in told

    def test_another_layout_needs_finetune_in_format_1(
        self, config: RunConfig, again: RunConfig, tmp_path: Path
    ) -> None:
        class EarlierState(FakeStaged):
            def write(self, folder: Path) -> list[Path]:
                (folder / "state-00000.pt").touch()
                return super().write(folder)

        class Earlier(FakeEngine):
            def stage(self) -> FakeStaged:
                return EarlierState(super().stage().state)

        run(config, engine=Earlier(VOCAB_SIZE))
        other = change(again, "engine", zero_stage=2)
        with pytest.raises(
            CheckpointError, match="--zero-stage was 1 in the checkpoint and is now 2"
        ) as caught:
            run(other)
        assert "--finetune" in caught.value.remedy
        run(change(change(other, "checkpoint", finetune=True), "logging", run_dir=str(tmp_path / "tuned")))

    def test_another_order_of_samples_is_told(
        self, config: RunConfig, again: RunConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Killed):
            run(config, KillAt(4))
        run(change(again, "train", seed=99, global_batch_size=2))
        told = capsys.readouterr().err
        assert (
            "--seed was 1234 in the checkpoint and is now 99" in told and "--global-batch-size was 4" in told
        )

    @pytest.mark.parametrize(
        "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])]
    )
    def test_damage_is_told(
        self, config: RunConfig, again: RunConfig, damage: Callable[[Path], object]
    ) -> None:
        run(config)
        damage(Path(config.logging.run_dir) / "checkpoints" / folder_name(12) / "rank0.pt")
        with pytest.raises(CheckpointError, match=r"rank0\.pt") as caught:
            run(again)
        assert folder_name(9) in caught.value.remedy

    def test_meta_says_what_wrote_it(self, config: RunConfig) -> None:
        run(config)
        meta = read_meta(find(Path(config.logging.run_dir)) or Path())
        assert (
            meta["sizes"]["num_experts"] == 8
            and meta["layout"]["world_size"] == 1
            and meta["order"]["global_batch_size"] == 4
        )


class TestScore:
    def test_counts_every_sample_of_the_split_once(self) -> None:
        engine, data = FakeEngine(VOCAB_SIZE), FakeDataset(11, vocab_size=VOCAB_SIZE)
        found = [score(engine, data, topk=1, micro_batch_size=size) for size in (1, 4, 11, 30)]
        assert [result.tokens for result in found] == [11 * 8] * 4
        assert [result.loss_sum for result in found] == pytest.approx([found[0].loss_sum] * 4, rel=1e-6)
        assert score(engine, data, topk=1, micro_batch_size=4, num_samples=4).tokens == 4 * 8
        assert score(engine, data, topk=1, micro_batch_size=4, num_samples=99).tokens == 11 * 8

    def test_labels_that_are_not_to_be_scored(self) -> None:
        """Of sample 3 the last five labels, of the others none: whatever shares the micro-batch."""
        data = FakeDataset(11, vocab_size=VOCAB_SIZE)
        found = [
            score(
                FakeEngine(VOCAB_SIZE),
                data,
                topk=1,
                micro_batch_size=size,
                unscored=lambda i: 3 if i == 3 else 8,
            )
            for size in (1, 4, 30)
        ]
        assert [result.tokens for result in found] == [5] * 3
        assert [result.loss_sum for result in found] == pytest.approx([found[0].loss_sum] * 3, rel=1e-6)
        everything = score(FakeEngine(VOCAB_SIZE), data, topk=1, micro_batch_size=4, unscored=lambda i: 0)
        assert everything.tokens == 11 * 8

    @pytest.mark.parametrize("data_size", [2, 3, 7])
    def test_ranks_share_the_samples(self, data_size: int) -> None:
        """However many ranks there are, they count each sample once, in as many batches each."""
        data, parts = FakeDataset(11, vocab_size=VOCAB_SIZE), list[EvalResult]()
        for rank in range(data_size):
            engine = FakeEngine(VOCAB_SIZE)
            engine.place = RankPlace(rank, data_size, rank, data_size)
            parts.append(score(engine, data, topk=1, micro_batch_size=2))
            assert engine.batches_scored == -(-11 // (2 * data_size))
        alone = score(FakeEngine(VOCAB_SIZE), data, topk=1, micro_batch_size=1)
        assert sum(part.tokens for part in parts) == alone.tokens
        assert sum(part.loss_sum for part in parts) == pytest.approx(alone.loss_sum, rel=1e-6)

    def test_no_samples(self) -> None:
        with pytest.raises(DataError, match="the split has no samples to evaluate"):
            score(FakeEngine(VOCAB_SIZE), FakeDataset(0), topk=1, micro_batch_size=4)


def test_samples_needed(config: RunConfig) -> None:
    assert samples_needed(config, 1) == {"train_samples": 48, "valid_samples": 8, "test_samples": 8}
    whole_layout = change(config, "train", global_batch_size=None)
    assert samples_needed(whole_layout, world_size=3)["train_samples"] == 12 * 2 * 3
    assert samples_needed(change(config, "train", eval_interval=0), 1) == {
        "train_samples": 48,
        "valid_samples": 0,
        "test_samples": 0,
    }
