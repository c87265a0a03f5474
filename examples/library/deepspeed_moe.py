"""Use HyperRouter in the MoE layers of your own DeepSpeed model.

This example runs on any number of ranks. The ranks divide the experts among themselves.

python examples/library/deepspeed_moe.py                    # one rank
deepspeed --num_gpus 2 examples/library/deepspeed_moe.py    # two ranks
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
    """Predicts the next token from one token."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList()
        for number in (1, 2):
            expert = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
            moe = MoE(WIDTH, expert, num_experts=EXPERTS, ep_size=ep_size, drop_tokens=False)
            # This call is the only change to a model that uses DeepSpeed's MoE. It replaces the router of
            # the layer. `topk` makes k, the number of active experts per token, grow from 1 to 2. Without
            # `topk`, the router uses the k of the MoE layer.
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
    """Train, and print the loss. It starts at about ln 50 = 3.9, the loss of random guesses, and falls."""
    single_rank_without_launcher()  # with plain `python`, this process is the only rank
    skip_shm_build()  # on a CPU, DeepSpeed would compile an extension at the start, which needs a compiler
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
        steps.begin(step)  # tells the routers how many steps are completed; k depends on this number
        tokens = torch.randint(VOCABULARY, (8, 16), device=engine.device)
        logits, balance = engine(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), (7 * tokens + 3).flatten() % VOCABULARY)
        engine.backward(loss + 0.01 * balance)
        engine.step()
        chosen = steps.end()  # statistics of the step: one value for each layer
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
