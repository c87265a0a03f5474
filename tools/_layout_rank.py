"""One rank of tools/verify_layouts.py: trains each case of its task on made-up tokens and leaves what it saw.

Started with RANK, LOCAL_RANK and WORLD_SIZE and two arguments, the task and the answer (JSON).  A case: ``settings`` (YAML file),
``steps``, ``folder`` for weights and ``fault``; two runs of it tell gradients (see ``evaluate.layouts``) and losses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _common  # noqa: F401 - the import path
import _layout_faults

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Batch, Engine, Place, StepResult


def main() -> None:
    """All cases in one process, so that the hosts are imported once."""
    import torch

    task_file, answer = (Path(argument) for argument in sys.argv[1:])
    task = json.loads(task_file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    told = [run_case(case, task_file.parent / f"{task['name']}-store-{number}") for number, case in enumerate(task["cases"])]
    if os.environ["RANK"] == "0":
        answer.write_text(json.dumps(told), encoding="utf-8")


def run_case(case: dict[str, Any], store: Path) -> dict[str, Any]:
    """The numbers of its steps, and the frozen parts of each rank's routers."""
    import torch.distributed as dist

    folder = Path(case["folder"])
    probe = _Run(case, "gradients", Path(f"{store}-gradients"))
    with probe as engine:
        _save(engine, folder / "before")
        probe.step(engine, case["steps"] - 1)  # not the first k: with k = 1 a router may have no gradient
        _save(engine, folder / "after")
    run = _Run(case, "settings", Path(f"{store}-settings"))
    with run as engine:
        routers: list[Any] = [None] * engine.place.world_size
        dist.all_gather_object(routers, _frozen_parts(engine))
        steps = [run.step(engine, step) for step in range(case["steps"])]
        _save(engine, folder / "last")
    numbers = [{"lm_loss": step.lm_loss, "aux_loss": step.aux_loss, "grad_norm": step.grad_norm} for step in steps]
    return {"steps": numbers, "routers": routers}


class _Run:
    """An engine in a world of its own: ending it frees the threads of all its process groups."""

    def __init__(self, case: dict[str, Any], settings: str, store: Path) -> None:
        from megatron_hyperrouter.config.cli import load_file
        from megatron_hyperrouter.routers import ROUTERS

        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.config = load_file(case[settings], routers=ROUTERS, world_size=self.world_size)
        self.store, self.fault = store, case["fault"]
        self._around = _layout_faults.around(self.fault, self.config)

    def __enter__(self) -> Engine:
        from megatron_hyperrouter.engines import open_engine

        place = {"rank": self.rank, "world_size": self.world_size}
        _join(f"file://{self.store}", **place)
        self._around.__enter__()
        own = _layout_faults.settings_with(self.fault, self.config, **place)
        vocab_size = self.config.data.vocab_size
        assert vocab_size is not None  # of the NullTokenizer
        self.engine = open_engine(own, vocab_size=vocab_size)
        _layout_faults.inside(self.fault, self.config, self.engine)
        return self.engine

    def __exit__(self, *error: Any) -> None:
        import torch.distributed as dist

        self.engine.close()
        self._around.__exit__(None, None, None)
        dist.destroy_process_group()

    def step(self, engine: Engine, step: int) -> StepResult:
        """One step of the settings' full learning rate."""
        batches = made_up_batches(self.config, engine.place, step)
        return engine.train_step(batches, step=step, learning_rate=self.config.optimizer.lr)


def _join(store: str, *, rank: int, world_size: int) -> None:
    """DeepSpeed, where it is installed, wants to have made the world itself."""
    import torch.distributed as dist

    from megatron_hyperrouter.engines.launch import backend

    if importlib.util.find_spec("deepspeed") is None:
        dist.init_process_group(backend(), init_method=store, rank=rank, world_size=world_size)
        return
    import deepspeed

    from megatron_hyperrouter.compat.deepspeed import skip_shm_build

    skip_shm_build()
    deepspeed.init_distributed(backend(), verbose=False, init_method=store, rank=rank, world_size=world_size)


def made_up_batches(config: RunConfig, place: Place, step: int) -> Iterator[Batch]:
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
    """A digest of the bytes that each router of this rank works with, not of what it says of them."""
    from megatron_hyperrouter.ops.keyed import digest

    return {
        prefix: digest([tensor.cpu() for tensor in router.frozen_tensors(engine.device)])
        for prefix, router in engine.routers.items()
        if hasattr(router, "frozen_tensors")
    }


if __name__ == "__main__":
    main()
