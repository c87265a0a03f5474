"""A run of our own with one expert becomes a mixture that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export.made_up import make_up
from torch import Tensor

from megatron_hyperrouter.commands.models.import_hf import main
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.generation.attention import KeyValueCache
from megatron_hyperrouter.generation.load import load

SETTINGS = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "moe_ffn_hidden_size": 48,
    "num_experts": 1,
    "moe_router_topk": 1,
    "seq_length": 32,
}


def small(shape: tuple[int, ...]) -> Tensor:
    return 0.15 * torch.randn(shape) + (len(shape) == 1)


def logits(folder: Path, k: int) -> Tensor:
    ids = torch.arange(60).view(2, 30)
    return load(folder).decoder.logits(ids, KeyValueCache(torch.zeros(2, 0, dtype=torch.bool)), topk=k)


@pytest.mark.parametrize(("qk_norm", "flags"), [(True, "--granularity 2"), (False, "--router hyper")])
def test_the_mixture_computes_the_dense_run(tmp_path: Path, qk_norm: bool, flags: str) -> None:
    make_up(tmp_path / "dense", SETTINGS | {"qk_layernorm": qk_norm}, small)
    words = ["--input", str(tmp_path / "dense"), "--output", str(tmp_path / "run"), "--upcycle", "4"]
    main([*words, "--no-proof", *flags.split()])
    expected = logits(tmp_path / "dense", 1)
    assert expected.std() > 0.3
    for k in (2, 4):
        torch.testing.assert_close(logits(tmp_path / "run", k), expected, rtol=0, atol=1e-5)


def test_a_router_that_learns_nothing_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_up(tmp_path / "dense", SETTINGS, small)
    words = ["--input", str(tmp_path / "dense"), "--output", str(tmp_path / "run"), "--upcycle", "4"]
    main([*words, "--no-proof", "--topk", "1"])
    assert "k = 1: the routing weight of the only chosen expert is always 1" in capsys.readouterr().err


def test_what_is_no_dense_run_is_refused(tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "run"), "--upcycle", "4", "--no-proof", "--input"]
    make_up(tmp_path / "mixture", SETTINGS | {"num_experts": 4}, small)
    with pytest.raises(HyperRouterError, match="the run has --num-experts 4") as error:
        main([*words, str(tmp_path / "mixture")])
    assert error.value.exit_status == 4
    make_up(tmp_path / "scaled", SETTINGS | {"router": {"name": "topk", "scaling_factor": 2.0}}, small)
    with pytest.raises(HyperRouterError, match="a routing weight other than 1"):
        main([*words, str(tmp_path / "scaled")])
    make_up(tmp_path / "biased", SETTINGS | {"add_qkv_bias": True}, small)
    with pytest.raises(
        HyperRouterError, match="upcycling does not support these settings of the run: --add-qkv-bias"
    ):
        main([*words, str(tmp_path / "biased")])
    assert not (tmp_path / "run").exists()
