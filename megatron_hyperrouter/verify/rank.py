"""One rank of mhr verify: trains each case of its task and writes its results.

The tool starts it with RANK, LOCAL_RANK and WORLD_SIZE and two arguments, the task and the answer (JSON);
under a launcher, the tool calls ``run_cases`` itself.  A case: ``settings`` (YAML file), ``steps``,
``folder`` for weights, ``fault``, and ``own_data``: the data of the settings instead of random tokens.
Each case runs twice, for gradients (see ``verify.differences``) and for losses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_hyperrouter.verify import faults

if TYPE_CHECKING:
    from torch.distributed import Store

    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.stream.dataset import Dataset
    from megatron_hyperrouter.engines.base import Batch, Engine, RankPlace, StepResult


class World(NamedTuple):
    """This rank among those that run the cases; they meet in ``store``."""

    rank: int
    size: int
    store: Store
    patience: timedelta


def main() -> None:
    """The task of this process."""
    import torch.distributed as dist

    task_file, answer = (Path(argument) for argument in sys.argv[1:])
    task = json.loads(task_file.read_text(encoding="utf-8"))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A file, because a port that is free now may be taken when the ranks have imported their libraries
    store = dist.FileStore(str(task_file.parent / f"store-{size}"), size)
    told = run_cases(task["cases"], World(rank, size, store, timedelta(seconds=task["timeout"])))
    if rank == 0:
        answer.write_text(json.dumps(told), encoding="utf-8")


def run_cases(cases: Sequence[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    """Run all cases in one process, so that the hosts are imported once; returns the results of each."""
    import torch

    torch.set_num_threads(1)
    return [run_case(case, world, name=f"{world.size}-{number}") for number, case in enumerate(cases)]


def run_case(case: dict[str, Any], world: World, name: str) -> dict[str, Any]:
    """The numbers of its steps, and the frozen parts of each rank's routers."""
    import torch.distributed as dist

    folder = Path(case["folder"])
    probe = _OpenEngine(case, "gradients", world, f"{name}-gradients")
    with probe as engine:
        _save(engine, folder / "before")
        probe.step(engine, case["steps"] - 1)  # not the first k: with k = 1 a router may have no gradient
        _save(engine, folder / "after")
    run = _OpenEngine(case, "settings", world, f"{name}-settings")
    with run as engine:
        routers: list[Any] = [None] * engine.place.world_size
        dist.all_gather_object(routers, _frozen_parts(engine))
        steps = [run.step(engine, step) for step in range(case["steps"])]
        _save(engine, folder / "last")
    numbers = [
        {"lm_loss": step.lm_loss, "aux_loss": step.aux_loss, "grad_norm": step.grad_norm} for step in steps
    ]
    return {"steps": numbers, "routers": routers}


class _OpenEngine:
    """An engine in a separate world: ending it frees the threads of all its process groups."""

    def __init__(self, case: dict[str, Any], settings: str, world: World, name: str) -> None:
        from megatron_hyperrouter.config.cli import load_file
        from megatron_hyperrouter.routers import ROUTERS

        self.config = load_file(case[settings], routers=ROUTERS, world_size=world.size)
        self.vocab_size, self.eod, self.dataset = read_data(self.config, case["steps"], own=case["own_data"])
        self.world, self.name, self.fault = world, name, case["fault"]
        self._around = faults.around(self.fault, self.config)

    def __enter__(self) -> Engine:
        from megatron_hyperrouter.engines import open_engine

        join(self.world, self.name)
        self._around.__enter__()
        own = faults.settings_with(self.fault, self.config, rank=self.world.rank, world_size=self.world.size)
        self.engine = open_engine(own, vocab_size=self.vocab_size, eod=self.eod)
        faults.inside(self.fault, self.config, self.engine)
        return self.engine

    def __exit__(self, *error: Any) -> None:
        import torch.distributed as dist

        self.engine.close()
        self._around.__exit__(None, None, None)
        dist.destroy_process_group()

    def step(self, engine: Engine, step: int) -> StepResult:
        """One step of the settings' full learning rate."""
        batches = made_up_batches if self.dataset is None else self._own_batches
        return engine.train_step(
            batches(self.config, engine.place, step), step=step, learning_rate=self.config.optimizer.lr
        )

    def _own_batches(self, config: RunConfig, place: RankPlace, step: int) -> Iterator[Batch]:
        from megatron_hyperrouter.data.stream.loader import Batches

        assert self.dataset is not None and config.train.global_batch_size is not None
        return Batches(
            self.dataset,
            micro_batch_size=config.train.micro_batch_size,
            global_batch_size=config.train.global_batch_size,
            data_rank=place.data_rank,
            data_size=place.data_size,
            start_step=step,
            num_steps=1,
            num_workers=0,
        )


def join(world: World, name: str) -> None:
    """Create torch.distributed's world for one case, and tell DeepSpeed about it if it is installed."""
    import torch.distributed as dist

    from megatron_hyperrouter.engines.world import backend

    store = dist.PrefixStore(name, world.store)
    dist.init_process_group(
        backend(), store=store, rank=world.rank, world_size=world.size, timeout=world.patience
    )
    if importlib.util.find_spec("deepspeed") is not None:
        import deepspeed

        from megatron_hyperrouter.compat.deepspeed import skip_shm_build

        skip_shm_build()
        deepspeed.init_distributed(backend(), verbose=False)


def read_data(config: RunConfig, steps: int, *, own: bool) -> tuple[int, int | None, Dataset | None]:
    """Vocabulary size, the id that ends a document if the settings separate documents, and the training
    data (None: random tokens).

    Raises the same errors as the program.
    """
    from megatron_hyperrouter.config.derived import separates_documents
    from megatron_hyperrouter.data.stream.dataset import build_splits
    from megatron_hyperrouter.data.stream.mix_schedule import mixes_of, settled
    from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of

    tokenizer = tokenizer_of(config.data)
    vocab_size = tokenizer.vocab_size
    eod = tokenizer.eod if separates_documents(config) else None
    if not own:
        return vocab_size, eod, None
    samples = steps * (config.train.global_batch_size or 0)
    model, seed = config.model, config.train.seed
    splits = build_splits(
        settled(config.data, mixes_of(config.data)),
        seq_length=model.seq_length,
        seed=seed,
        vocab_size=vocab_size,
        eod=eod,
        train_samples=samples,
        valid_samples=0,
        test_samples=0,
    )
    return vocab_size, eod, splits.train


def made_up_batches(config: RunConfig, place: RankPlace, step: int) -> Iterator[Batch]:
    """This rank's part of the global batch of ``step``, which is the same on every layout."""
    import torch

    size, seq, whole, vocab_size = (
        config.train.micro_batch_size,
        config.model.seq_length,
        config.train.global_batch_size,
        config.data.vocab_size,
    )
    assert whole is not None and vocab_size is not None  # set by the tool
    generator = torch.Generator().manual_seed(config.train.seed + 1000 + step)
    rows = torch.randint(0, vocab_size, (whole, seq + 1), generator=generator)
    for first in range(place.data_rank * size, whole, place.data_size * size):
        part = rows[first : first + size]
        yield part[:, :-1].contiguous(), part[:, 1:].contiguous()


def _save(engine: Engine, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    engine.barrier()
    engine.save(folder)
    engine.barrier()


def _frozen_parts(engine: Any) -> dict[str, str]:
    """A digest of the frozen bytes that each router of this rank uses; the stored hash is not used."""
    return {
        prefix: router.frozen_digest(engine.device)
        for prefix, router in engine.routers.items()
        if hasattr(router, "frozen_digest")
    }


if __name__ == "__main__":
    main()
