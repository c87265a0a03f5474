"""Layouts of three sizes of model, for the comparison of the memory formula with dry runs."""

from __future__ import annotations

from typing import NamedTuple

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.planning.layouts import Candidate
from megatron_hyperrouter.routers import ROUTERS

VOCABULARY = 32_000
_COMMON = "--mock-data --tokenizer-type NullTokenizer --vocab-size 31999 --micro-batch-size 1"
SIZES = {
    "small": "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --num-query-groups 2 "
    "--moe-ffn-hidden-size 256 --seq-length 512 --num-experts 16 --moe-router-topk 4 --qk-layernorm",
    "medium": "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --num-query-groups 4 "
    "--moe-ffn-hidden-size 1024 --seq-length 2048 --num-experts 16 --moe-router-topk 2 --router.name topk",
    "large": "--num-layers 8 --hidden-size 4096 --num-attention-heads 32 --num-query-groups 8 "
    "--moe-ffn-hidden-size 14336 --seq-length 4096 --num-experts 8 --moe-router-topk 2 --router.name topk "
    "--untie-embeddings-and-output-weights",
}
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
EP4, PP2 = "--expert-model-parallel-size 4", "--pipeline-model-parallel-size 2"
MEGATRON, SPLIT, BF16 = "--engine megatron", "--use-distributed-optimizer", "--bf16"
FULL = "--recompute-granularity full"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
MOE = f"{SELECTIVE} moe"
SHARED = f"--moe-shared-expert-intermediate-size 2048 {SELECTIVE} shared_experts"
DENSE = f"--moe-layer-freq [0,1,0,1,0,1,0,1] --ffn-hidden-size 4096 {SELECTIVE} mlp"


class Laid(NamedTuple):
    size: str
    ranks: int
    flags: str
    skew: float = 1.0


LAYOUTS = {
    "small, megatron EP4": Laid("small", 8, f"{MEGATRON} {EP4} {SPLIT} {BF16}"),
    "small, megatron float32": Laid("small", 8, f"{MEGATRON} {SPLIT}"),
    "small, megatron divided": Laid("small", 8, f"{MEGATRON} {EP4} {SPLIT} {BF16} --shard-hypernetwork"),
    "small, megatron PP2": Laid("small", 8, f"{MEGATRON} {PP2} {BF16}"),
    "small, deepspeed EP4": Laid("small", 8, f"{EP4} {BF16}"),
    "small, deepspeed float32": Laid("small", 8, EP4),
    "small, deepspeed ZeRO-2": Laid("small", 8, f"--zero-stage 2 {BF16}"),
    "medium, megatron EP4": Laid("medium", 8, f"{MEGATRON} {EP4} {SPLIT} {BF16}", 1.5),
    "medium, megatron TP2 EP4": Laid("medium", 8, f"{MEGATRON} {TP2} {SP} {EP4} {SPLIT} {BF16}"),
    "medium, megatron TP2 ETP1": Laid(
        "medium", 8, f"{MEGATRON} {TP2} {SP} {EP4} --expert-tensor-parallel-size 1 {SPLIT} {BF16}"
    ),
    "medium, megatron CP2": Laid("medium", 8, f"{MEGATRON} --context-parallel-size 2 {EP4} {SPLIT} {BF16}"),
    "medium, megatron recompute": Laid("medium", 8, f"{MEGATRON} {EP4} {SPLIT} {BF16} {FULL}"),
    "medium, megatron PP2 VPP2": Laid(
        "medium", 8, f"{MEGATRON} {PP2} --virtual-pipeline-model-parallel-size 2 {SPLIT} {BF16}"
    ),
    "medium, megatron recomputes experts": Laid("medium", 8, f"{MEGATRON} {EP4} {SPLIT} {BF16} {MOE}"),
    "medium, deepspeed recomputes experts": Laid("medium", 8, f"{EP4} {BF16} {MOE}"),
    "medium, megatron recomputes its shared expert": Laid(
        "medium", 8, f"{MEGATRON} {EP4} {SPLIT} {BF16} {SHARED}"
    ),
    "medium, megatron recomputes dense layers": Laid("medium", 8, f"{MEGATRON} {EP4} {SPLIT} {BF16} {DENSE}"),
    "medium, deepspeed EP4": Laid("medium", 8, f"{EP4} {BF16}", 1.5),
    "medium, deepspeed TP2": Laid("medium", 8, f"{TP2} {SP} {EP4} {BF16}"),
    "medium, deepspeed PP2": Laid("medium", 8, f"{PP2} {EP4} {BF16}"),
    "medium, deepspeed recompute": Laid("medium", 8, f"{EP4} {BF16} {FULL}"),
    "large, megatron EP8": Laid(
        "large", 64, f"{MEGATRON} --expert-model-parallel-size 8 {SPLIT} {BF16} --micro-batch-size 1"
    ),
    "large, megatron TP2 PP2 EP8": Laid(
        "large", 64, f"{MEGATRON} {TP2} {SP} {PP2} --expert-model-parallel-size 8 {SPLIT} {BF16}"
    ),
    "large, megatron selective": Laid(
        "large",
        64,
        f"{MEGATRON} --expert-model-parallel-size 8 {SPLIT} {BF16} --recompute-granularity selective",
        1.3,
    ),
    "large, deepspeed EP8": Laid("large", 64, f"--expert-model-parallel-size 8 {BF16}"),
    "large, deepspeed EP8 recompute": Laid("large", 64, f"--expert-model-parallel-size 8 {BF16} {FULL}"),
    "large, deepspeed PP2 EP8": Laid("large", 64, f"{PP2} --expert-model-parallel-size 8 {BF16}"),
}


def candidate_of(laid: Laid) -> Candidate:
    words = [*_COMMON.split(), *SIZES[laid.size].split(), "--global-batch-size", str(4 * laid.ranks)]
    return Candidate(parse([*words, *laid.flags.split()], routers=ROUTERS, world_size=laid.ranks), laid.ranks)
