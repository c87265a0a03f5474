"""Ranks of the tests of alarms: a small model trains in its engine, and is broken in five ways.

A case: ``do`` (a function below) and its arguments.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed import serve_cases

from megatron_hyperrouter.checkpoint.weights import read_tensors
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.engines.base import Batch, RankPlace
from megatron_hyperrouter.guard.health.alarms import Alarms
from megatron_hyperrouter.model.names import is_expert, matrices
from megatron_hyperrouter.model.sharding import shard_of
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.lr import learning_rate_at

VOCABULARY = 97
BROKEN_AT = 101  # the first step that an injection changes
FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --moe-ffn-hidden-size 32 --num-experts 16 "
    "--moe-router-topk 2 --moe-aux-loss-coeff 0.01 --router.name topk --router.init-std 0.125 "
    "--init-method-std 0.08 --seq-length 64 --micro-batch-size 4 --global-batch-size 8 --train-iters 240 "
    "--lr 4e-3 --lr-warmup-iters 10 --lr-decay-style cosine --tokenizer-type NullTokenizer --vocab-size 96 "
    "--data-path unused"
).split()


def micro_batches(config: RunConfig, place: RankPlace, step: int) -> Iterator[Batch]:
    """This rank's part of a step: ids that grow by 1, 2 or 3, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    whole, size = 8, config.train.micro_batch_size
    start = torch.randint(0, VOCABULARY, (whole, 1), generator=generator)
    rows = (start + torch.randint(1, 4, (whole, 65), generator=generator).cumsum(1)) % VOCABULARY
    for first in range(place.data_rank * size, whole, place.data_size * size):
        part = rows[first : first + size]
        yield part[:, :-1].contiguous(), part[:, 1:].contiguous()


class Watched:
    """An engine with its alarms, as a run has them."""

    def __init__(self, flags: list[str]) -> None:
        ranks = int(os.environ["WORLD_SIZE"])
        self.config = parse([*FLAGS, *flags], routers=ROUTERS, world_size=ranks)
        self.engine: Any = open_engine(self.config, vocab_size=VOCABULARY)
        self.alarms = Alarms(self.engine, self.config)
        self.told: list[dict[str, Any]] = []

    def resume(self, folder: str) -> None:
        """From the checkpoint of :func:`healthy`."""
        self.engine.load(Path(folder))
        self.alarms, self.told = Alarms(self.engine, self.config), []
        self.alarms.restore(json.loads(Path(folder, "alarms.json").read_text()))

    def similarity(self) -> dict[int, float]:
        """How alike experts are, for tokens that are the same on every rank."""
        generator = torch.Generator().manual_seed(4)
        tokens_BS = torch.randint(0, VOCABULARY, (4, 64), generator=generator)
        found: dict[int, float] = self.engine.expert_similarity(tokens_BS, topk=2)
        return found

    def step(self, step: int, *, rate: float = 1.0) -> list[float]:
        """Step ``step``, from 1, with so many times its learning rate."""
        result = self.engine.train_step(
            micro_batches(self.config, self.engine.place, step),
            step=step - 1,
            learning_rate=rate * learning_rate_at(step, self.config.optimizer, self.config.train.train_iters),
        )
        self.alarms.after(step, result, lambda event, at, **facts: self.told.append({"step": at, **facts}))
        return [result.lm_loss, result.grad_norm]


def healthy(folder: str, flags: list[str]) -> list[dict[str, Any]]:
    """All steps before an injection, and a checkpoint with the charts; what alarms there were."""
    run = Watched(flags)
    for step in range(1, BROKEN_AT):
        run.step(step)
    place = Path(folder)
    place.mkdir(parents=True)
    run.engine.save(place)
    (place / "alarms.json").write_text(json.dumps({"alarms": run.alarms.state()}))
    run.engine.close()
    return run.told


