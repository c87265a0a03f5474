"""One rank of the layout tests: trains each case of the task for a few steps on made-up tokens and reports
what it saw.

A case: ``flags`` of the program (``bare``: all of them), and optionally ``steps`` and the ``first`` of them,
``load`` (a folder) or ``load_weights``, ``watch``, ``save_at`` (a step), ``folder`` for its weights,
``topk_eval``, ``resume``, ``count`` (how often modules run in the steps), ``flips`` (pairs of a rank and the
end of a weight's name: what is told of the replicas when a bit of it is flipped there), and ``probe``: at
which weights (``start``; ``whole``: with their optimizer) and with the k of which ``step`` it tells
gradients, in ``folder/probed``.  ``refused``: only why ``load`` was refused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed import serve_cases
from engines.watched import Watched, counted

from megatron_hyperrouter.checkpoint.weights import Reader
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.derived import separates_documents
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.store.token_files import IndexedWriter
from megatron_hyperrouter.data.stream.dataset import Builder
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.engines.base import Batch, Engine, RankPlace
from megatron_hyperrouter.engines.saved.pieces import weights
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.routers.frozen import FrozenRouter

VOCABULARY = 61
# ends a document, where the settings mind documents; ids from 54 on become it, so that samples have several
EOD = 60
# A step of Adam whose epsilon drowns its normalisation tells gradients: weight -= SCALE x gradient.  SCALE is
# so large that the weight itself, to which the result is rounded, does not matter.
SCALE = 2.0**20
DROWNING_EPSILON = 1e6
PROBE_TOKENS = 98  # the step whose tokens are those of the probe
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --moe-ffn-hidden-size 48 "
    "--seq-length 16 --num-experts 4 "
    "--qk-layernorm "
    "--make-vocab-size-divisible-by 8 --init-method-std 0.06 --lr 3e-3 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 10 "
    "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --data-path unused --tokenizer-type NullTokenizer "
    "--vocab-size 61"
).split()


def tiny_config(flags: list[str], world_size: int = 1, *, bare: bool = False) -> RunConfig:
    """The settings of a case; ``bare``: its flags say all."""
    return parse(flags if bare else [*TINY, *flags], routers=ROUTERS, world_size=world_size)


def micro_batches(config: RunConfig, place: RankPlace, step: int) -> Iterator[Batch]:
    """This rank's part of the global batch of ``step``, which is the same on every layout."""
    size, seq = config.train.micro_batch_size, config.model.seq_length
    whole = config.train.global_batch_size or size * place.data_size
    generator = torch.Generator().manual_seed(1000 + step)
    if config.data.pack_documents:
        rows = packed_rows(config, whole, generator)
    else:
        rows = torch.randint(0, VOCABULARY, (whole, seq + 1), generator=generator)
    if separates_documents(config):
        rows[rows >= 54] = EOD
    for first in range(place.data_rank * size, whole, place.data_size * size):
        part = rows[first : first + size]
        yield part[:, :-1].contiguous(), part[:, 1:].contiguous()


