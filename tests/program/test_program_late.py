"""No rank waits in a collective for one that builds its data: a run begins when the last rank has joined,
however long that takes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from program.launched import Zygote, metrics
from program.settings import flags_of

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("late_rank.py")
SHORT = (
    "--train-iters 2 --eval-interval 0 --save-interval 0 --expert-model-parallel-size 2 --router.name hyper"
).split()


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_a_rank_may_build_for_longer_than_a_collective_may_take(
    zygote: Zygote, text: Path, tmp_path: Path, engine: str
) -> None:
    layout = [*SHORT, "--engine", engine]
    zygote.run(flags_of(text, tmp_path / "punctual", layout=layout), ranks=2)
    job = zygote.run(flags_of(text, tmp_path / "late", layout=layout), ranks=2, program=WORKER)
    first, last = (float((job.folder / f"built-{rank}").read_text()) for rank in range(2))
    assert last - first > 10, "rank 0 was ready for longer than a collective waits"
    assert (
        "waiting for all 2 ranks to join; one of them may have exited, or may be building an index file"
        in job.stdout
    )
    assert metrics(tmp_path / "late") == metrics(tmp_path / "punctual")
    assert len(metrics(tmp_path / "late")) == 2
