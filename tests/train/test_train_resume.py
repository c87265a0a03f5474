"""Where a run starts, what a resumed run refuses and reports, and which metrics it keeps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import settings
from train.loop_runs import KillAt, Killed, change, lines, run

from megatron_hyperrouter.checkpoint.description import SETTINGS
from megatron_hyperrouter.checkpoint.folder import find, folder_name, read_meta
from megatron_hyperrouter.checkpoint.manifest import fingerprint
from megatron_hyperrouter.config.cli import load_file, parse
from megatron_hyperrouter.config.run_folder import write_settings
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError, ConfigError
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.lr import learning_rate_at
from megatron_hyperrouter.train.resuming import start
from megatron_hyperrouter.train.resuming.changes import changes_of_course, changes_of_function
from megatron_hyperrouter.train.resuming.saved_settings import saved_settings
from megatron_hyperrouter.train.resuming.start import decide, settings_again


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return settings(tmp_path / "run")


@pytest.fixture
def again(config: RunConfig) -> RunConfig:
    return change(config, "checkpoint", load=config.logging.run_dir)


@pytest.mark.parametrize(
    ("count", "age", "first"), [("1", 100.0, 6), ("0", 100.0, 0), ("", 100.0, 0), ("1", 1000.0, 0)]
)
def test_a_run_that_torchrun_restarts_continues_without_load(
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: str,
    age: float,
    first: int,
) -> None:
    """``torchrun --max-restarts``: it repeats a command that has no ``--load``. A run that began before
    torchrun is another run.
    """
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(Killed):  # before its first checkpoint, it starts
        run(config, KillAt(8))
    began = {"event": "start", "time": time.time() - age, "step": 0, "attempt": 1}
    Path(config.logging.run_dir, "events.jsonl").write_text(json.dumps(began) + "\n")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setattr(start, "start_of_torchrun", lambda: time.time() - 500)
    capsys.readouterr()
    assert run(config).steps_taken[0] == first
    assert ("this is a restart, so the run continues" in capsys.readouterr().out) == bool(first)


@pytest.mark.parametrize(
    ("job", "count", "restarted"), [("7", "2", True), ("7", "1", False), ("7", "0", False), ("8", "2", False)]
)
def test_a_job_that_slurm_requeues_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, count: str, restarted: bool
) -> None:
    """Attempt 1 of job 7 has begun: attempt 2 continues it, and not another command of the same attempt."""
    began = {"event": "start", "time": 1.0, "step": 0, "attempt": 1}
    began |= {"job": "SLURM_JOB_ID=7 JOB_NAME=x", "launcher_restarts": "SLURM_RESTART_COUNT=1"}
    (tmp_path / "events.jsonl").write_text(json.dumps(began) + "\n")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    assert start.is_restarted(str(tmp_path)) == restarted


def test_it_continues_with_the_load_of_another_run(
    config: RunConfig, again: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated command must not go back to the checkpoint that the run began with."""
    with pytest.raises(Killed):
        run(config, KillAt(8))
    other = change(config, "logging", run_dir=str(tmp_path / "other"))
    run(other)
    monkeypatch.setattr(start, "is_restarted", lambda _: True)
    config = change(config, "checkpoint", load=other.logging.run_dir)
    folder = decide(config, restarted=True).folder
    assert folder is not None and folder.parent.parent == Path(config.logging.run_dir)
    assert decide(again).folder == folder and decide(config).folder != folder


class TestFinetune:
    """A run from another one's weights is a run like any other: its own command continues it."""

    @pytest.fixture
    def tuned(self, config: RunConfig, tmp_path: Path) -> RunConfig:
        run(config)
        other = change(config, "logging", run_dir=str(tmp_path / "tuned"))
        return change(other, "checkpoint", load=config.logging.run_dir, finetune=True)

    def test_the_same_command_continues_it(self, tuned: RunConfig, tmp_path: Path) -> None:
        whole = change(tuned, "logging", run_dir=str(tmp_path / "whole"))
        run(whole)
        with pytest.raises(Killed):
            run(tuned, KillAt(8))
        engine = run(tuned)
        assert engine.steps_taken[0] == 6
        assert lines(tuned) == lines(whole)
        assert not (tmp_path / "tuned/checkpoints-earlier-1").exists()

    def test_it_needs_a_folder_of_its_own(self, tuned: RunConfig, config: RunConfig) -> None:
        """The weights would be moved away, and a run that is killed early could not begin again."""
        folder = find(Path(config.logging.run_dir))
        for load in (config.logging.run_dir, str(folder)):
            inside = change(config, "checkpoint", load=load, finetune=True)
            with pytest.raises(
                ConfigError, match=r"--run-dir = .*: contains the weights from which --finetune"
            ):
                decide(inside)

    def test_it_never_begins_without_weights(self, tuned: RunConfig) -> None:
        empty = change(tuned, "checkpoint", load=tuned.logging.run_dir)
        with pytest.raises(CheckpointError, match="no weights from which --finetune could start"):
            decide(empty)

    @pytest.mark.parametrize("finetune", [True, False])
    def test_so_does_load_of_its_own_folder(self, tuned: RunConfig, finetune: bool) -> None:
        with pytest.raises(Killed):
            run(tuned, KillAt(8))
        own = change(tuned, "checkpoint", load=tuned.logging.run_dir, finetune=finetune)
        assert run(own).steps_taken[0] == 6
        folder = find(Path(tuned.logging.run_dir))
        assert folder is not None and read_meta(folder)["finetuned_from"] == tuned.checkpoint.load

    def test_its_config_starts_it_again(self, tuned: RunConfig, tmp_path: Path) -> None:
        with pytest.raises(Killed):
            run(tuned, KillAt(8))
        for finetune in (True, False):
            own = change(tuned, "checkpoint", load=tuned.logging.run_dir, finetune=finetune)
            known = settings_again(own, decide(own)).checkpoint
            assert (known.load, known.finetune) == (tuned.checkpoint.load, True)
        anew = change(tuned, "logging", run_dir=str(tmp_path / "anew"))
        run(anew)
        assert lines(anew)[:7] == lines(tuned)[:7]

    def test_weights_of_another_run_start_a_new_one(self, tuned: RunConfig, tmp_path: Path) -> None:
        other = change(change(tuned, "logging", run_dir=str(tmp_path / "other")), "checkpoint", load=None)
        run(change(other, "checkpoint", finetune=False))
        run(tuned)
        from_other = change(tuned, "checkpoint", load=str(tmp_path / "other"))
        assert run(from_other).steps_taken[0] == 0
        assert find(tmp_path / "tuned/checkpoints-earlier-1" / folder_name(12)) is not None


