"""The formulas of a plan against dry runs of the true engine, and dry runs against real ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from distributed import run_ranks
from engines.layout_worker import TINY
from program.launched import Zygote

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.planning.held.parameters import model_of, parameters_of_ranks
from megatron_hyperrouter.planning.layouts import Candidate
from megatron_hyperrouter.planning.verified import answers, shortened, task_of
from megatron_hyperrouter.routers import ROUTERS

VOCABULARY = 1001
WORKER = Path(__file__).with_name("real_worker.py")
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
EP2, PP2 = "--expert-model-parallel-size 2", "--pipeline-model-parallel-size 2"
ETP1, SPLIT = "--expert-tensor-parallel-size 1", "--use-distributed-optimizer"
MEGATRON = "--engine megatron"
FOUR = "--num-layers 4"


class Case(NamedTuple):
    ranks: int
    flags: str


# Every kind of layout of the tables in tests/engines, and layouts of more ranks than those can start.
DEEPSPEED = {
    "1 rank": Case(1, "--zero-stage 2"),
    "DP2": Case(2, ""),
    "EP2": Case(2, EP2),
    "TP2": Case(2, TP2),
    "TP2, expert-TP 1": Case(2, f"{TP2} {ETP1}"),
    "PP2": Case(2, PP2),
    "TP2 x EP2, expert-TP 2": Case(4, f"{TP2} {EP2}"),
    "TP2 x EP2, expert-TP 1, SP": Case(4, f"{TP2} {EP2} {ETP1} {SP}"),
    "TP2 x PP2": Case(4, f"{TP2} {PP2}"),
    "PP2 x EP2": Case(4, f"{PP2} {EP2}"),
    "PP2 of five layers": Case(4, f"{PP2} --num-layers 5"),
    "64 ranks": Case(64, f"{PP2} --expert-model-parallel-size 4 --global-batch-size 64"),
}
ON_MEGATRON = {
    "1 rank": Case(1, ""),
    "DP2": Case(2, ""),
    "EP2": Case(2, EP2),
    "TP2": Case(2, f"{TP2} {SP}"),
    "TP2, expert-TP 1": Case(2, f"{TP2} {SP} {ETP1}"),
    "PP2": Case(2, PP2),
    "PP2 x VPP2": Case(2, f"{PP2} --virtual-pipeline-model-parallel-size 2 {FOUR}"),
    "CP2": Case(2, "--context-parallel-size 2"),
    "TP2 x EP2, expert-TP 2": Case(4, f"{TP2} {SP} {EP2}"),
    "TP2 x EP2, expert-TP 1": Case(4, f"{TP2} {SP} {EP2} {ETP1}"),
    "TP2 x PP2": Case(4, f"{TP2} {SP} {PP2}"),
    "PP2 x EP2": Case(4, f"{PP2} {EP2}"),
    "64 ranks": Case(64, f"{TP2} {SP} {PP2} --expert-model-parallel-size 4 --global-batch-size 64"),
}
MODELS = {
    "shared experts, dense layers": "--moe-layer-freq [0,1,1,1] --num-layers 4 --ffn-hidden-size 40 "
    "--moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate --add-qkv-bias",
    "latent attention": "--multi-latent-attention --num-query-groups 4 --q-lora-rank 12 --kv-lora-rank 8 "
    "--qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6",
    "untied": "--untie-embeddings-and-output-weights",
    "prediction ahead": f"{MEGATRON} --mtp-num-layers 2",
    "prediction ahead, untied": f"{MEGATRON} --mtp-num-layers 1 --untie-embeddings-and-output-weights",
    "residual": "--mlp-type residual",
    **{f"router {name}": f"--router.name {name}" for name in ROUTERS},
}


def cases() -> Iterator[tuple[str, Case]]:
    for name, case in DEEPSPEED.items():
        yield f"deepspeed, {name}", case
    for name, case in ON_MEGATRON.items():
        yield f"megatron, {name}", case._replace(flags=f"{MEGATRON} {case.flags}")
    for name, flags in MODELS.items():
        for engine in ("", MEGATRON):
            if ("--mlp-type" in flags and engine) or ("--mtp" in flags and not engine):
                continue
            layout = f"{TP2} {SP} {PP2} {EP2}"
            yield f"{engine[9:] or 'deepspeed'}, {name}", Case(8, f"{engine} {layout} {FOUR} {flags}")


CASES = dict(cases())
FEW = (
    "deepspeed, TP2 x EP2, expert-TP 1, SP",
    "deepspeed, PP2 of five layers",
    "megatron, PP2 x VPP2",
    "megatron, prediction ahead",
    "megatron, router stablemoe",
    "deepspeed, latent attention",
)


def candidate(case: Case) -> Candidate:
    config = parse([*TINY, *case.flags.split()], routers=ROUTERS, world_size=case.ranks)
    return Candidate(config, case.ranks)


def built(names: Iterable[str]) -> dict[str, dict[int, int]]:
    """Parameters of the first rank of each stage, as the engine has them."""
    asked = []
    for name in names:
        laid_out = candidate(CASES[name])
        stages = laid_out.config.parallel.pipeline_model_parallel_size
        for stage in range(stages):
            rank = stage * laid_out.world_size // stages
            asked.append((name, rank, task_of(laid_out, rank, VOCABULARY, 1.0) | {"steps": 0}))
    found: dict[str, dict[int, int]] = {}
    for (name, rank, _), told in zip(asked, answers(task for _, _, task in asked), strict=True):
        assert "error" not in told, (name, told)
        found.setdefault(name, {})[rank] = told["parameters"]
    return found


def assert_parameters(name: str, found: dict[int, int]) -> None:
    laid_out = candidate(CASES[name])
    expected = parameters_of_ranks(
        model_of(laid_out.config, VOCABULARY), laid_out.config, laid_out.world_size
    )
    assert len(expected) == laid_out.world_size
    assert {rank: expected[rank] for rank in found} == found


@pytest.fixture(scope="module")
def few() -> dict[str, dict[int, int]]:
    return built(FEW)


@pytest.mark.parametrize("name", FEW)
def test_parameters_are_those_of_the_built_engine(few: dict[str, dict[int, int]], name: str) -> None:
    assert_parameters(name, few[name])


@pytest.fixture(scope="module")
def whole_table() -> dict[str, dict[int, int]]:
    return built(CASES)


@pytest.mark.by_hand
@pytest.mark.parametrize("name", CASES)
def test_parameters_of_every_layout(whole_table: dict[str, dict[int, int]], name: str) -> None:
    assert_parameters(name, whole_table[name])


# ------------------------------------------------------------------------------------- real ranks
SMALL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --num-query-groups 2 --moe-ffn-hidden-size 96 "
    "--seq-length 128 --num-experts 8 --moe-router-topk 2 --micro-batch-size 2 --global-batch-size 8 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 1000"
)
BF16 = "--bf16"
REAL = {
    "megatron, EP2, split, bf16": Case(2, f"{MEGATRON} {EP2} {SPLIT} {BF16}"),
    "deepspeed, EP2": Case(2, EP2),
    "megatron, DP2, split": Case(2, f"{MEGATRON} {SPLIT}"),
    "megatron, PP2": Case(2, f"{MEGATRON} {PP2}"),
    "megatron, PP2 x VPP2": Case(2, f"{MEGATRON} {PP2} --virtual-pipeline-model-parallel-size 2"),
    "megatron, TP2, SP": Case(2, f"{MEGATRON} {TP2} {SP}"),
    "megatron, CP2": Case(2, f"{MEGATRON} --context-parallel-size 2"),
    "megatron, EP2, recompute": Case(2, f"{MEGATRON} {EP2} --recompute-granularity full"),
    "deepspeed, DP2, ZeRO-2, bf16": Case(2, f"--zero-stage 2 {BF16}"),
    "deepspeed, DP2, bf16": Case(2, BF16),
    "deepspeed, PP2": Case(2, PP2),
    "deepspeed, TP2": Case(2, TP2),
    "deepspeed, TP2, SP, expert-TP 1": Case(2, f"{TP2} {SP} {ETP1}"),
    "deepspeed, EP2, recompute": Case(2, f"{EP2} --recompute-granularity full"),
    "megatron, EP2, as it routes": Case(2, f"{MEGATRON} {EP2}"),
    "deepspeed, EP2, as it routes": Case(2, f"{EP2}"),
}
REAL_FEW = ("megatron, EP2, split, bf16", "deepspeed, EP2")


class Both(NamedTuple):
    real: dict[str, Any]
    dry: dict[str, Any]


def compared(names: Iterable[str], zygote: Zygote, folder: Path) -> dict[str, list[Both]]:
    """Each rank of each case, real and dry with the skew that the real one had."""
    names = list(names)
    flags = [[*SMALL.split(), *REAL[name].flags.split()] for name in names]
    for words, name in zip(flags, names, strict=True):
        words += [] if "as it routes" in name else ["--moe-router-force-load-balancing"]
    real = run_ranks(zygote, WORKER, {"cases": flags}, ranks=2, folder=folder, timeout=900)
    tasks = []
    for words, ranks in zip(flags, real, strict=True):
        laid_out = Candidate(parse(words, routers=ROUTERS, world_size=2), 2)
        tasks += [
            task_of(laid_out, rank, VOCABULARY, told["skew"], whole=True) for rank, told in enumerate(ranks)
        ]
    dry = list(answers(tasks))
    return {
        name: [Both(told, dry[2 * number + rank]) for rank, told in enumerate(real[number])]
        for number, name in enumerate(names)
    }


def assert_same_memory(found: list[Both], record: Any) -> None:
    for real, dry in found:
        assert "error" not in dry, dry
        assert dry["parameters"] == real["parameters"]
        record(f"built, rank {real['rank']}", (dry["built_bytes"], real["built_bytes"]))
        assert abs(dry["built_bytes"] - real["built_bytes"]) <= 64
        for step in ("step 1", "step 2"):
            record(f"{step}, rank {real['rank']}", (dry["peaks"][step], real["peaks"][step]))
            assert dry["peaks"][step] == pytest.approx(real["peaks"][step], rel=0.05), (step, real, dry)


@pytest.fixture(scope="module")
def ranks_few(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Both]]:
    return compared(REAL_FEW, zygote, tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize("name", REAL_FEW)
def test_dry_run_has_the_memory_of_real_ranks(
    ranks_few: dict[str, list[Both]], name: str, record_property: Any
) -> None:
    assert_same_memory(ranks_few[name], record_property)


@pytest.fixture(scope="module")
def ranks_all(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Both]]:
    return compared(REAL, zygote, tmp_path_factory.mktemp("real"))


@pytest.mark.by_hand
@pytest.mark.parametrize("name", REAL)
def test_dry_runs_have_the_memory_of_real_ranks(
    ranks_all: dict[str, list[Both]], name: str, record_property: Any
) -> None:
    assert_same_memory(ranks_all[name], record_property)


def test_a_batch_that_grows_is_whole_in_a_dry_run() -> None:
    words = [*TINY, "--global-batch-size", "64"]
    config = parse([*words, "--rampup-batch-size", "4", "4", "64"], routers=ROUTERS, world_size=2)
    short = shortened(config, 16, 2)
    assert (short.train.global_batch_size, short.train.rampup_batch_size) == (8, None)
