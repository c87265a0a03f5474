"""A model of your own with DeepSpeed's MoE layers, routed by HyperRouter; any number of ranks, each holds its
share of the experts.

python examples/library/deepspeed_moe.py     or     deepspeed --num_gpus 2 examples/library/deepspeed_moe.py
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from torch import Tensor, nn

from megatron_hyperrouter import RouterSteps, plug_into_deepspeed
from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.engines.world import backend, single_rank_without_launcher

STEPS, VOCABULARY, WIDTH, EXPERTS = 60, 50, 32, 4


class Model(nn.Module):
    """Predicts the successor of a token."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList()
        for number in (1, 2):
            expert = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
            moe = MoE(WIDTH, expert, num_experts=EXPERTS, ep_size=ep_size, drop_tokens=False)
            # The one line that is new.  k grows from 1 to 2; without `topk` it would be the k of the MoE
            # layer.
            plug_into_deepspeed(
                moe, "hyper", seed=1234, layer_number=number, topk=lambda step: 1 if step < STEPS // 2 else 2
            )
            self.layers.append(moe)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the sum of the layers' balance losses."""
        hidden, balance = self.embedding(tokens), torch.zeros((), device=tokens.device)
        for moe in self.layers:
            out, loss, _ = moe(hidden)
            hidden, balance = hidden + out, balance + loss
        return self.head(hidden), balance


def main() -> None:
    """Train, and print a loss that falls from ln 50 = 3.9."""
    single_rank_without_launcher()  # plain `python` is one rank of one
    skip_shm_build()  # on a CPU, start without DeepSpeed's compiler
    deepspeed.init_distributed(backend(), verbose=False)
    torch.manual_seed(0)
    model = Model(ep_size=min(torch.distributed.get_world_size(), EXPERTS))
    optimizer = torch.optim.AdamW(split({"params": list(model.parameters()), "name": "all"}), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(torch.distributed.get_rank())
    steps = RouterSteps(engine.module, batch_first=True)
    for step in range(STEPS):
        steps.begin(step)  # k follows the completed steps
        tokens = torch.randint(VOCABULARY, (8, 16), device=engine.device)
        logits, balance = engine(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), (7 * tokens + 3).flatten() % VOCABULARY)
        engine.backward(loss + 0.01 * balance)
        engine.step()
        chosen = steps.end()
        if torch.distributed.get_rank() == 0 and (step + 1) % 10 == 0:
            fullest = max(chosen["load_max_over_mean"])
            print(
                f"step {step + 1}: loss {loss.item():.4f}, balance {balance.item() / 2:.4f}, fullest "
                f"{fullest:.2f}",
                flush=True,
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
