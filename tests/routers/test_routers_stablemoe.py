"""StableMoE: both stages against loops in float64, the switch between them, and that what is frozen stays
so.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter import build_router
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.ops.balance import overload_loss
from megatron_hyperrouter.routers import RunFacts
from megatron_hyperrouter.routers.base import Tokens

T, D, E, V, W = 11, 6, 5, 13, 4
SWITCH = 4


def small(**changes):
    sizes = {
        "hidden_size": D,
        "num_experts": E,
        "topk": 2,
        "seed": 5,
        "init_std": 0.7,
        "word_size": W,
        "stage1_steps": SWITCH,
    }
    return build_router(
        "stablemoe", **{**sizes, "facts": RunFacts(num_layers=2, train_iters=40, vocab_size=V), **changes}
    )


def numbers(seed: int = 2) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def words(seed: int = 3) -> Tokens:
    ids_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids_T, torch.arange(T), T)


def sigmoid(value):
    return 1.0 / (1.0 + math.exp(-value))


def top(scores, k):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def frozen_ids(D_VW, centroid_EW, tokens, k):
    D_VW, centroid_EW = D_VW.double().tolist(), centroid_EW.double().tolist()
    return [top([dot(row, D_VW[word]) for row in centroid_EW], k) for word in tokens.ids_T.tolist()]


@pytest.mark.parametrize("k", [1, 2, E])
def test_stage_one_against_loops(k):
    router, x_TD, tokens = small(topk=k, balance_coeff=0.3, distillation_coeff=2.0), numbers(), words()
    routing = router(x_TD, step=SWITCH - 1, tokens=tokens)
    scores = [[dot(c, x) for c in router.centroid_ED.double().tolist()] for x in x_TD.double().tolist()]
    ids = [top(row, k) for row in scores]
    assert routing.experts_TK.tolist() == ids
    torch.testing.assert_close(routing.logits_TE, torch.tensor(scores))
    torch.testing.assert_close(
        routing.weights_TK, torch.tensor([[sigmoid(scores[t][i]) for i in ids[t]] for t in range(T)])
    )
    balance = wrong = 0.0
    mean = T * k / E
    for i in range(E):
        routed = [t for t in range(T) if i in ids[t]]
        balance += (len(routed) - mean) / mean * math.fsum(sigmoid(scores[t][i]) for t in routed)
    table, centroids = router.word_VW.double().tolist(), router.word_centroid_EW.double().tolist()
    for t, word in enumerate(tokens.ids_T.tolist()):
        distilled = [dot(row, table[word]) for row in centroids]
        total = math.log(math.fsum(math.exp(value) for value in distilled))
        wrong += math.fsum(total - distilled[i] for i in ids[t]) / k
    assert routing.losses.keys() == {"balance", "distillation"}
    assert float(routing.losses["balance"]) == pytest.approx(0.3 * balance / T, rel=1e-4, abs=1e-6)
    assert float(routing.losses["distillation"]) == pytest.approx(2.0 * wrong / T, rel=1e-5)


def test_balance_is_zero_when_uniform_and_pushes_the_crowded_down():
    values_TK = torch.rand(10, 1, requires_grad=True)
    assert float(overload_loss(values_TK, torch.arange(10).view(-1, 1) % 5, 5)) == pytest.approx(
        0.0, abs=1e-6
    )
    crowded_TK = torch.tensor([[0]] * 7 + [[1]] * 3)
    (gradient_TK,) = torch.autograd.grad(overload_loss(values_TK, crowded_TK, 2), values_TK)
    # (7 - 5) / 5 / 10
    torch.testing.assert_close(gradient_TK.flatten(), torch.tensor([0.04] * 7 + [-0.04] * 3))


def test_who_learns_from_what_in_stage_one():
    """The balance loss trains the centroids; distillation trains only the light router, towards the chosen
    experts.
    """
    router, x_TD, tokens = small(), numbers(), words()
    losses = router(x_TD, tokens=tokens).losses
    balance = torch.autograd.grad(
        losses["balance"], list(router.parameters()), allow_unused=True, retain_graph=True
    )
    assert [gradient is None for gradient in balance] == [False, True, True]
    distillation = torch.autograd.grad(losses["distillation"], list(router.parameters()), allow_unused=True)
    assert distillation[0] is None
    router64 = copy.deepcopy(router).double()
    chosen = router(x_TD, tokens=tokens).experts_TK
    loss = 0.0
    for t, word in enumerate(tokens.ids_T.tolist()):
        distilled_E = torch.stack([router64.word_centroid_EW[i] @ router64.word_VW[word] for i in range(E)])
        loss = loss + sum(distilled_E.exp().sum().log() - distilled_E[i] for i in chosen[t].tolist()) / (
            2 * T
        )
    expected = torch.autograd.grad(loss, [router64.word_VW, router64.word_centroid_EW])
    for one, other in zip(distillation[1:], expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_stage_two_against_loops(k):
    """The light router chooses experts by token id; the centroids give the weights and get the
    only gradient.
    """
    router, x_TD, tokens = (
        small(topk=k, aux_loss_coeff=0.1, z_loss_coeff=0.1),
        numbers().requires_grad_(),
        words(),
    )
    routing = router(x_TD, step=SWITCH, tokens=tokens)
    ids = frozen_ids(router.word_VW, router.word_centroid_EW, tokens, k)
    assert routing.experts_TK.tolist() == ids
    assert routing.losses == {}
    centroids, rows = router.centroid_ED.double().tolist(), x_TD.double().tolist()
    expected = [[sigmoid(dot(centroids[i], rows[t])) for i in ids[t]] for t in range(T)]
    torch.testing.assert_close(routing.weights_TK, torch.tensor(expected))
    routing.weights_TK.sum().backward()
    gradient_ED = [[0.0] * D for _ in range(E)]
    for t in range(T):
        for n in range(k):
            for d in range(D):
                gradient_ED[ids[t][n]][d] += expected[t][n] * (1 - expected[t][n]) * rows[t][d]
    torch.testing.assert_close(router.centroid_ED.grad, torch.tensor(gradient_ED), rtol=1e-5, atol=1e-6)
    assert not router.word_VW.grad.any()
    assert not router.word_centroid_EW.grad.any()
    with torch.no_grad():
        other = router(numbers(9), step=SWITCH, tokens=tokens)
    assert torch.equal(other.experts_TK, routing.experts_TK)  # whatever the vectors are


@pytest.mark.parametrize("tokens", [None, words()], ids=["no ids", "ids"])
@pytest.mark.parametrize("step", [0, SWITCH])
def test_every_training_pass_gives_every_parameter_a_gradient(step, tokens):
    if step == SWITCH and tokens is None:
        return
    router = small(distillation_coeff=0.0)
    router(numbers(), step=step, tokens=tokens).weights_TK.sum().backward()
    assert all(parameter.grad is not None for parameter in router.parameters())
    assert [bool(parameter.grad.any()) for parameter in router.parameters()] == [True, False, False]


def test_without_token_ids_stage_one_works_and_stage_two_says_what_it_needs():
    router = small()
    assert router(numbers(), step=SWITCH - 1).losses.keys() == {"balance"}
    for router.training in (True, False):
        with pytest.raises(ValueError, match="stage 2 and routes by token ids"):
            router(numbers(), step=SWITCH)


def train(router, optimizer, steps, *, parts=2):
    """Micro-batches and optimizer steps as an engine has them; returns the ids that were chosen."""
    ids = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(parts):
            x_TD, tokens = numbers(10 * step + part), words(10 * step + part)
            routing = router(x_TD, step=step, tokens=tokens)
            ((routing.weights_TK * x_TD[:, :2]).sum() + sum(routing.losses.values())).backward()
            ids.append(routing.experts_TK.tolist())
        optimizer.step()
    return ids


def adam(router):
    return torch.optim.AdamW(router.parameters(), lr=0.05, weight_decay=0.3)


def test_what_is_frozen_stays_though_the_optimizer_moves_the_live_weights():
    router = small()
    optimizer = adam(router)
    train(router, optimizer, range(SWITCH))
    assert router.frozen_at.tolist() == [-1]
    at_switch = router.word_VW.detach().clone(), router.word_centroid_EW.detach().clone()
    train(router, optimizer, range(SWITCH, SWITCH + 6))
    assert router.frozen_at.tolist() == [SWITCH]
    assert torch.equal(router.frozen_word_VW, at_switch[0])
    assert torch.equal(router.frozen_centroid_EW, at_switch[1])
    assert (router.word_VW - at_switch[0]).abs().max() > 0.05  # momentum and decay
    tokens = words(77)
    expected = frozen_ids(*at_switch, tokens, 2)
    assert expected != frozen_ids(router.word_VW, router.word_centroid_EW, tokens, 2)
    for router.training in (True, False):
        assert router(numbers(), step=SWITCH + 6, tokens=tokens).experts_TK.tolist() == expected


def test_evaluation_follows_the_stage_of_its_step():
    router, x_TD, tokens = small(), numbers(), words()
    train(router, adam(router), range(SWITCH))
    router.eval()
    with torch.inference_mode():
        first = router(x_TD, step=SWITCH - 1, tokens=tokens)
        second = router(x_TD, step=SWITCH, tokens=tokens)
    assert first.experts_TK.tolist() == [top(row, 2) for row in (x_TD @ router.centroid_ED.t()).tolist()]
    assert second.experts_TK.tolist() == frozen_ids(router.word_VW, router.word_centroid_EW, tokens, 2)
    assert "distillation" not in first.losses
    router.train()  # an evaluation that froze must not keep training from going on
    train(router, adam(router), range(SWITCH, SWITCH + 2))


def test_a_checkpoint_of_the_second_stage_is_evaluated_and_finetuned_by_its_frozen_copy():
    """This does not depend on the step, which an evaluation may not know and a fine-tuning starts at 0."""
    router, tokens = small(), words(77)
    train(router, adam(router), range(SWITCH + 4))
    expected = frozen_ids(router.frozen_word_VW, router.frozen_centroid_EW, tokens, 2)
    assert expected != frozen_ids(router.word_VW, router.word_centroid_EW, tokens, 2)
    evaluated, finetuned = small().eval(), small(stage1_steps=0)
    for reader in (evaluated, finetuned):
        reader.load_state_dict(router.state_dict())
    found = evaluated(numbers(), tokens=tokens)
    assert found.experts_TK.tolist() == expected
    assert found.losses == {}
    assert train(finetuned, adam(finetuned), range(3))[0] == frozen_ids(
        router.frozen_word_VW, router.frozen_centroid_EW, words(0), 2
    )
    assert finetuned(numbers(), step=3, tokens=tokens).experts_TK.tolist() == expected
    with pytest.raises(ValueError, match="routes by token ids"):
        evaluated(numbers())


@pytest.mark.parametrize("cut", [2, SWITCH, SWITCH + 1, SWITCH + 3])
def test_resuming_in_either_stage_and_at_the_switch_is_bit_equal(cut):
    whole, begun, resumed = small(), small(), small()
    optimizer, other = adam(begun), adam(resumed)
    expected = train(whole, adam(whole), range(SWITCH + 6))
    found = train(begun, optimizer, range(cut))
    resumed.load_state_dict(begun.state_dict())
    other.load_state_dict(optimizer.state_dict())
    found += train(resumed, other, range(cut, SWITCH + 6))
    assert found == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("step", [0, SWITCH])
def test_recomputed_passes_agree(step, reentrant):
    def layer(router, x_TD):
        routing = router(x_TD, step=step, tokens=words())
        return (routing.weights_TK * x_TD[:, :2]).sum() + sum(routing.losses.values())

    results = []
    for recompute in (False, True):
        router, x_TD = small(), numbers().requires_grad_()
        total = (
            checkpoint(partial(layer, router), x_TD, use_reentrant=reentrant)
            if recompute
            else layer(router, x_TD)
        )
        total.backward()
        results.append([x_TD.grad, *(parameter.grad for parameter in router.parameters()), *router.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_run_that_goes_back_to_stage_one_distils_anew():
    router = small()
    train(router, adam(router), range(SWITCH + 2))
    old_VW = router.frozen_word_VW.clone()
    longer = small(stage1_steps=SWITCH + 5)
    longer.load_state_dict(router.state_dict())
    optimizer = adam(longer)
    train(longer, optimizer, range(SWITCH + 2, SWITCH + 5))
    assert longer.frozen_at.tolist() == [-1]
    live_VW = longer.word_VW.detach().clone()
    train(longer, optimizer, range(SWITCH + 5, SWITCH + 6))
    assert longer.frozen_at.tolist() == [SWITCH + 5]
    assert torch.equal(longer.frozen_word_VW, live_VW)
    assert not torch.equal(longer.frozen_word_VW, old_VW)


def test_freezing_again_changes_nothing_where_the_device_decides():
    """As on a GPU, the host reads no number."""
    router = small()
    router.train()

    class Elsewhere(Tensor):
        device = torch.device("meta")

    with torch.no_grad():
        router._buffers["frozen_at"] = router.frozen_at.as_subclass(Elsewhere)
        router._freeze(SWITCH)
        frozen_VW = router.frozen_word_VW.clone()
        assert torch.equal(frozen_VW, router.word_VW)
        router.word_VW.add_(1.0)
        router._freeze(SWITCH + 1)
    assert torch.equal(router.frozen_word_VW, frozen_VW)
    assert router.frozen_at.tolist() == [SWITCH]


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({}, 3),
        ({"stage1_steps": None}, 3),
        ({"stage1_steps": None, "stage1_share": 0.5}, 19),
        ({"stage1_steps": 25}, 24),
    ],
)
def test_the_switch_is_by_completed_steps(options, last):
    router = small(**options)
    assert [step for step in range(60) if not router.is_frozen(step)] == list(range(last + 1))


def test_a_first_stage_of_the_whole_run_never_ends_and_a_short_run_has_one():
    assert not small(stage1_steps=None, stage1_share=1.0).is_frozen(10**6)
    brief = small(stage1_steps=None, facts=RunFacts(train_iters=3, vocab_size=V))
    assert [brief.is_frozen(step) for step in range(3)] == [False, True, True]


@pytest.mark.parametrize("step", [0, SWITCH])
def test_permuting_experts_with_their_rows_changes_nothing_but_the_order(step):
    router, x_TD, tokens = small(), numbers(), words()
    routing = router(x_TD, step=step, tokens=tokens)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = small()
    with torch.no_grad():
        moved.centroid_ED.copy_(router.centroid_ED[order])
        moved.word_centroid_EW.copy_(router.word_centroid_EW[order])
    after = moved(x_TD, step=step, tokens=tokens)
    assert torch.equal(order[after.experts_TK], routing.experts_TK)
    torch.testing.assert_close(after.weights_TK, routing.weights_TK)
    for name, value in routing.losses.items():
        torch.testing.assert_close(after.losses[name], value)


def test_parts_of_a_micro_batch_add_up_to_the_whole():
    x_TD, tokens, cut = numbers(), words(), 4
    router = small()
    whole = router(x_TD, tokens=tokens)
    load_E = torch.bincount(whole.experts_TK.flatten(), minlength=E)
    router.over_shards = lambda values: load_E if values.numel() == E else torch.tensor([float(T)])
    rows = (slice(None, cut), slice(cut, None))
    parts = [router(x_TD[part], tokens=tokens._replace(ids_T=tokens.ids_T[part])) for part in rows]
    for name, value in whole.losses.items():
        torch.testing.assert_close(parts[0].losses[name] + parts[1].losses[name], value)


@pytest.mark.parametrize("step", [0, SWITCH])
def test_a_bfloat16_module_freezes_its_own_weights_exactly(step):
    router, tokens = small().bfloat16(), words()
    exact = small()
    with torch.no_grad():
        for one, other in zip(exact.parameters(), router.parameters(), strict=True):
            one.copy_(other)
    x_TD = numbers().bfloat16()
    found, expected = router(x_TD, step=step, tokens=tokens), exact(x_TD.float(), step=step, tokens=tokens)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    assert found.losses == expected.losses
    assert router.frozen_word_VW.dtype == torch.float32
    assert torch.equal(router.frozen_word_VW, exact.frozen_word_VW)
    (found.weights_TK.sum() + sum(found.losses.values())).backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in router.parameters())


def test_distillation_teaches_the_light_router_what_depends_on_the_word():
    """Vectors that are the words' own: the frozen ids come to be the centroids'."""
    router = small(topk=1, stage1_steps=300, balance_coeff=0.0)
    table_VD = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for step in range(300):
        tokens = words(step)
        routing = router(table_VD[tokens.ids_T], step=step, tokens=tokens)
        optimizer.zero_grad()
        routing.losses["distillation"].backward()
        optimizer.step()
    everything = Tokens(torch.arange(V), torch.arange(V), V)
    router.eval()
    routed = [router(table_VD, step=step, tokens=everything).experts_TK for step in (299, 300)]
    assert torch.equal(*routed)
    assert len(routed[0].unique()) > 1


def test_it_does_not_fold():
    with pytest.raises(NotImplementedError, match=r"stablemoe cannot be folded .* sigmoids .* token ids"):
        small().fold()


def test_options():
    make = partial(build_router, "stablemoe", hidden_size=D, num_experts=E, topk=1)
    with pytest.raises(
        ConfigError, match=r"--router\.stage1-share = 0\.5: has no effect with --router.stage1-steps 10"
    ):
        make(stage1_share=0.5, stage1_steps=10)
    assert not list(make().config.warnings(topk=1))
    assert not list(make(distillation_coeff=0.0, stage1_share=1.0).config.warnings(topk=1))
    assert "random experts" in next(make(distillation_coeff=0.0).config.warnings(topk=1))
