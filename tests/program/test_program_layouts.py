"""Runs on several layouts continue from a checkpoint bit for bit and are evaluated, in new processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed import REPOSITORY
from program.launched import Zygote, metrics
from program.settings import flags_of

pytestmark = pytest.mark.processes
SHORT = (
    "--train-iters 4 --save-interval 2 --eval-interval 4 --eval-iters 1 --hidden-dropout 0.1 "
    "--moe-router-topk 2"
)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "--router.name smoe_dropout --zero-stage 0"),
        (2, "--router.name topk --zero-stage 2 --expert-model-parallel-size 2 --recompute-granularity full"),
        (2, "--router.name hyper --zero-stage 1 --expert-model-parallel-size 2 --bf16"),
        (2, "--router.name hyper --pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights"),
        (
            2,
            "--router.name hyper --router.shared model --router.bias --zero-stage 1 "
            "--moe-expert-capacity-factor 1.0",
        ),
    ],
)
def test_resumes_bit_for_bit_and_is_evaluated_where_it_trained(
    zygote: Zygote, text: Path, tmp_path: Path, ranks: int, layout: str
) -> None:
    words = [*SHORT.split(), *layout.split()]
    zygote.run(flags_of(text, tmp_path / "whole", layout=words), ranks=ranks)
    middle = tmp_path / "whole/checkpoints/step_0000002"
    zygote.run(flags_of(text, tmp_path / "rest", "--load", middle, layout=words), ranks=ranks)
    whole, rest = metrics(tmp_path / "whole"), metrics(tmp_path / "rest")
    assert [line["step"] for line in rest] == [3, 4, 4, 4]
    assert rest == whole[2:]
    last = "checkpoints/step_0000004"
    names = sorted(path.name for path in (tmp_path / "whole" / last).glob("weights-*"))
    assert names and all(
        (tmp_path / "rest" / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()
        for name in names
    )
    output = tmp_path / "scores.json"
    evaluate = ["--load", tmp_path / "rest", "--topk", 2, "--eval-iters", 1, "--output", output]
    zygote.run(evaluate, program=REPOSITORY / "tools/evaluate.py", ranks=ranks)
    (score,) = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert whole[-1]["split"] == "test" and score["lm_loss"] == pytest.approx(whole[-1]["lm_loss"], rel=1e-6)
