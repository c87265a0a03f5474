"""megatron/: what becomes of whole commands of Megatron-LM's users, as their scripts build them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config.refused import problems_of

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.routers import ROUTERS

HERE = Path(__file__).parent
FLAGS = set((HERE / "megatron_flags.txt").read_text().split("\n", 1)[1].split())
COMMANDS = sorted((HERE / "megatron_commands").glob("*.json"))
# Of Megatron-LM's functional tests, its model zoo and ROCm's fork; with the ranks that they start.
ACCEPTED = sorted((HERE / "megatron_accepted").glob("*.json"))
RANKS = {"Mixtral-8x7B-ROCm": 64}


@pytest.fixture(scope="module")
def all_routers():
    """The real ones, for the rules on their options."""
    return ROUTERS


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize("router", ["hyper", "topk"])
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_real_command_carries_over_as_it_stands(path, router, engine, all_routers):
    words = [word for row in json.loads(path.read_text()) for word in row]
    argv = [*words, "--router.name", router, "--engine", engine]
    config = parse(argv, routers=all_routers, world_size=64)
    assert config.parallel.expert_model_parallel_size == 8
    assert (config.router.name, config.engine.engine) == (router, engine)


@pytest.mark.parametrize("path", ACCEPTED, ids=lambda path: path.stem)
def test_a_command_of_the_megatron_engine_carries_over_as_it_stands(path, all_routers):
    rows = json.loads(path.read_text())
    sizes = {row[0]: row[1:] for row in rows if row[0].endswith("-parallel-size")}
    for router in ("hyper", "topk"):
        argv = [*(word for row in rows for word in row), "--router.name", router, "--engine", "megatron"]
        parallel = parse(argv, routers=all_routers, world_size=RANKS.get(path.stem, 8)).parallel
        assert {name: [str(getattr(parallel, _setting(name)))] for name in sizes} == sizes


def _setting(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


REFUSED = sorted((HERE / "megatron_refused").glob("*.json"))
# What each command needs that is not here, beside sizes that do not fit 64 ranks.
MISSING = {
    "gpt3-175b": {"--fp16"},
    "t5": {
        *("--encoder-num-layers", "--decoder-num-layers", "--encoder-seq-length", "--decoder-seq-length"),
        *("--vocab-extra-ids", "--short-seq-prob", "--tokenizer-type"),
    },
    "llava": {
        *("--img-embedding-idx", "--use-checkpoint-args", "--valid-path"),
        *("--prompt-path", "--dataloader-save", "--pretrained-checkpoint", "--freeze-LM", "--freeze-ViT"),
        *("--patch-dim", "--img-h", "--img-w", "--dataloader-type", "--language-model-type"),
        *("--disable-vision-class-token", "--allow-missing-vision-projection-checkpoint"),
        "--tokenizer-type",
    },
    "hybrid": {
        *("--hybrid-layer-pattern", "--mamba-num-heads", "--mamba-head-dim", "--mamba-state-dim"),
        *("--mamba-num-groups", "--position-embedding-type", "--squared-relu", "--csa-window-size"),
        *("--csa-compress-ratio-for-c", "--csa-compress-ratio-for-h", "--csa-compress-rotary-base"),
        *("--o-groups", "--o-lora-rank", "--dsa-indexer-n-heads", "--dsa-indexer-head-dim"),
        *("--dsa-indexer-topk", "--dsa-indexer-loss-coeff", "--spec", "--q-lora-rank"),
    },
    # a fork of Megatron-LM with names of its own
    "deepseek-v2-lite-patch": {
        *("--dataloader-type", "--tokenizer-type", "--eval-iters", "--max-padding-length"),
        *("--extra-vocab-size", "--patch-tokenizer-type", "--dataset", "--enable-shared-expert"),
        *("--num-shared-experts", "--qk-nope-head-dim", "--qk-rope-head-dim", "--train-mode"),
        *("--kv-lora-rank", "--rotary-scaling-factor"),
    },
}
PATCHED = {"--patch-tokenizer-type", "--dataset", "--max-padding-length", "--train-mode"}
LATENT_HEADS = {"--extra-vocab-size", "--qk-nope-head-dim", "--qk-rope-head-dim"}
MISSING |= {
    "llama3-8b-fp8": {"--decoupled-lr", "--decoupled-min-lr"},
    "gpt-oss": {
        *("--quick-geglu", "--glu-linear-offset", "--activation-func-clamp-value", "--softmax-type"),
        *("--enable-gpt-oss", "--num-layers"),  # 12 layers on 8 stages
    },
    "qwen3-next": {
        *("--linear-attention-type", "--linear-attention-freq", "--linear-conv-kernel-dim"),
        *("--linear-key-head-dim", "--linear-value-head-dim", "--linear-num-key-heads"),
        *("--linear-num-value-heads", "--attention-output-gate", "--no-weight-decay-cond-type"),
        "--moe-token-dispatcher-type",  # flex, without DeepEP
    },
    "moe-muon": {"--optimizer", "--muon-momentum", "--muon-scale-mode", "--muon-extra-scale-factor"},
    "moe-sinkhorn": {"--moe-router-load-balancing-type"},
    "moonlight-patch": PATCHED | LATENT_HEADS,
    "deepseek-v3-patch": PATCHED | LATENT_HEADS,
    "qwen3-30b-patch": PATCHED | {"--padded-vocab-size"},
    # Megatron-DeepSpeed's
    "llama2-deepspeed": {
        *("--num-key-value-heads", "--data-impl", "--no-query-key-layer-scaling"),
        *("--deepspeed-config", "--zero-stage"),  # of the other engine
    },
    "pr-moe": {
        *("--fp16", "--num-experts", "--mlp-type", "--deepspeed-config", "--data-impl", "--train-tokens"),
        *("--lr-decay-tokens", "--lr-warmup-tokens", "--moe-expert-parallel-size", "--moe-loss-coeff"),
        *("--moe-train-capacity-factor", "--moe-eval-capacity-factor", "--moe-min-capacity"),
        *("--create-moe-param-group", "--no-pipeline-parallel", "--deepspeed-activation-checkpointing"),
    },
}
FITS_OTHER_RANKS = {
    *("--global-batch-size", "ranks started", "--expert-model-parallel-size", "--sequence-parallel"),
}


@pytest.mark.parametrize("path", REFUSED, ids=lambda path: path.stem)
def test_a_command_of_another_family_is_told_what_is_missing(path, all_routers):
    words = [word for row in json.loads(path.read_text()) for word in row]
    found = problems_of(all_routers, *words, "--engine", "megatron", world_size=64)
    assert {problem.field for problem in found} - FITS_OTHER_RANKS == MISSING[path.stem]
    for problem in found:
        if problem.field.removeprefix("--") in FLAGS:
            assert "did you mean" not in problem.remedy
        assert problem.remedy != "leave it out"
        if "not supported" in problem.rule:
            assert problem.remedy.startswith(("leave it out; then ", "use "))


def test_names_of_a_fork_lead_to_those_of_the_same_meaning(all_routers):
    path = HERE / "megatron_refused" / "deepseek-v2-lite-patch.json"
    words = [word for row in json.loads(path.read_text()) for word in row]
    remedies = {problem.field: problem.remedy for problem in problems_of(all_routers, *words)}
    assert "--qk-head-dim," in remedies["--qk-nope-head-dim"]
    assert "--qk-pos-emb-head-dim," in remedies["--qk-rope-head-dim"]
    assert "--moe-shared-expert-intermediate-size" in remedies["--enable-shared-expert"]
    assert "starts from existing weights with --finetune" in remedies["--train-mode"]


def test_names_of_megatron_deepspeed_lead_to_those_of_the_same_meaning(all_routers):
    path = HERE / "megatron_refused" / "pr-moe.json"
    words = [word for row in json.loads(path.read_text()) for word in row]
    remedies = {problem.field: problem.remedy for problem in problems_of(all_routers, *words)}
    for name, ours in (
        ("--moe-loss-coeff", "--moe-aux-loss-coeff"),
        ("--moe-expert-parallel-size", "--expert-model-parallel-size"),
        ("--moe-train-capacity-factor", "--moe-expert-capacity-factor"),
        ("--train-tokens", "--train-samples"),
        ("--lr-warmup-tokens", "--lr-warmup-samples"),
        ("--deepspeed-activation-checkpointing", "--recompute-granularity full"),
        ("--data-impl", "leave it out"),
    ):
        assert ours in remedies[name]


class TestDefaults:
    def test_a_command_that_leaves_the_model_to_megatron_lms_defaults(self, all_routers):
        """GPT-3's, as it would start once --fp16 is --bf16: a dense model with GELU and learned positions."""
        path = HERE / "megatron_refused" / "gpt3-175b.json"
        words = [word for row in json.loads(path.read_text()) for word in row]
        words[words.index("--fp16")] = "--bf16"
        notes: list[str] = []
        parse([*words, "--sequence-parallel"], routers=all_routers, notes=notes, world_size=128)
        (model,) = (note for note in notes if "builds a different model than in Megatron-LM" in note)
        for name in ("num-experts", "swiglu", "normalization", "disable-bias-linear", "ffn-hidden-size"):
            assert f"without --{name}, Megatron-LM uses " in model
        (training,) = (note for note in notes if "trains differently than in Megatron-LM" in note)
        assert (
            "without --hidden-dropout, Megatron-LM uses dropout 0.1 and this program uses no dropout"
            in training
        )
        assert "--lr-decay-style" not in training

    @pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
    def test_a_command_that_says_what_it_means(self, path, all_routers):
        words = [word for row in json.loads(path.read_text()) for word in row]
        notes: list[str] = []
        parse(words, routers=all_routers, world_size=64, notes=notes)
        assert not [note for note in notes if "builds a different model" in note]

    def test_settings_of_our_own_say_nothing(self, all_routers):
        notes: list[str] = []
        parse(["--data-path", "a", "--train-iters", "3"], routers=all_routers, notes=notes)
        assert "Megatron-LM" not in " ".join(notes)