def packed_rows(config: RunConfig, count: int, generator: torch.Generator) -> torch.Tensor:
    """The first samples of a file of made-up documents, from 1 token to more than a sample holds, as the
    program packs them.
    """
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(f"{folder}/made-up", np.int32) as writer:
            for size in torch.randint(
                0, 2 * config.model.seq_length, (4 * count,), generator=generator
            ).tolist():
                writer.add_document([*torch.randint(0, 54, (size,), generator=generator).tolist(), EOD])
        data = replace(config.data, data_path=(), train_data_path=(f"{folder}/made-up",))
        builder = Builder(data, config.model.seq_length, config.train.seed, VOCABULARY, IndexCache(), eod=EOD)
        packed = builder.build(0, count)
        assert packed is not None
        return torch.from_numpy(np.stack([packed[i] for i in range(count)]))


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Train the case and tell its numbers."""
    config = tiny_config(case["flags"], world_size, bare=case.get("bare", False))
    engine = open_engine(config, vocab_size=VOCABULARY, eod=EOD)
    try:
        with counted(case.get("count", False)) as calls:
            told = train(engine, config, case)
        if strays := engine.deviations():
            raise AssertionError(f"{case['flags']}: replicas differ: {strays}")
        frozen = [part.nbytes for each in frozen_routers(engine) for part in each.frozen.tensors]
        flipped = [flip(engine, rank, end) for rank, end in case.get("flips", ())]
        shapes = engine.shapes() if case.get("shapes") else None
        evaluations = {}
        for topk in case.get("topk_eval", ()):
            result = engine.evaluate(micro_batches(config, engine.place, 99), topk=topk)
            evaluations[topk] = result.loss_sum / result.tokens
        if case.get("refused"):
            return {"steps": told, "evaluations": {}}
        if (folder := case.get("folder")) and "save_at" not in case:
            save(engine, Path(folder))
        if case.get("resume"):
            told += resume(engine, config, Path(case["folder"]), len(told))
        if asked := case.get("probe"):
            engine.load(Path(asked["start"]), weights_only=not asked.get("whole"))
            probe(engine, config, asked["step"])
            save(engine, Path(case["folder"]) / "probed")
    finally:
        engine.close()
    seen = {
        "frozen": sum(frozen),
        "read": case.get("read"),
        "shapes": shapes,
        "flipped": flipped,
        "calls": calls,
    }
    return {"steps": told, "evaluations": evaluations, **seen}


def frozen_routers(engine: Engine) -> list[FrozenRouter]:
    """Those of this rank."""
    return [each for each in engine.routers.values() if isinstance(each, FrozenRouter)]


def flip(engine: Any, rank: int, end: str) -> list[Any]:
    """What is told of the replicas while one bit of a weight is flipped on one rank."""
    held = weights(engine.holding()) if engine.place.rank == rank else ()
    tensor = next((tensor for name, tensor in held if name.endswith(end)), torch.zeros(4))
    bits = tensor.view(torch.int32).view(-1)
    bits[3] ^= 1
    found = engine.deviations()
    bits[3] ^= 1
    return [[stray.name, stray.ranks, stray.others, stray.sure] for stray in found]


def train(engine: Engine, config: RunConfig, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's steps; ``watch``: with what a step did as seen from outside the engine."""
    if folder := case.get("load") or case.get("load_weights"):
        read = load(engine, Path(folder), weights_only="load" not in case)
        if case.get("refused"):
            return [{"refused": read}]
        case["read"] = read
    watched = Watched(engine) if case.get("watch") else None
    told = []
    first = case.get("first", 0)
    for step in range(first, first + case.get("steps", 3)):
        told.append(step_numbers(engine, config, step))
        if watched:
            told[-1]["watched"] = watched.take()
        if step + 1 == case.get("save_at"):
            save(engine, Path(case["folder"]))
    return told


def load(engine: Any, folder: Path, *, weights_only: bool) -> str | float:
    """Load; returns why it was refused, or how much was read, of what this rank holds (of any rank, the
    most).
    """
    read, part = [0], Reader.part

    def counted(reader: Reader, *where: Any) -> torch.Tensor:
        found = part(reader, *where)
        read[0] += found.nbytes
        return found

    Reader.part = counted  # type: ignore[method-assign]
    try:
        engine.load(folder, weights_only=weights_only)
    except CheckpointError as error:
        return error.message
    finally:
        Reader.part = part  # type: ignore[method-assign]
    held = sum(parameter.nbytes for _, parameter in engine.named_parameters())
    held += sum(buffer.nbytes for router in engine.routers.values() for buffer in router.buffers())
    for piece in engine.holding().pieces() if not weights_only else ():
        rounded = piece.parameter.dtype != torch.float32
        held += (3 if rounded else 2) * 4 * (piece.end - piece.start)
    worst = torch.tensor(read[0] / held)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def step_numbers(engine: Engine, config: RunConfig, step: int) -> dict[str, Any]:
    """One optimizer step."""
    result = engine.train_step(
        micro_batches(config, engine.place, step), step=step, learning_rate=config.optimizer.lr
    )
    return {
        "lm_loss": result.lm_loss,
        "aux_loss": result.aux_loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "entropy": result.layers["entropy"],
        "load": result.layers["load_max_over_mean"],
        "params_norm": result.params_norm,
    }


def save(engine: Engine, folder: Path) -> None:
    """A folder for all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    engine.barrier()
    engine.save(folder)
    engine.barrier()


def probe(engine: Any, config: RunConfig, step: int) -> None:
    """Move each weight by SCALE times its gradient, whatever Adam remembers; nothing can be trained
    afterwards.
    """
    optimizer = engine.optimizer if config.engine.engine == "megatron" else engine.host.optimizer
    for group in optimizer.param_groups:
        group.update(betas=(0.0, group["betas"][1]), eps=DROWNING_EPSILON, weight_decay=0.0)
    engine.train_step(
        micro_batches(config, engine.place, PROBE_TOKENS), step=step, learning_rate=SCALE * DROWNING_EPSILON
    )


def resume(engine: Engine, config: RunConfig, folder: Path, start: int) -> list[dict[str, Any]]:
    """Two more steps, then the same two again from the checkpoint."""
    more = [step_numbers(engine, config, step) for step in (start, start + 1)]
    engine.load(folder)
    return more + [step_numbers(engine, config, step) for step in (start, start + 1)]


def main() -> None:
    """Train each case of the task; workers that add something to the engine first end here, too."""
    serve_cases(lambda case: run_case(case, int(os.environ["WORLD_SIZE"])))


if __name__ == "__main__":
    main()
