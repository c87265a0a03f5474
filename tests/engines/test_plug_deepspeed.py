"""Our routers in DeepSpeed MoE layers that a caller built: against plain loops, and in training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from program.launched import Zygote
from torch import Tensor, nn

from megatron_hyperrouter import RouterSteps, plug_into_deepspeed
from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.routers.base import RunFacts, StepCounts

T, D, E = 24, 8, 4
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "library" / "deepspeed_moe.py"


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of this process alone; DeepSpeed's groups are forgotten afterwards."""
    from deepspeed.utils import groups

    skip_shm_build()
    store = f"file://{tmp_path_factory.mktemp('world')}/store"
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, verbose=False, init_method=store, rank=0, world_size=1
    )
    yield
    groups._release_process_group_references(None)
    torch.distributed.destroy_process_group()


class Odd(nn.Module):
    """An expert that is no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_D = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.scale_D) + x.flip(-1)


def layer(k: int = 2, *, ready: bool = True, expert: nn.Module | None = None, **options: Any) -> MoE:
    """DeepSpeed's own layer, as a caller builds it."""
    moe = MoE(
        D,
        expert or nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D)),
        num_experts=E,
        k=k,
        **options,
    )
    for parameter in moe.deepspeed_moe.experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    if ready:
        moe.set_deepspeed_parallelism()
    return moe


def loop(moe: MoE, x_TD: Tensor, W_ED: Tensor, k: int, capacity: int) -> tuple[Tensor, int]:
    """Token by token; an expert keeps its heaviest tokens.  Returns the output and how many routes were
    dropped.
    """
    experts = moe.deepspeed_moe.experts.deepspeed_experts
    routes: list[list[tuple[Tensor, int]]] = [[] for _ in range(E)]
    for t, row in enumerate(x_TD @ W_ED.t()):
        ids = sorted(range(E), key=lambda e: -row[e].item())[:k]
        for e, weight in zip(ids, row[ids].softmax(0), strict=True):
            routes[e].append((weight, t))
    out, dropped = [torch.zeros(D) for _ in x_TD], 0
    for e, found in enumerate(routes):
        found.sort(key=lambda route: (-route[0].item(), route[1]))
        dropped += max(len(found) - capacity, 0)
        for weight, t in found[:capacity]:
            out[t] = out[t] + weight * experts[e](x_TD[t])
    return torch.stack(out), dropped