def broken(folder: str, flags: list[str], ways: list[str]) -> dict[str, Any]:
    """From the checkpoint of :func:`healthy` on, each of the ways to break a run: the alarms of the first
    step that gives any, of 20; and how alike experts are before and after.
    """
    found = {}
    run = Watched(flags)
    for way in ways:
        run.resume(folder)
        before = run.similarity()
        INJECTIONS[way](run, Path(folder))
        after = run.similarity()
        for step in range(BROKEN_AT, BROKEN_AT + 20):
            run.step(step, rate=30.0 if way == "learning rate" and step < BROKEN_AT + 10 else 1.0)
            if run.told:
                break
        found[way] = {"alarms": run.told, "similarity": [before, after]}
    run.engine.close()
    return found


def raised(folder: str, flags: list[str]) -> dict[str, Any]:
    """An alarm raises the balance loss; a run that continues from a checkpoint after it is the same run."""
    run = Watched(flags)
    run.resume(folder)
    popular_expert(run, Path(folder))
    step = BROKEN_AT
    while not run.told:
        run.step(step)
        step += 1
    place = Path(folder) / f"raised-{run.config.engine.engine}"
    place.mkdir()
    run.engine.save(place)
    kept = json.dumps({"alarms": run.alarms.state()})
    coefficients = [{router.aux_loss_coeff for router in run.engine.routers.values()}]
    steps = [run.step(step)]
    run.engine.set_aux_loss_coeff(0.0)
    run.engine.load(place)
    run.alarms.restore(json.loads(kept))
    coefficients.append({router.aux_loss_coeff for router in run.engine.routers.values()})
    steps.append(run.step(step))
    run.engine.close()
    return {"alarms": run.told, "coefficients": [sorted(each) for each in coefficients], "steps": steps}


# ----------------------------------------------------------------------------------- five ways to break a run
def unbalanced(run: Watched, folder: Path) -> None:
    """A balance loss of the wrong sign."""
    run.engine.set_aux_loss_coeff(-1.0)


def equal_experts(run: Watched, folder: Path) -> None:
    """All experts of a layer are its first one, but for 0.1 %."""
    with rewritten(run), torch.no_grad():
        for name, matrix in matrices(run.engine.holding().named):
            if is_expert(name):
                first = re.sub(r"local_experts\.\d+\.", "local_experts.0.", name)
                (whole,) = read_tensors(folder, [first]).values()
                noise = keyed.normal(tuple(whole.shape), seed=1, name=name)
                almost = whole * (1 + 1e-3 * noise)
                shard = shard_of(name)
                matrix.copy_(almost if shard is None else shard.cut(almost))


def hot_router(run: Watched, folder: Path) -> None:
    """Router weights ten times as large."""
    with rewritten(run), torch.no_grad():
        for router in run.engine.routers.values():
            router.weight_ED.mul_(10.0)


def popular_expert(run: Watched, folder: Path) -> None:
    """The first expert's row turns to what all tokens have in common."""
    layers = run.config.model.num_layers
    sums = torch.zeros(layers, run.config.model.hidden_size + 1)

    def look(router: Any, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        sums[router.layer_number - 1] += torch.cat(
            [inputs[0].sum(0), inputs[0].new_full((1,), len(inputs[0]))]
        )

    hooks = [router.register_forward_hook(look) for router in run.engine.routers.values()]
    run.engine.evaluate(micro_batches(run.config, run.engine.place, BROKEN_AT), topk=2)
    for hook in hooks:
        hook.remove()
    dist.all_reduce(sums)
    with rewritten(run), torch.no_grad():
        for router in run.engine.routers.values():
            *total, count = sums[router.layer_number - 1]
            router.weight_ED[0] += 0.5 * torch.stack(total) / count


def nothing(run: Watched, folder: Path) -> None:
    """The learning rate is changed in the steps, or nothing is."""


INJECTIONS = {
    "unbalancing loss": unbalanced,
    "equal experts": equal_experts,
    "router x 10": hot_router,
    "popular expert": popular_expert,
    "learning rate": nothing,
}


@contextmanager
def rewritten(run: Watched) -> Iterator[None]:
    """Inside, weights are changed; the optimizer's copies follow."""
    yield
    run.engine.take_weights_over()
    run.engine.weights_changed()


if __name__ == "__main__":
    serve_cases(lambda case: globals()[case.pop("do")](**case))
