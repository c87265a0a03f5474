"""What a run under DeepSpeed does inside: the frozen hypernetwork, its calls, the optimizer's state,
recomputation, bf16, settings.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engines.layout_worker import tiny_config

from megatron_hyperrouter.routers import ROUTERS

if TYPE_CHECKING:
    from program.launched import Zygote

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("inside_worker.py")
HYPER = "--router.name hyper --moe-router-topk 2"
CASES = {
    "hyper": HYPER,
    "shared": f"{HYPER} --router.shared model --router.bias",
    "full": f"{HYPER} --recompute-granularity full",
    "selective": f"{HYPER} --recompute-granularity selective",
    "bf16": f"{HYPER} --bf16",
    "zero 0": f"{HYPER} --zero-stage 0",
    "zero 2": f"{HYPER} --zero-stage 2",
    "frozen": "--router.name smoe_dropout --moe-router-topk 2",
    "more settings": HYPER,  # --deepspeed-config is added below, to zero 2 too
}
ON_TWO = {
    "EP2": f"{HYPER} --expert-model-parallel-size 2",
    "EP2 bf16": f"{HYPER} --expert-model-parallel-size 2 --bf16",
}
LAYERS = 2
Told = dict[str, Any]


@pytest.fixture(scope="module")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """What rank 0 of each case saw."""
    root = tmp_path_factory.mktemp("inside")
    (root / "ds.json").write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 12345}, "gradient_clipping": 1.0}),
        encoding="utf-8",
    )
    found: dict[str, Told] = {}
    for ranks, cases in ((1, CASES), (2, ON_TWO)):
        own_file = ["--deepspeed-config", str(root / "ds.json")]  # with it, one process keeps ZeRO
        more = {"more settings": own_file, "zero 2": own_file}
        task, answer = root / f"task{ranks}.json", root / f"answer{ranks}.json"
        task.write_text(
            json.dumps([flags.split() + more.get(name, []) for name, flags in cases.items()]),
            encoding="utf-8",
        )
        zygote.run([task, answer], program=WORKER, ranks=ranks)
        found.update(zip(cases, json.loads(answer.read_text(encoding="utf-8")), strict=True))
    return found


ALL_HYPER = [name for name in (*CASES, *ON_TWO) if name != "frozen"]


class TestHypernetwork:
    @pytest.mark.parametrize("case", [*CASES, *ON_TWO])
    def test_bytes_are_the_same_after_training_and_those_of_a_fresh_draw(
        self, runs: dict[str, Told], case: str
    ) -> None:
        before, after = runs[case]["digests"]
        config = tiny_config({**CASES, **ON_TWO}[case].split(), world_size=2 if case in ON_TWO else 1)
        fresh = [
            ROUTERS[config.router.name](
                config.router.options,
                hidden_size=32,
                num_experts=4,
                topk=2,
                layer_number=layer + 1,
                seed=1234,
            )
            for layer in range(LAYERS)
        ]
        assert before == after == [router.frozen.digest for router in fresh]
        assert len(set(after)) == (1 if case == "shared" else LAYERS)

    @pytest.mark.parametrize("case", ALL_HYPER)
    def test_runs_and_goes_back_once_a_step_and_layer(self, runs: dict[str, Told], case: str) -> None:
        """However many micro-batches a step has."""
        assert runs[case]["calls"] == [[LAYERS, LAYERS], [0, LAYERS], [LAYERS, LAYERS]]
        # which the next step reuses: the weights are the same
        assert runs[case]["calls_of_evaluation"] == [
            LAYERS,
            0,
        ]

    @pytest.mark.parametrize("case", ALL_HYPER)
    def test_embedding_learns(self, runs: dict[str, Told], case: str) -> None:
        moved = runs[case]["moved"]
        assert list(moved) == [f"decoder.layers.{layer}.mlp.router.embedding_S" for layer in range(LAYERS)]
        assert all(1e-4 < distance < 1e-2 for distance in moved.values())  # Adam steps of 3e-3

    @pytest.mark.parametrize("case", [name for name in CASES if "zero" not in name])
    def test_optimizer_holds_nothing_else(self, runs: dict[str, Told], case: str) -> None:
        told = runs[case]
        padding = told["given"] - told["trained"]  # ZeRO rounds each group up
        assert 0 <= padding < 64 and told["kept"] == told["given"]
        width, hidden, experts, vocabulary = 48, 32, 4, 64
        router = 0 if case == "frozen" else hidden
        norms = 2 * hidden + 2 * 8  # of the residual stream, of queries and keys
        layer = norms + hidden * (hidden + 2 * 16) + hidden * hidden + experts * 3 * width * hidden + router
        assert told["trained"] == LAYERS * layer + hidden + vocabulary * hidden


class TestSameRun:
    @pytest.mark.parametrize("case", ["full", "selective", "zero 0", "zero 2", "more settings", "EP2"])
    def test_to_1e_6(self, runs: dict[str, Told], case: str) -> None:
        for found, expected in zip(runs[case]["steps"], runs["hyper"]["steps"], strict=True):
            for number in ("lm_loss", "grad_norm", "aux_loss", "z_loss", "entropy", "load"):
                assert found[number] == pytest.approx(expected[number], rel=1e-6), number

    @pytest.mark.parametrize("case", ["bf16", "EP2 bf16"])
    def test_bf16_within_its_rounding(self, runs: dict[str, Told], case: str) -> None:
        """bfloat16 keeps 8 bits: a relative error of 2^-9 at each rounding, which mostly cancels in a mean
        over 128 tokens.
        """
        for found, expected in zip(runs[case]["steps"], runs["hyper"]["steps"], strict=True):
            assert all(math.isfinite(found[number]) for number in ("lm_loss", "grad_norm"))
            assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=2**-9)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2**-5)
            assert found["entropy"] == pytest.approx(expected["entropy"], rel=2**-6)
            assert found["lm_loss"] != expected["lm_loss"]


def test_deepspeed_config_arrives(runs: dict[str, Told]) -> None:
    assert runs["more settings"]["settings"] == {"bucket": 12345, "clip": 1.0, "stage": 1}
    # The decaying weights of the two layers and the embedding, not 2 GB whatever the model.
    assert 10**4 < runs["hyper"]["settings"]["bucket"] <= runs["hyper"]["trained"]
    assert [runs[case]["settings"]["stage"] for case in ("zero 0", "hyper", "zero 2")] == [0, 0, 2]