@pytest.mark.parametrize("ready", [False, True], ids=["before the groups", "after the groups"])
@pytest.mark.parametrize("expert", [None, Odd()], ids=["mlp", "odd"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["topk", "smoe_dropout", "hyper"])
def test_layer_is_a_loop_over_experts(name: str, k: int, expert: nn.Module | None, ready: bool) -> None:
    moe = layer(k, ready=ready, expert=expert, drop_tokens=False)
    router = plug_into_deepspeed(moe, name)
    if not ready:
        moe.set_deepspeed_parallelism()
    x = torch.randn(2, T // 2, D, requires_grad=True)
    output, _, counts = moe(x)
    W_ED, _ = router.linear()
    expected, _ = loop(moe, x.flatten(0, 1), W_ED, k, capacity=T)
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-5, atol=1e-6)
    assert counts.sum() == T * k
    probe = torch.randn(2, T // 2, D)
    parameters = {"x": x, **dict(moe.named_parameters())}
    grads = [
        torch.autograd.grad((value.flatten() * probe.flatten()).sum(), parameters.values(), allow_unused=True)
        for value in (output, expected)
    ]
    for label, found, wanted in zip(parameters, *grads, strict=True):
        largest = max(float(wanted.abs().max()), 1.0)  # a small sum of large terms has their rounding
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * largest, msg=label)
    assert moe.deepspeed_moe.gate.ep_group is moe.deepspeed_moe.ep_group is not None


@pytest.mark.parametrize(
    ("training", "capacity"), [(True, math.ceil(T * 2 / E * 0.5)), (False, math.ceil(T * 2 / E * 0.8))]
)
def test_capacities_are_those_of_the_layer(training: bool, capacity: int) -> None:
    moe = layer(drop_tokens=True, capacity_factor=0.5, eval_capacity_factor=0.8, min_capacity=2).train(
        training
    )
    router = plug_into_deepspeed(moe, "topk", init_std=1.0)
    assert router.training is training
    x_TD = torch.randn(T, D)
    expected, dropped = loop(moe, x_TD, router.linear()[0], 2, capacity)
    assert dropped
    torch.testing.assert_close(moe(x_TD)[0], expected, rtol=1e-5, atol=1e-6)


def test_least_capacity() -> None:
    moe = layer(drop_tokens=True, capacity_factor=0.01, min_capacity=5)
    router = plug_into_deepspeed(moe, "topk")
    x_TD = torch.randn(T, D)
    torch.testing.assert_close(
        moe(x_TD)[0], loop(moe, x_TD, router.linear()[0], 2, 5)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("aux", "z"), [(0.3, 0.2), (0.0, 0.5), (0.0, 0.0), (None, None)])
def test_second_value_is_the_sum_of_weighted_losses(aux: float | None, z: float | None) -> None:
    moe = layer()
    given = {} if aux is None else {"aux_loss_coeff": aux, "z_loss_coeff": z}
    router = plug_into_deepspeed(moe, "topk", init_std=1.0, **given)
    x_TD = torch.randn(T, D)
    logits_TE = x_TD @ router.linear()[0].t()
    share_E = torch.bincount(logits_TE.topk(2).indices.flatten(), minlength=E) / (2 * T)
    switch = E * (share_E * logits_TE.softmax(-1).mean(0)).sum()
    expected = (1.0 if aux is None else aux) * switch + (z or 0.0) * logits_TE.exp().sum(
        -1
    ).log().square().mean()
    torch.testing.assert_close(moe(x_TD)[1], expected, rtol=1e-5, atol=1e-7)


def test_state_dict_holds_the_embedding_and_no_generated_weight() -> None:
    moe = layer()
    router = plug_into_deepspeed(moe, "hyper")
    before = set(moe.state_dict())
    moe(torch.randn(T, D))[0].sum().backward()
    own = {name.removeprefix("deepspeed_moe.gate.") for name in before if "gate" in name}
    assert set(moe.state_dict()) == before and own == {f"router.{name}" for name in router.state_dict()}
    assert "router.embedding_S" in own and sum(parameter.numel() for parameter in router.parameters()) == D
    twin = layer()
    plug_into_deepspeed(twin, "hyper")
    twin.load_state_dict(moe.state_dict(), strict=True)
    x_TD = torch.randn(T, D)
    assert torch.equal(twin(x_TD)[0], moe(x_TD)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_changed_embedding_is_seen_at_once(training: bool) -> None:
    moe = layer(drop_tokens=False).train(training)
    router = plug_into_deepspeed(moe, "hyper")
    x_TD = torch.randn(T, D)
    before = moe(x_TD)[0]
    with torch.no_grad():
        router.get_parameter("embedding_S").neg_().add_(0.5)
        after = moe(x_TD)[0]
        expected, _ = loop(moe, x_TD, router.linear()[0], 2, T)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


def test_k_that_grows_follows_the_clock() -> None:
    moe = layer()
    plug_into_deepspeed(moe, "topk", topk=lambda step: 1 + step)
    routes = []
    for step in range(E):
        moe.deepspeed_moe.gate.clock.step = step
        routes.append(int(moe(torch.randn(T, D))[2].sum()))
    assert routes == [T, 2 * T, 3 * T, 4 * T]


def test_layers_start_by_their_number_and_seed() -> None:
    embeddings = [
        plug_into_deepspeed(layer(), "hyper", seed=seed, layer_number=number).get_parameter("embedding_S")
        for seed, number in ((1, 1), (1, 1), (1, 2), (2, 1))
    ]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2]) and not torch.equal(embeddings[0], embeddings[3])


def plugged() -> MoE:
    moe = layer()
    plug_into_deepspeed(moe, "topk")
    return moe


def with_tutel() -> MoE:
    moe = layer()
    moe.deepspeed_moe.use_tutel = True
    return moe


def with_own_gate() -> MoE:
    moe = layer()
    moe.deepspeed_moe.gate = nn.Linear(D, E)
    return moe


