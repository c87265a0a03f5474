"""Largest difference between experts' outputs as the engine computes them and as ``mhr analyze`` does."""

from __future__ import annotations

import sys

import torch

from megatron_hyperrouter.compat.host_logs import silence_hosts

silence_hosts()

from megatron_hyperrouter.analysis.experts import every_output_ETD, open_to_routers  # noqa: E402
from megatron_hyperrouter.analysis.trained_experts import read_experts  # noqa: E402
from megatron_hyperrouter.analysis.watching import watching  # noqa: E402
from megatron_hyperrouter.evaluate.trained import TrainedRun  # noqa: E402
from megatron_hyperrouter.routers import ROUTERS  # noqa: E402
from megatron_hyperrouter.train.metrics import score  # noqa: E402


def main() -> None:
    run = TrainedRun.open(sys.argv[1])
    tokenizer = run.tokenizer()
    with open_to_routers(ROUTERS[run.settings.router.name]):
        engine = run.open_engine(tokenizer)
    run.load_into(engine)
    routers = list(engine.routers.values())
    found = []

    def see(router, routing, x_TD, now):
        by_engine = every_output_ETD(router, x_TD, now)
        by_weights = read_experts(run.checkpoint, run.settings, router.layer_number).outputs_ETD(x_TD)
        found.append(float((by_engine - by_weights).abs().max() / by_engine.abs().max()))

    with watching(routers, see), torch.no_grad():
        score(engine, run.dataset(tokenizer), topk=2, micro_batch_size=2, num_samples=2)
    assert len(found) == len(routers) > 0
    sys.stdout.write(f"{max(found)}\n")
    engine.close()


if __name__ == "__main__":
    main()
