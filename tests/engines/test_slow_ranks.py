"""Each layout of both engines shows which rank computes slowly, in the totals of its steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines.layout_worker import tiny_config
from engines.slow_worker import STEPS
from program.launched import Zygote
from torch import nn

from megatron_hyperrouter.model.attention import stopwatch
from megatron_hyperrouter.model.attention.stopwatch import Stopwatch, stopwatch_of

WORKER = Path(__file__).with_name("slow_worker.py")
DELAY = 0.03, 0.2  # seconds for each layer of the slow rank, in a step and in an evaluation
MEGATRON, PP2, FOUR = "--engine megatron", "--pipeline-model-parallel-size 2", "--num-layers 4"
LAYOUTS = {
    "deepspeed, EP2, recompute": "--expert-model-parallel-size 2 --recompute-granularity full",
    "deepspeed, PP2": PP2,
    "deepspeed, TP2": "--tensor-model-parallel-size 2",
    "megatron, TP2, sequence parallel": f"{MEGATRON} --tensor-model-parallel-size 2 --sequence-parallel",
    "megatron, CP2": f"{MEGATRON} --context-parallel-size 2",
    "megatron, PP2 x VPP2": f"{MEGATRON} {PP2} {FOUR} --virtual-pipeline-model-parallel-size 2",
    "megatron, PP2, windows": f"{MEGATRON} {PP2} {FOUR} --window-size 6,0 --window-attn-skip-freq 2",
    "megatron, EP2, latent, recompute": f"{MEGATRON} --expert-model-parallel-size 2 --multi-latent-attention "
    "--num-query-groups 4 --q-lora-rank 12 --recompute-granularity selective",
}


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    cases = [
        {"flags": f"--moe-router-topk 2 {flags}".split(), "slow": number % 2, "delay": DELAY}
        for number, flags in enumerate(LAYOUTS.values())
    ]
    folder = tmp_path_factory.mktemp("slow")
    answers = run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=folder)
    return dict(zip(LAYOUTS, answers, strict=True))


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_slow_rank_is_seen(told: dict[str, list[list[float]]], layout: str) -> None:
    slow, times = list(LAYOUTS).index(layout) % 2, told[layout]
    assert len(times) == 2 * STEPS and all(len(times_R) == 2 for times_R in times)
    in_step, in_evaluation = DELAY
    for times_R in times:
        assert times_R[slow] > in_step and times_R[1 - slow] > 0
    # A step may be disturbed, but not all of them.
    assert min(times_R[1 - slow] for times_R in times) < in_step / 3
    assert times[STEPS][slow] < in_evaluation / 2, "evaluations do not count"


class TestStopwatch:
    """On a clock, and on a stream, that the test moves."""

    @pytest.fixture
    def now(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """``host``: its time; ``stream``: when its work so far ends; ``done``: how far the device is."""
        now = SimpleNamespace(host=0.0, stream=0.0, done=0.0)

        class Event:
            """As ``torch.cuda.Event``, without a way to wait for it."""

            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = now.stream

            def query(self) -> bool:
                return bool(self.at <= now.done)

            def elapsed_time(self, end: Event) -> float:
                assert self.query() and end.query(), "torch raises otherwise"
                return 1000 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now.host)
        return now

    def test_on_a_cpu(self, now: SimpleNamespace) -> None:
        watch = Stopwatch(torch.device("cpu"))
        for pieces, mean in (((2.0, 4.0), 3.0), ((), 0.0), ((5.0,), 5.0)):
            with watch:
                now.host += 100  # before the step
            watch.start()
            for seconds in pieces:
                with watch:
                    now.host += seconds
                now.host += 10
            assert watch.take() == mean

    def test_on_a_gpu_the_host_waits_for_nothing(self, now: SimpleNamespace) -> None:
        watch = Stopwatch(torch.device("cuda"))

        def step(*pieces: float) -> None:
            watch.start()
            for seconds in pieces:
                now.stream += 10
                with watch:
                    now.stream += seconds

        step(2.0, 4.0)
        now.done = now.stream
        assert watch.take() == 3.0
        step(5.0, 6.0)
        now.done += 16  # the device is at work on the second piece
        assert watch.take() == 5.0
        step(8.0)
        now.done = now.stream
        assert watch.take() == 7.0, "the piece that was left, and the new one"
        assert watch.take() == 0.0

    def test_other_attention_is_timed_where_it_is_the_same_on_all_ranks(self, now: SimpleNamespace) -> None:
        """On a CPU the mean of two layers, on a GPU the first; 0 if it is not timed."""

        def passes(seconds: float) -> None:
            now.host += seconds
            now.stream = now.done = now.stream + seconds

        class Attention(nn.Module):
            """With Transformer Engine's in it."""

            def __init__(self, seconds: float) -> None:
                super().__init__()
                self.core_attention = nn.Identity()
                self.core_attention.register_forward_hook(lambda *_: passes(seconds))

            def forward(self, x: Any) -> Any:
                passes(10.0)
                return self.core_attention(x)

        def timed(flags: str, device: str = "cpu") -> float:
            model = nn.Sequential(Attention(2.0), Attention(7.0))
            config = tiny_config(f"{MEGATRON} {flags}".split(), world_size=2)
            watch = stopwatch_of([model], config, torch.device(device))
            watch.start()
            model(torch.zeros(1))
            return watch.take()

        assert timed("") == timed("--window-size 6,0") == 4.5
        assert timed("", "cuda") == 2.0
        assert timed("--window-size 6,0 --window-attn-skip-freq 2") == 0.0
        assert timed("--context-parallel-size 2") == 0.0