@pytest.mark.parametrize(
    ("make", "arguments", "error", "words"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "must be a deepspeed.moe.layer.MoE, not Linear$"),
        (
            lambda: nn.Sequential(layer()),
            {},
            TypeError,
            "not Sequential; call plug_into_deepspeed once for each",
        ),
        (plugged, {}, ValueError, "already has the router topk"),
        (with_own_gate, {}, TypeError, "gate of this MoE layer is a Linear"),
        (with_tutel, {}, ValueError, "use_tutel=False"),
        (layer, {"name": "hyperr"}, ConfigError, "did you mean hyper"),
        (layer, {"hypernet_with": 3}, ConfigError, "did you mean hypernet_width"),
        (layer, {"hypernet_width": 0}, ConfigError, "hypernet_width = 0"),
        (layer, {"hidden_size": 8}, TypeError, "hidden_size must not be given, because the MoE layer"),
        (layer, {"layer_number": 0}, ValueError, "layer_number = 0: must be at least 1"),
        (layer, {"topk": E + 1}, ConfigError, "must be from 1 to --num-experts = 4"),
    ],
)
def test_refusals(make: Any, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plug_into_deepspeed(make(), arguments.pop("name", "hyper"), **arguments)


def test_a_method_that_follows_the_step_warns_and_works_when_it_is_told() -> None:
    moe = layer(drop_tokens=False)
    with pytest.warns(
        UserWarning, match=r"similarity loss of router simsmoe needs the expert loads of all ranks"
    ):
        router = plug_into_deepspeed(
            moe, "simsmoe", frequency=0.1, threshold=0.0, min_tokens=3, aux_loss_coeff=0.0
        )
    told: list[StepCounts] = []
    end_step = router.end_step
    router.end_step = lambda counts: (told.append(counts), end_step(counts))
    steps = RouterSteps(moe, batch_first=True)
    micro_batches = [torch.randn(T, D), torch.randn(T, D)]
    steps.begin(4)
    for x_TD in micro_batches:
        assert moe(x_TD)[1].item() == 0.0
    steps.begin_evaluation()
    moe(torch.randn(T, D))  # is not counted
    chosen = steps.end()
    choices = [router(x_TD, step=4).experts_TK for x_TD in micro_batches]
    load_E = sum(torch.bincount(experts_TK.flatten(), minlength=E) for experts_TK in choices)
    together = sum(
        float((experts_TK == 0).any(1).logical_and((experts_TK == 1).any(1)).sum()) for experts_TK in choices
    )
    (counts,) = told
    assert (counts.step, counts.tokens, counts.load_E.tolist()) == (5, 2.0 * T, load_E.tolist())
    assert counts.extra[0] == together, "tokens that experts 0 and 1 share"
    assert chosen["load_max_over_mean"] == [pytest.approx((load_E.max() / load_E.float().mean()).item())]
    assert moe(micro_batches[0])[1].item() > 0.0
    with pytest.raises(ValueError, match=r"no router has processed a token since begin\(\)"):
        steps.end()


def test_a_method_that_goes_by_tokens_gets_them_in_the_order_of_the_vectors() -> None:
    """StableMoE's second stage routes by the id alone."""
    moe = layer(k=1, drop_tokens=False)
    with pytest.warns(UserWarning, match="needs the ids or positions of the tokens"):
        router = plug_into_deepspeed(moe, "stablemoe", facts=RunFacts(train_iters=10, vocab_size=50))
    steps, ids_BS = RouterSteps(moe, batch_first=True), torch.arange(2 * 5).view(2, 5) * 3
    steps.begin(9)
    steps.arrive(ids_BS)
    routes = []
    gate = moe.deepspeed_moe.gate
    gate.site.statistics.record = lambda _, routing, **__: routes.append(
        routing.experts_TK.flatten().tolist()
    )
    moe(torch.randn(2, 5, D))
    alone = []
    for token in ids_BS.flatten().tolist():
        steps.begin_evaluation()
        steps.arrive(torch.tensor([[token]]))
        moe(torch.randn(1, 1, D))
        alone += routes.pop()
    assert routes == [alone] and len(set(alone)) > 1
    assert router.layer_number == 1


def test_a_layer_that_a_model_leaves_out_learns_of_its_own_tokens_alone() -> None:
    layers, told = [layer(drop_tokens=False) for _ in range(3)], {}
    for number, moe in enumerate(layers, start=1):
        with pytest.warns(UserWarning, match="needs the expert loads of all ranks"):
            router = plug_into_deepspeed(moe, "topk", layer_number=number, expert_bias=True)
        router.end_step = lambda counts, number=number, end_step=router.end_step: (
            told.update({number: counts}),
            end_step(counts),
        )
    steps = RouterSteps(nn.ModuleList(layers), batch_first=True)
    steps.begin(0)
    for micro_batch in range(3):
        layers[0](torch.randn(T, D))
        if micro_batch == 1:
            layers[1](torch.randn(T, D))
    chosen = steps.end()
    assert {number: (counts.tokens, float(counts.load_E.sum())) for number, counts in told.items()} == {
        1: (3.0 * T, 3.0 * T * 2),
        2: (3.0 * T, 1.0 * T * 2),
    }
    assert [math.isnan(value) for value in chosen["entropy"]] == [False, False, True]
    assert [moe.deepspeed_moe.gate.router.choice_bias_E.isfinite().all().item() for moe in layers] == [
        True
    ] * 3
    assert not layers[2].deepspeed_moe.gate.router.choice_bias_E.any()


def test_a_pass_whose_tokens_have_not_arrived_is_refused() -> None:
    moe = layer()
    plug_into_deepspeed(moe, "hyper", layer_number=4)
    steps = RouterSteps(moe, batch_first=True)
    steps.begin(0)
    steps.arrive(torch.zeros(1, T, dtype=torch.int64))
    moe(torch.randn(T, D))
    with pytest.raises(
        ValueError,
        match=r"layer 4 begins forward pass 2, but arrive\(\) was called only 1 times since .*"
        r"call arrive\(\) before each forward pass",
    ):
        moe(torch.randn(T, D))


def test_what_router_steps_refuses() -> None:
    with pytest.raises(ValueError, match="the model has no router of this package"):
        RouterSteps(layer(), batch_first=True)
    twice = nn.ModuleList([layer(), layer()])
    for moe in twice:
        plug_into_deepspeed(moe, "topk")
    with pytest.raises(
        ValueError,
        match=r"several routers have the same layer_number: \[1, 1\]; give each router a different",
    ):
        RouterSteps(twice, batch_first=True)
    wide = MoE(D, nn.Linear(D, D), num_experts=2 * E)
    plug_into_deepspeed(wide, "topk", layer_number=2)
    with pytest.raises(ValueError, match=r"layers have different numbers of experts, \[4, 8\]"):
        RouterSteps([twice[0], wide], batch_first=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["topk", "hyper", "smoe_dropout", "xmoe", "competesmoe"])
def test_a_method_that_lacks_nothing_is_silent(name: str) -> None:
    moe = layer()
    plug_into_deepspeed(moe, name)


def competing(**facts: int) -> MoE:
    moe = layer(drop_tokens=False)
    plug_into_deepspeed(moe, "competesmoe", schedule="capped", rate=1.0, warm_up=0.5, facts=RunFacts(**facts))
    return moe


def test_facts_of_the_run_reach_the_router() -> None:
    moe = competing(train_iters=4)
    losses = []
    for step in range(4):
        moe.deepspeed_moe.gate.clock.step = step
        losses.append(
            set(moe.deepspeed_moe.gate.router(torch.randn(T, D), step=step, experts=moe.deepspeed_moe).losses)
        )
    assert losses == [{"aux"}, {"aux"}, {"competition"}, {"competition"}]


def test_a_competition_under_autocast_scores_in_the_dtype_of_the_experts() -> None:
    moe = competing(train_iters=1)
    x_TD = torch.randn(T, D)
    expected = moe(x_TD)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = moe(x_TD.bfloat16())[0]
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_used_token_is_refused_in_a_competition_too() -> None:
    moe = competing(train_iters=1)
    with pytest.raises(NotImplementedError, match="used_token"):
        moe(torch.randn(T, D), used_token=torch.ones(T))


class TestUnderTheEngine:
    CONFIG: dict[str, Any] = {  # noqa: RUF012
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }

    @pytest.fixture(autouse=True)
    def _rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "0")  # deepspeed.initialize insists on it

    def start(self, moe: MoE) -> Any:
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(moe.parameters()), "name": "all"}
        )
        engine, *_ = deepspeed.initialize(
            model=nn.Sequential(moe), optimizer=torch.optim.AdamW(groups, lr=0.1), config=self.CONFIG
        )
        return engine

    def test_trains_the_embedding_saves_and_loads_it(self, tmp_path: Path) -> None:
        moe = layer(ready=False)
        router = plug_into_deepspeed(moe, "hyper")
        engine = self.start(moe)
        first = router.get_parameter("embedding_S").detach().clone()

        def step() -> Tensor:
            torch.manual_seed(3)
            output, loss, _ = engine(torch.randn(1, T, D))
            engine.backward(output.square().mean() + loss)
            engine.step()
            return router.get_parameter("embedding_S").detach().clone()

        trained = step()
        assert ((trained - first).abs() > 0.01).all()  # Adam's first step has the size of the learning rate
        engine.save_checkpoint(str(tmp_path))
        more = step()
        engine.load_checkpoint(str(tmp_path))
        assert torch.equal(router.get_parameter("embedding_S"), trained)
        assert torch.equal(step(), more)

    def test_too_late_for_zero(self) -> None:
        moe = layer(ready=False)
        self.start(moe)
        with pytest.raises(ValueError, match=r"before deepspeed\.initialize"):
            plug_into_deepspeed(moe, "hyper")
        plug_into_deepspeed(moe, "smoe_dropout")  # which has nothing to train
        assert moe(torch.randn(T, D))[0].shape == (T, D)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_example(zygote: Zygote, ranks: int) -> None:
    lines = [
        line
        for line in zygote.run([], program=EXAMPLE, ranks=ranks).stdout.splitlines()
        if line.startswith("step ")
    ]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) == 6 and losses[-1] < losses[0] < 3 and losses[-1] < 0.1, lines
