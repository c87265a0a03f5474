"""One rank that counts what a training step asks of a device: operators started, numbers read by the host.

A case is flags of the program, with the word DETAILS among them for a step that shows all layer metrics; the
answer has ``launches``, ``reads`` (where each was asked for), and
``of_a_norm``: launches that an RMSNorm has here, where it is taken apart, and not on a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from distributed import world
from engines.layout_worker import VOCABULARY, micro_batches, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.engines import open_engine

# Operators that look at memory in another way, or only reserve it.
VIEWS = set(
    "view _unsafe_view t transpose permute expand slice select split split_with_sizes unbind unsqueeze "
    "squeeze detach alias as_strided chunk lift_fresh _reshape_alias empty empty_like new_empty unfold "
    "empty_strided new_empty_strided diagonal narrow view_as movedim is_same_size resize_ set_ "
    "record_stream".split()
)
# Operators whose output has a size that depends on numbers.
DATA_DEPENDENT = set(
    "nonzero masked_select _local_scalar_dense _unique2 unique_dim unique_consecutive bincount equal".split()
)
DETAILS = "DETAILS"
READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")


class Counter(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.reads: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.launches += name not in VIEWS
        if name in DATA_DEPENDENT:
            self.reads[f"{name} at {site()}"] += 1
        return func(*args, **(kwargs or {}))


def site() -> str:
    """The innermost line that is neither torch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and Path(frame.filename) != Path(__file__):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "torch"


@contextlib.contextmanager
def methods_counted(counter: Counter) -> Iterator[None]:
    """Methods that read a number of a CPU tensor without an operator, and would wait for a GPU."""
    old = {name: getattr(torch.Tensor, name) for name in READS}
    busy = False

    def counted(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            outermost, busy = not busy, True
            if outermost:
                counter.reads[f"{name} at {site()}"] += 1
            try:
                return old[name](self, *args, **kwargs)
            finally:
                busy = not outermost

        return method

    for name in READS:
        setattr(torch.Tensor, name, counted(name))
    try:
        yield
    finally:
        for name, method in old.items():
            setattr(torch.Tensor, name, method)


def audit(flags: list[str], world_size: int) -> dict[str, Any]:
    """The second step of the case."""
    detailed = DETAILS in flags
    config = tiny_config([flag for flag in flags if flag != DETAILS], world_size)
    engine = open_engine(config, vocab_size=VOCABULARY)
    try:
        for step in range(2):
            counter = Counter()
            batches = list(micro_batches(config, engine.place, step))
            with methods_counted(counter), counter:
                engine.train_step(iter(batches), step=step, learning_rate=1e-4, detailed=detailed)
    finally:
        engine.close()
    return {"launches": counter.launches, "reads": dict(counter.reads), "of_a_norm": launches_of_a_norm()}


def launches_of_a_norm() -> int:
    """Forward and backward; two of them stay where it is not taken apart."""
    norm, x = torch.nn.RMSNorm(8), torch.ones(2, 8, requires_grad=True)
    with Counter() as counter:
        torch.autograd.grad(norm(x), (x, norm.weight), torch.ones(2, 8))
    return counter.launches - 2


def main() -> None:
    """All cases of the task, each in a world of its own."""
    task, answer = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    skip_shm_build()
    told = []
    for number, flags in enumerate(json.loads(task.read_text(encoding="utf-8"))["cases"]):
        with world(str(number)):
            told.append(audit(flags, int(os.environ["WORLD_SIZE"])))
    if os.environ["RANK"] == "0":
        answer.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