def saved(*flags: str) -> str:
    """The settings of a run as its checkpoints have them."""
    config = parse(["--data-path", "text", *flags], routers=ROUTERS)
    return write_settings(config).read_text()


def now(*flags: str) -> RunConfig:
    return parse(["--data-path", "text", *flags], routers=ROUTERS)


class TestChanges:
    @pytest.fixture(autouse=True)
    def _somewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--rotary-base 500000", "--rotary-base was 10000.0 and is now 500000"),
            ("--norm-epsilon 0.1", "--norm-epsilon was 1e-05 and is now 0.1"),
            ("--moe-expert-capacity-factor 0.5", "--moe-expert-capacity-factor was none and is now 0.5"),
            ("--router.pre-softmax", "--router.pre-softmax was false and is now true"),
            ("--tokenizer-type NullTokenizer --vocab-size 9", "--tokenizer-type was ByteTokenizer"),
        ],
    )
    def test_of_what_the_weights_compute(self, flags: str, words: str) -> None:
        then = saved("--router.name", "topk")
        lines = changes_of_function(then, now("--router.name", "topk", *flags.split()))
        assert any(line.startswith(words) for line in lines), lines
        assert not changes_of_function(then, now("--router.name", "topk"))

    @pytest.mark.parametrize(
        "flags",
        [
            "--lr 0.01",
            "--min-lr 1e-5",
            "--lr-decay-style constant",
            "--lr-warmup-iters 5",
            "--weight-decay 0.9",
            "--adam-beta2 0.5",
            "--train-iters 400",
            "--clip-grad 0.5",
            "--moe-aux-loss-coeff 0.1",
            "--hidden-dropout 0.1",
        ],
    )
    def test_of_the_course(self, flags: str) -> None:
        lines = changes_of_course(saved(), now(*flags.split()), step=20)
        assert any(line.startswith(f"{flags.split()[0]} was ") for line in lines), lines
        assert not changes_of_function(saved(), now(*flags.split()))

    @pytest.mark.parametrize(
        "flags",
        [
            "--run-dir elsewhere --num-workers 0 --save-interval 9 --eval-interval 0 --log-interval 3",
            "--load elsewhere --micro-batch-size 2 --data-cache-path elsewhere",
        ],
    )
    def test_of_nothing_that_matters(self, flags: str) -> None:
        config = now(*flags.split())
        assert not changes_of_function(saved(), config) and not changes_of_course(saved(), config, step=20)

    def test_the_jump_of_the_rate(self) -> None:
        config = now("--train-iters", "200", "--lr", "0.01")
        before = now("--train-iters", "100")
        line = changes_of_course(saved("--train-iters", "100"), config, step=60)[-1]
        rates = [learning_rate_at(61, each.optimizer, each.train.train_iters) for each in (config, before)]
        assert line == f"the learning rate of step 61 is {rates[0]:.4g}, not {rates[1]:.4g} as planned before"

    def test_settings_that_an_older_version_did_not_know(self) -> None:
        then = "\n".join(line for line in saved().splitlines() if not line.startswith(("rotary_base", "lr:")))
        assert not changes_of_function(then, now()) and not changes_of_course(then, now(), step=3)
        assert changes_of_function(then, now("--rotary-base", "7"))

    def test_an_option_left_open_is_what_it_stands_for(self) -> None:
        """Earlier versions wrote ``layer`` where it is left open now."""
        hyper = ("--router.name", "hyper")
        then = saved(*hyper, "--router.shared", "layer")
        assert not changes_of_function(then, now(*hyper))
        assert not changes_of_function(saved(*hyper), now(*hyper, "--router.shared", "layer"))
        (line,) = changes_of_function(then, now(*hyper, "--router.shared", "model"))
        assert line == "--router.shared was layer and is now model"
        large = (*hyper, "--num-experts", "64", "--hidden-size", "8192")
        (line,) = changes_of_function(saved(*large, "--router.shared", "layer"), now(*large))
        assert line == "--router.shared was layer and is now model"

    @pytest.mark.parametrize(
        ("content", "sealed", "rule"),
        [
            (b"lr: \x80\n", False, "has 6 bytes instead of"),
            (b"lr: \x80\n", True, "is not UTF-8 text"),
            (b"lr: [1\n", True, "is not valid YAML in line 2"),
            (b"!!python/object/apply:os.getpid []\n", True, "unsupported tag"),
        ],
    )
    def test_settings_that_cannot_be_read(
        self, tmp_path: Path, content: bytes, sealed: bool, rule: str
    ) -> None:
        """They are needed before all files are compared with the manifest."""
        path = tmp_path / SETTINGS
        path.write_bytes(content if sealed else content * 7)
        files = {SETTINGS: fingerprint(path)}
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rule) as caught:
            saved_settings(tmp_path, files)
        assert str(path) in caught.value.message and caught.value.exit_status == 4

    def test_settings_whose_router_is_no_mapping(self) -> None:
        (line,) = changes_of_function("rotary_base: 7.0\nrouter: [hyper]\n", now())
        assert line == "--rotary-base was 7.0 and is now 10000.0"

    def test_a_checkpoint_without_settings(self) -> None:
        assert not changes_of_function("", now("--rotary-base", "7"))


