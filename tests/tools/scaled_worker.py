"""The test loss of a run whose router multiplies its weights by a factor."""

from __future__ import annotations

import sys

from megatron_hyperrouter.compat.host_logs import silence_hosts

silence_hosts()

from megatron_hyperrouter.evaluate.perplexity import loss_by_topk  # noqa: E402
from megatron_hyperrouter.evaluate.trained import TrainedRun  # noqa: E402


def main() -> None:
    run = TrainedRun.open(sys.argv[1], overrides={"router.scaling_factor": float(sys.argv[3])})
    tokenizer = run.tokenizer()
    engine = run.open_engine(tokenizer)
    run.load_into(engine)
    (row,) = loss_by_topk(engine, run.dataset(tokenizer), [int(sys.argv[2])], micro_batch_size=2)
    sys.stdout.write(f"{row['lm_loss']!r}\n")
    engine.close()


if __name__ == "__main__":
    main()
