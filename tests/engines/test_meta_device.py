"""Our modules on torch's ``meta`` device, which reveals what would fail or wait on a GPU.

On torch's ``meta`` device an operator over two devices raises, as on a GPU, and so does every read of a
number, for which the host would wait.  Nothing here needs a GPU.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``B`` samples, ``S`` length of a sample.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from engines.layout_worker import tiny_config
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from one_rank import world
from torch import Tensor, nn

from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.engines.clock import Clock
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.engines.totals import eval_result, step_result
from megatron_hyperrouter.model.loss import LanguageModelLoss
from megatron_hyperrouter.model.output import Projection
from megatron_hyperrouter.routers import ROUTERS, build_router
from megatron_hyperrouter.routers.base import Router, RunFacts, Tokens
from megatron_hyperrouter.routers.frozen import FrozenTensors

META = torch.device("meta")
PLACE = RankPlace(rank=0, world_size=1, data_rank=0, data_size=1)
D, E, B, S = 32, 4, 2, 16  # D and E of the tiny model
T = B * S
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ROUTERS),
    ("topk", {"aux_loss": "sequence"}),
    ("topk", {"aux_loss": "global_batch"}),
    ("topk", {"expert_bias": True, "score_function": "sigmoid"}),
    ("topk", {"jitter_eps": 0.1}),
    ("hyper", {"bias": True, "shared": "model"}),
)

SLOTS = {
    "grouped": "--moe-grouped-gemm",
    "grouped, capacity": "--moe-grouped-gemm --moe-expert-capacity-factor 1.0",
    "loop": "--no-moe-grouped-gemm",
}


class Read(NamedTuple):
    """A read of a number that is allowed: the file that asks for it, and why it has to stay for now."""

    file: str
    reason: str


# By case. An entry whose case reads no number any more fails the test: then it has to go.
ALLOWED = {
    "simsmoe, outputs": Read(
        "simsmoe.py", "the rows to compare are looked up, in the few steps that compare"
    ),
    "deepspeed, loop": Read("gate.py", "DeepSpeed's dispatch pads experts to the largest load"),
    "megatron, loop": Read("moe_utils.py", "megatron-core's dispatch selects rows by a mask"),
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with world(tmp_path_factory.mktemp("world")):
        yield


@pytest.fixture(autouse=True)
def meta_has_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to ask whether it is on there."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


def on_meta(module: nn.Module) -> Any:
    """The module there, its frozen tensors as well, which stay on the CPU by themselves."""
    module.to(META)
    for part in module.modules():
        if (held := getattr(part, "frozen", None)) is not None:
            fakes = tuple(torch.empty_like(tensor, device=META) for tensor in held.tensors)
            part.frozen = FrozenTensors(held.recipe, fakes, held.digest)
    return module


def router_of(name: str, **options: Any) -> Router:
    router = build_router(
        name,
        hidden_size=D,
        num_experts=E,
        topk=2,
        seed=1,
        aux_loss_coeff=0.01,
        z_loss_coeff=0.001,
        facts=RunFacts(num_layers=1, train_iters=10, vocab_size=50),
        **options,
    )
    router.hold(True)  # as an engine does
    found: Router = on_meta(router)
    return found


def vectors(*shape: int) -> Tensor:
    return torch.empty(*shape, device=META, dtype=torch.bfloat16, requires_grad=True)


def check(case: str, work: Callable[[], object]) -> None:
    """``work`` reads no number and mixes no devices, or does what ``ALLOWED`` says of it."""
    if case not in ALLOWED:
        work()
        return
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        work()
    files = {Path(frame.filename).name for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert ALLOWED[case].file in files, caught.value


@pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{n} {'-'.join(o)}".strip() for n, o in VARIANTS]
)
def test_routers(name: str, options: dict[str, Any]) -> None:
    """A training pass forward and backward, and what the engine counts of it."""
    router = router_of(name, **options)
    statistics = RouterStatistics(1, E)
    statistics.make_room(router.num_extra_counts)
    ids_T, places_T = (torch.empty(T, dtype=torch.int64, device=META) for _ in range(2))

    def work() -> None:
        routing = router(vectors(T, D), step=0, tokens=Tokens(ids_T, places_T, S, B))
        statistics.record(router, routing)
        total = routing.weights_TK.sum() + sum(routing.losses.values())
        if total.requires_grad:
            total.backward()

    check(" ".join((name, *options)), work)
    assert statistics.sums.device == META or name in ALLOWED


class Bank:
    """Scores of outputs that no expert has made."""

    def scores_TE(self, x_TD: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        return score(x_TD.detach().float().unsqueeze(1).expand(-1, E, -1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("competesmoe", {"rate": 1.0, "schedule": "fixed"}),
        ("competesmoe", {"rate": 1.0, "version": "v1"}),
        ("simsmoe", {}),
    ],
    ids=["competesmoe", "competesmoe v1", "simsmoe"],
)
def test_passes_that_look_at_outputs(name: str, options: dict[str, Any]) -> None:
    router = router_of(name, **options)
    if name == "simsmoe":
        router._due = ((0, 1), (2, 3))  # as read after an earlier step
    ids_T, places_T = (torch.empty(T, dtype=torch.int64, device=META) for _ in range(2))
    tokens = Tokens(ids_T, places_T, S, B)

    def work() -> None:
        asked: dict[str, Any] = {"step": 0, "tokens": tokens, "experts": Bank()}
        routing, now, x_TD = router(vectors(T, D), **asked), router.at(**asked), vectors(T, D)
        assert router.wants_outputs(now)
        routing = router.combine(routing, x_TD, vectors(T, 2, D), now)
        (routing.weights_TK.sum() + sum(routing.losses.values())).backward()

    check(f"{name}, outputs", work)


def test_language_model_loss_and_the_sums_of_a_stage_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL adds up tensors of the GPU alone; a pipeline stage that computes no loss brings them, too."""
    brought: list[torch.device] = []

    def all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> None:
        brought.append(tensor.device)
        raise InterruptedError  # behind it, numbers are read

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    idle, busy = LanguageModelLoss(META), LanguageModelLoss(META)
    labels_BS = torch.empty(B, S, dtype=torch.int64, device=META)
    weight_VD = torch.empty(50, D, device=META, dtype=torch.bfloat16, requires_grad=True)
    for token_bytes_V in (None, torch.empty(50, dtype=torch.int64, device=META)):
        busy.token_bytes_V = token_bytes_V
        busy(Projection(vectors(S, B, D), weight_VD), labels_BS).backward()
    for loss in (idle, busy):
        with pytest.raises(InterruptedError):
            step_result(loss.take(), RouterStatistics(1, E), PLACE, grad_norm=1.0, stop=False, memory=0)
        with pytest.raises(InterruptedError):
            eval_result(loss.take(), replicas=1)
    assert brought == [META] * 4


