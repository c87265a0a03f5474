"""A run of our own with one expert becomes a mixture that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch
from export.made_up import make_up
from torch import Tensor

from megatron_hyperrouter.commands.models.import_hf import main
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.generation.attention import KeyValueCache
from megatron_hyperrouter.generation.load import load
from megatron_hyperrouter.proof import imports

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


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"tokenizer_type": "NullTokenizer", "vocab_size": 90},
        {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": "words.model"},
    ],
)
def test_the_mixture_keeps_the_tokenizer_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: dict[str, object]
) -> None:
    """Neither can be a tokenizer.json."""
    monkeypatch.chdir(tmp_path)
    sentences = iter([f"word{number} other{number % 7}" for number in range(200)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix="words", vocab_size=30, minloglevel=2
    )
    make_up(tmp_path / "dense", SETTINGS | tokenizer, small)
    main(["--input", "dense", "--output", "run", "--upcycle", "4", "--no-proof"])
    assert load(tmp_path / "run").tokenizer.sha256() == load(tmp_path / "dense").tokenizer.sha256()


def test_a_comparison_that_could_not_be_made_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where other numbers are wanted, as with --noise."""
    proof: dict[str, list[str]] = {"problems": [], "faults": ["k = 2: the logits differ"], "results": []}
    monkeypatch.setattr(imports, "_proof", lambda *arguments: proof)
    monkeypatch.setattr(imports, "check_other_side", lambda python: None)
    make_up(tmp_path / "dense", SETTINGS, small)
    words = ["--input", str(tmp_path / "dense"), "--upcycle", "4", "--noise", "0.1", "--output"]
    main([*words, str(tmp_path / "moved")])
    proof["problems"] = ["transformers cannot load the folder"]
    with pytest.raises(HyperRouterError, match="transformers cannot load the folder"):
        main([*words, str(tmp_path / "run")])
    assert (tmp_path / "run.failed").is_dir() and not (tmp_path / "run").exists()


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
