"""One scale for each layer: outputs get the size that they have at the trained k."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter import build_router
from megatron_hyperrouter.analysis.jacobian import Experts
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.evaluate.calibration import apply, calibrate
from megatron_hyperrouter.evaluate.words import word_perplexity, words_per_token

T, D, E, F = 40, 8, 6, 12


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Chain:
    """Two MoE layers, one after the other, as plain loops."""

    def __init__(self) -> None:
        self.routers = [
            build_router("topk", hidden_size=D, num_experts=E, topk=4, layer_number=n, init_std=0.5).eval()
            for n in (1, 2)
        ]
        self.experts = {n: Experts(drawn(E, 2 * F, D, seed=n), drawn(E, D, F, seed=9 + n)) for n in (1, 2)}
        self.sizes: list[float] = []

    def run(self, k: int) -> Tensor:
        x_TD, self.sizes = drawn(T, D, seed=5), []
        with torch.no_grad():
            for router in self.routers:
                routing = router(x_TD, topk=k)
                rows = []
                for x, weights, experts in zip(x_TD, routing.weights_TK, routing.experts_TK, strict=True):
                    outputs = [self.experts[router.layer_number].one(int(e), x[None])[0] for e in experts]
                    rows.append(sum(w * y for w, y in zip(weights, outputs, strict=True)))
                output_TD = torch.stack(rows)
                self.sizes.append(math.sqrt(sum(v * v for row in output_TD.tolist() for v in row) / (T * D)))
                x_TD = x_TD + output_TD
        return x_TD


@pytest.mark.parametrize("k", [1, 2, 6])
def test_every_layer_has_the_size_that_it_has_at_the_trained_k(k: int) -> None:
    chain = Chain()
    chain.run(4)
    wanted, plain = chain.sizes, chain.run(k)
    factors = calibrate(chain.routers, chain.experts.__getitem__, chain.run, trained=4, topk=k)
    with apply(chain.routers, factors):
        chain.run(k)
    assert chain.sizes == pytest.approx(wanted, rel=1e-5)
    assert (factors[1] < 1) == (k < 4)  # fewer experts make a larger mean of unrelated vectors
    assert torch.equal(chain.run(k), plain)  # nothing is left behind


def test_the_trained_k_needs_no_scale() -> None:
    chain = Chain()
    factors = calibrate(chain.routers, chain.experts.__getitem__, chain.run, trained=4, topk=4)
    assert list(factors.values()) == [1.0, 1.0]


def test_perplexity_of_words() -> None:
    """Three tokens a word: a token's loss counts three times."""
    assert word_perplexity(math.log(2.0), 1 / 3) == pytest.approx(8.0)
    assert word_perplexity(1000.0, 1.0) == math.inf


def test_words_are_those_of_the_manifests(tmp_path: Path) -> None:
    from dataclasses import replace

    from megatron_hyperrouter.data.store.manifest import FileSum, Manifest, write_manifest

    sums = FileSum(1, "0" * 64)
    manifest = Manifest(1, 1, 90, "uint16", sums, sums, {}, {}, [], "1/1", words=20)
    write_manifest(str(tmp_path / "a"), manifest)
    write_manifest(str(tmp_path / "b"), replace(manifest, tokens=10, words=30))
    write_manifest(str(tmp_path / "old"), replace(manifest, words=0))
    names = {name: str(tmp_path / name) for name in ("a", "b", "old", "foreign")}
    blend = DataConfig(data_path=("0.5", names["a"], "0.5", names["b"]))
    assert words_per_token(blend, "test") == 50 / 100
    assert words_per_token(DataConfig(test_data_path=(names["a"],)), "test") == 20 / 90
    assert words_per_token(DataConfig(data_path=(names["a"], names["old"])), "test") is None
    assert words_per_token(DataConfig(data_path=(names["foreign"],)), "test") is None
    assert words_per_token(DataConfig(), "test") is None
