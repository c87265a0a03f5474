"""A run that is killed and continues with other data, batch size and ranks reads each token once, and equals
the run of one process.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from program.launched import Zygote, metrics
from program.settings import SEQ, flags_of, write_numbers
from program.test_program_killed import killed_at

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

pytestmark = pytest.mark.processes
SETTINGS = (
    "--router.name hyper --moe-router-topk 2 --adam-eps 1e-4 --tokenizer-type NullTokenizer --vocab-size "
    "960 --split 1 --eval-interval 0 "
    "--data-index on-demand"
).split()
SAVED, LAST = 3, 12  # steps
# tokens before and after the change of the batch from 8 to 4
FIRST, SECOND = (
    SAVED * 8 * SEQ,
    (LAST - SAVED) * 4 * SEQ,
)


@pytest.mark.parametrize(
    ("before", "after", "layout"),
    [
        (1, 2, "--zero-stage 1"),
        (2, 1, "--zero-stage 2"),
        (1, 2, "--zero-stage 0"),
        (2, 1, "--engine megatron"),
    ],
)
def test_each_token_is_read_once_on_any_number_of_ranks(
    zygote: Zygote, tmp_path: Path, before: int, after: int, layout: str
) -> None:
    # Half of what follows is of each file, so that both have been read to their ends.
    ones = write_numbers(tmp_path / "ones", range(FIRST + SECOND // 2))
    others = write_numbers(tmp_path / "others", range(FIRST + SECOND // 2, FIRST + SECOND))
    words = [*SETTINGS, *layout.split()]
    killed_at(
        [SAVED + 1],
        zygote,
        flags_of(ones, tmp_path / "run", layout=words),
        tmp_path / "run",
        random.Random(0),
        ranks=before,
        noted="read",
    )
    first = inputs(zygote, FIRST // SEQ)
    runs = {1: tmp_path / "run", 2: tmp_path / "copy"}
    shutil.copytree(runs[1], runs[2])
    read = {}
    for ranks, run_dir in runs.items():
        flags = flags_of(
            ones,
            run_dir,
            "--load",
            run_dir,
            "--data-path",
            0.5,
            ones,
            0.5,
            others,
            "--global-batch-size",
            4,
            layout=words,
        )
        job = zygote.run(flags, ranks=ranks, noted="read")
        read[ranks] = inputs(zygote, 10**9)
        changed = (
            f"the number of ranks was {before} in the checkpoint and is now {ranks}: the optimizer "
            "state is redistributed"
        )
        assert job.stdout.count(changed) == (ranks != before)
        assert (
            job.stdout.count(
                "was 8 in the checkpoint and is now 4: the run continues with data that it has not read"
            )
            == 1
        )
    assert read[1] == read[2]
    assert first + read[after] == Counter(range(FIRST + SECOND))
    told, expected = metrics(runs[2]), metrics(runs[1])
    assert [record["step"] for record in told] == list(range(1, LAST + 1))
    assert told == [pytest.approx(record, rel=1e-5) for record in expected]
    one, two = (run_dir / f"checkpoints/step_{LAST:07d}" for run_dir in runs.values())
    names = weight_names(one)
    weights, wanted = read_tensors(two, names), read_tensors(one, names)
    assert max(float((weights[name].double() - wanted[name].double()).abs().max()) for name in names) <= 1e-5


def inputs(zygote: Zygote, samples: int) -> Counter[int]:
    """The tokens of the last job's samples, those of its steps that a kill undid left out."""
    counts = Counter[int]()
    for path in (zygote.folder / f"job-{zygote.jobs}" / "read").iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            start, rows = json.loads(line)
            if start < samples:
                counts.update(token for row in rows for token in row)
    return counts
