"""A checkpoint with ruined weights neither replaces the last good one nor is named as the one
to return to.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import FakeEngine
from tiny_run import VOCAB_SIZE, settings
from train.loop_runs import change, run

from megatron_hyperrouter.checkpoint.folder import find, folder_name
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import StepResult
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.train.health import CheckpointHealth


class RuinedBy(FakeEngine):
    """The update of one step ruins the weights; the losses after it show it."""

    def __init__(self, step: int, loss: float = float("nan")) -> None:
        super().__init__(VOCAB_SIZE)
        self.ruinous, self.after = step, loss

    def train_step(self, *arguments: object, **settings: object) -> StepResult:
        self.loss_offset = self.after if len(self.steps_taken) >= self.ruinous else 0.0
        return super().train_step(*arguments, **settings)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    every_step = change(settings(tmp_path / "run"), "checkpoint", save_interval=1, keep_checkpoints=1)
    return change(every_step, "train", eval_interval=0)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_remedy_leads_out(config: RunConfig, asynchronous: bool) -> None:
    config = change(config, "checkpoint", async_save=asynchronous)
    with pytest.raises(HyperRouterError, match="step 6: lm_loss is nan") as caught:
        run(config, engine=RuinedBy(5))
    assert "continue from the checkpoint of step 4 with --load" in caught.value.remedy
    assert "step 5 may have bad weights" in caught.value.remedy
    root = Path(config.logging.run_dir) / "checkpoints"
    assert find(root) == root / folder_name(4)
    engine = run(change(config, "checkpoint", load=config.logging.run_dir))
    assert engine.steps_taken == list(range(4, 12))
    assert find(root.with_name("checkpoints-earlier-1") / folder_name(5)) is not None


def test_a_run_that_fails_again_and_again_fills_no_disk(config: RunConfig) -> None:
    """A scheduler may start it a hundred times; each time it loses its loss right after the same save."""
    config = change(config, "checkpoint", async_save=False)
    with pytest.raises(HyperRouterError, match="step 6: lm_loss is nan"):
        run(config, engine=RuinedBy(5))
    root = Path(config.logging.run_dir) / "checkpoints"
    again = change(config, "checkpoint", load=config.logging.run_dir)
    for _ in range(3):
        with pytest.raises(HyperRouterError, match="step 6: lm_loss is nan"):
            run(again, engine=RuinedBy(1))  # the first step after the proved checkpoint of step 4
        assert [path.name for path in root.parent.glob("checkpoints-earlier-*")] == ["checkpoints-earlier-1"]
    assert find(root.with_name("checkpoints-earlier-1") / folder_name(5)) is not None


def test_a_loss_that_is_lost_without_being_nan_proves_nothing(config: RunConfig) -> None:
    run(config, engine=RuinedBy(5, loss=1e5))
    root = Path(config.logging.run_dir) / "checkpoints"
    assert sorted(path.name for path in root.glob("step_*")) == [folder_name(4), folder_name(12)]


class Noted:
    """Stands for the folders of a run."""

    def __init__(self) -> None:
        self.proved: list[int] = []

    def prove(self, step: int) -> None:
        self.proved.append(step)


def test_a_checkpoint_that_is_published_late_is_proved_late() -> None:
    folders = Noted()
    health = CheckpointHealth(folders, step=3)  # type: ignore[arg-type]
    health.after_step(4, 5.0)
    assert folders.proved == [3]
    health.after_step(5, 5.1)  # the checkpoint of step 4 is still being written
    health.after_save(4)
    assert folders.proved == [3, 4]
    health.after_save(6)
    health.after_step(6, 5.0)
    assert folders.proved == [3, 4]
    health.after_step(7, 4.9)
    assert folders.proved == [3, 4, 6]