def test_scale_of_the_routers_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DeepSpeed engine sets it where the engine computes; the gradient is multiplied by it."""
    import deepspeed

    from megatron_hyperrouter.engines.deepspeed.engine import DeepSpeedEngine

    class Stopped(Exception):
        """The scale is set by now."""

    def stop(*args: object, **kwargs: object) -> None:
        raise Stopped

    monkeypatch.setattr(deepspeed, "initialize", stop)
    engine = object.__new__(DeepSpeedEngine)
    engine._zero_stage = 1
    engine.config, engine.device, engine.stages = tiny_config([]), META, 1
    engine.place = type("RankPlace", (), {"data_size": 1})  # type: ignore[assignment]
    engine.model = nn.Linear(1, 1)
    monkeypatch.setattr(DeepSpeedEngine, "named_parameters", lambda self: self.model.named_parameters())
    with pytest.raises(Stopped):
        engine._wrap()
    loss = torch.empty((), device=META, requires_grad=True)
    MoEAuxLossAutoScaler.apply(vectors(T, D), loss).sum().backward()
    assert loss.grad is not None and loss.grad.device == META


@pytest.fixture
def deepspeed_world(tmp_path: Path) -> Iterator[None]:
    """DeepSpeed's own groups on top of the world."""
    import deepspeed
    from deepspeed import comm
    from deepspeed.utils import groups

    from megatron_hyperrouter.compat.deepspeed import skip_shm_build

    skip_shm_build()
    deepspeed.init_distributed("gloo", verbose=False)
    yield
    groups._release_process_group_references(None)
    comm.comm.cdb = None  # or the next test would use a backend that is gone


@pytest.mark.usefixtures("deepspeed_world")
@pytest.mark.parametrize(("case", "flags"), SLOTS.items())
def test_slot_of_the_deepspeed_engine(case: str, flags: str) -> None:
    from megatron_hyperrouter.engines.deepspeed.mlp_slot.slot import MoESlot
    from megatron_hyperrouter.model.spec import shared_expert_spec, transformer_config

    run = tiny_config(["--bf16", *flags.split()])
    statistics = RouterStatistics(1, E)
    slot = MoESlot(
        transformer_config(run),
        run=run,
        make=lambda number: router_of("topk"),
        clock=Clock(),
        statistics=statistics,
        shared_expert=shared_expert_spec(),
    )
    slot.set_layer_number(1)
    slot.moe.set_deepspeed_parallelism()
    on_meta(slot)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=META))
    check(f"deepspeed, {case}", lambda: slot(vectors(S, B, D))[0].sum().backward())


@pytest.mark.parametrize(("case", "flags"), SLOTS.items())
def test_slot_of_the_megatron_engine(case: str, flags: str) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from megatron_hyperrouter.compat.megatron import install
    from megatron_hyperrouter.engines.megatron.model import core_config, experts_of
    from megatron_hyperrouter.engines.megatron.routed import RoutedMoELayer
    from megatron_hyperrouter.engines.megatron.router import MegatronRouter

    install()
    run = tiny_config(["--bf16", "--engine", "megatron", *flags.split()])
    statistics = RouterStatistics(1, E)

    def router(**given: Any) -> MegatronRouter:
        return MegatronRouter(**given, make=lambda number: router_of("topk"), statistics=statistics)

    layer = RoutedMoELayer(
        core_config(run),
        MoESubmodules(experts=experts_of(run), router=router),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    layer.set_layer_number(1)
    on_meta(layer)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=META))
    check(f"megatron, {case}", lambda: layer(vectors(S, B, D))[0].sum().backward())
