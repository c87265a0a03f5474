"""When a run compares its replicas, and what it does about a rank that differs."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import FakeEngine
from tiny_run import VOCAB_SIZE, settings
from train.loop_runs import change, run

from megatron_hyperrouter.checkpoint.folder import find, folder_name
from megatron_hyperrouter.engines.base import Deviation
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.guard.events import read_events
from megatron_hyperrouter.train.hooks import EventsHook

NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("interval", "compared"),
    [(None, []), (5, [3, 5, 6, 9, 10, 12]), (1, list(range(1, 13)))],  # saves are due at 3, 6, 9 and 12
)
def test_every_so_many_steps_and_before_each_save(
    tmp_path: Path, interval: int | None, compared: list[int]
) -> None:
    config = change(settings(tmp_path / "run"), "guard", check_replicas_interval=interval)
    assert run(config).compared == compared


class FlippedAt(FakeEngine):
    """One rank has other bits from a step on."""

    def deviations(self) -> list[Deviation]:
        if len(self.steps_taken) >= 5:
            self.strays = [
                Deviation(NORM, ((1, "node-b"),), ((0, "node-a"), (2, "node-c")), sure=True),
                Deviation("other", ((1, "node-b"),), ((0, "node-a"),), sure=False),
            ]
        return super().deviations()


def test_a_rank_that_differs_is_named_and_nothing_is_saved(tmp_path: Path) -> None:
    config = change(settings(tmp_path / "run"), "guard", check_replicas_interval=2)
    hook = EventsHook(tmp_path / "run" / "events.jsonl")
    with pytest.raises(HyperRouterError) as caught:
        run(config, hook, engine=FlippedAt(VOCAB_SIZE))
    assert caught.value.message == (
        f"step 6: {NORM} (and 1 more) on rank 1 (node-b) differs from that on rank 0 (node-a), "
        "rank 2 (node-c); up to step 4, all replicas agreed"
    )
    assert caught.value.exit_status == 1
    assert find(tmp_path / "run") == tmp_path / "run" / "checkpoints" / folder_name(3)
    (alarm,) = (
        event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "alarm"
    )
    told = {name: alarm[name] for name in ("step", "alarm", "ranks", "hosts", "tensor", "tensors")}
    assert told == {
        "step": 6, "alarm": "replicas", "ranks": [1], "hosts": "node-b", "tensor": NORM, "tensors": 2
    }  # fmt: skip


def test_of_two_copies_either_may_be_wrong(tmp_path: Path) -> None:
    engine = FakeEngine(VOCAB_SIZE)
    engine.strays = [Deviation(NORM, ((1, "a"),), ((0, "a"),), sure=False)]
    config = change(settings(tmp_path / "run"), "guard", check_replicas_interval=1)
    with pytest.raises(HyperRouterError, match="only two replicas: either may be wrong"):
        run(config, engine=engine)