class TestResume:
    def test_refuses_what_changes_the_weights_unless_overridden(
        self, config: RunConfig, again: RunConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Killed):
            run(config, KillAt(8))
        other = change(again, "model", rotary_base=500000)
        with pytest.raises(CheckpointError, match=r"--rotary-base was 10000\.0 and is now 500000") as caught:
            run(other)
        assert caught.value.exit_status == 4 and "--override" in caught.value.remedy
        assert run(change(other, "checkpoint", override=True)).steps_taken[0] == 6
        assert "--override accepted these changes to the model" in capsys.readouterr().err

    def test_reports_what_changes_the_course_in_one_note(
        self, config: RunConfig, again: RunConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Killed):
            run(config, KillAt(8))
        run(change(again, "optimizer", lr=0.02, weight_decay=0.5))
        told = capsys.readouterr().out
        assert told.count("from step 7 on, these settings change training") == 1
        assert "--lr was 0.05 and is now 0.02" in told and "--weight-decay was 0.01 and is now 0.5" in told

    def test_config_yaml_keeps_no_override(self, again: RunConfig, tmp_path: Path) -> None:
        config = now("--run-dir", str(tmp_path / "x"), "--load", str(tmp_path / "x"), "--override")
        path = write_settings(settings_again(config, decide(config)))
        known = load_file(path, routers=ROUTERS)
        assert (known.checkpoint.load, known.checkpoint.override) == (None, False)


def test_refuses_another_growth_of_the_batch(config: RunConfig, again: RunConfig) -> None:
    """Its size and its learning rate follow from all steps before."""
    run(change(config, "train", rampup_batch_size=(2, 2, 8)))
    for changed in ({}, {"rampup_batch_size": (2, 1, 8)}):
        with pytest.raises(CheckpointError, match=r"--rampup-batch-size was \[2, 2, 8\] in the checkpoint"):
            run(change(again, "train", **changed))
    with pytest.raises(CheckpointError, match="--global-batch-size was 4 in the checkpoint and is now 6"):
        run(change(again, "train", rampup_batch_size=(2, 2, 8), global_batch_size=6))


class TestMetrics:
    """Lines that are taken out of ``metrics.jsonl`` are kept beside it."""

    def earlier(self, config: RunConfig) -> list[dict[str, Any]]:
        path = Path(config.logging.run_dir) / "metrics-earlier.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_of_a_killed_run(self, config: RunConfig, again: RunConfig) -> None:
        with pytest.raises(Killed):
            run(config, KillAt(8))
        run(again)
        assert [record["step"] for record in self.earlier(config)] == [7, 8]

    def test_of_a_run_without_checkpoints_that_is_started_again(self, config: RunConfig) -> None:
        with pytest.raises(Killed):
            run(change(config, "checkpoint", save_interval=0), KillAt(11))
        before = lines(config)
        run(config)
        assert [record["step"] for record in self.earlier(config)] == [record["step"] for record in before]
        with pytest.raises(Killed):
            run(config, KillAt(2))
        assert len(self.earlier(config)) > len(before)

    def test_none_are_taken_from_a_run_that_went_well(self, config: RunConfig, again: RunConfig) -> None:
        run(config)
        run(again)
        assert not (Path(config.logging.run_dir) / "metrics-earlier.jsonl").exists()
