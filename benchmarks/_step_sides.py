"""One side of ``step.py``: a model in a separate process that takes whole training steps.

Reads one word per line (``step``, ``evaluate``, ``profile``) and answers each with one line of JSON; the
first answer comes after the first step.

Legend: ``B`` batch, ``S`` sequence, ``T = B * S`` tokens, ``D`` hidden size, ``F`` width of an expert.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from typing import Any, NamedTuple, Protocol, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE = 1e-4


class Sizes(NamedTuple):
    """The shape of a model and of its batch."""

    hidden: int = 256
    layers: int = 4
    experts: int = 16
    topk: int = 2
    width: int = 512  # of an expert
    heads: int = 4
    groups: int = 2  # key/value heads
    sequence: int = 256
    batch: int = 8
    vocabulary: int = 4096

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.batch * self.sequence

    @property
    def flops(self) -> float:
        """Operations of a training step: matrix products and causal attention, none of them twice."""
        head = self.hidden // self.heads
        attention = (
            2 * self.hidden * head * (2 * self.heads + 2 * self.groups) + 2 * self.sequence * self.hidden
        )
        experts = 6 * self.topk * self.hidden * self.width + 2 * self.hidden * self.experts
        output = 2 * self.hidden * self.vocabulary
        return 3.0 * self.tokens * (self.layers * (attention + experts) + output)


CASES = {
    "few wide experts": Sizes(),
    "many small experts": Sizes(layers=2, experts=64, topk=8, width=128, batch=4),
}
TINY = {"tiny": Sizes(hidden=32, layers=1, experts=4, width=16, sequence=8, batch=2, vocabulary=64)}

ON_A_GPU = {
    "mixtral": Sizes(4096, 1, 8, 2, 14336, heads=32, groups=8, sequence=4096, batch=2, vocabulary=32000),
    "qwen": Sizes(2048, 2, 128, 8, 768, heads=32, groups=4, sequence=4096, batch=2, vocabulary=151936),
}
TINY_ON_A_GPU = {
    "mixtral": Sizes(64, 1, 4, 2, 96, sequence=32, batch=2, vocabulary=512),
    "qwen": Sizes(64, 2, 16, 4, 32, sequence=32, batch=2, vocabulary=512),
}


class Side(Protocol):
    """A model with its optimizer."""

    def step(self, tokens_BS: Tensor, labels_BS: Tensor) -> float:
        """Forward, backward, clipping, AdamW; returns the loss."""
        ...

    def evaluate(self, tokens_BS: Tensor, labels_BS: Tensor) -> float:
        """The loss alone."""
        ...


def place() -> tuple[torch.device, torch.dtype]:
    """A GPU in bfloat16, or the CPU in float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


class Ours:
    """One of our engines."""

    def __init__(self, sizes: Sizes, engine: str, router: str, flags: list[str]) -> None:
        from megatron_hyperrouter.config.cli import parse
        from megatron_hyperrouter.engines import open_engine
        from megatron_hyperrouter.routers import ROUTERS

        words = (
            f"--engine {engine} --num-layers {sizes.layers} --hidden-size {sizes.hidden} "
            f"--num-attention-heads {sizes.heads} --num-query-groups {sizes.groups} --qk-layernorm "
            f"--moe-ffn-hidden-size {sizes.width} --seq-length {sizes.sequence} "
            f"--num-experts {sizes.experts} "
            f"--moe-router-topk {sizes.topk} --lr {LEARNING_RATE} --micro-batch-size {sizes.batch} "
            f"--train-iters 1000 --moe-aux-loss-coeff 0.01 --data-path unused --tokenizer-type NullTokenizer "
            f"--vocab-size {sizes.vocabulary} --router.name {router}"
        )
        flags = [*flags, "--bf16"] if place()[1] == torch.bfloat16 else flags
        config = parse([*words.split(), *flags], routers=ROUTERS, world_size=1)
        self.engine = open_engine(config, vocab_size=sizes.vocabulary)
        self.topk, self.steps = sizes.topk, 0

    def step(self, tokens_BS: Tensor, labels_BS: Tensor) -> float:
        """See :class:`Side`."""
        result = self.engine.train_step(
            iter([(tokens_BS, labels_BS)]), step=self.steps, learning_rate=LEARNING_RATE
        )
        self.steps += 1
        return result.lm_loss

    def evaluate(self, tokens_BS: Tensor, labels_BS: Tensor) -> float:
        """See :class:`Side`."""
        result = self.engine.evaluate(iter([(tokens_BS, labels_BS)]), topk=self.topk)
        return result.loss_sum / result.tokens


class Torch:
    """What a module, torch's AdamW and clipping make of a step."""

    def __init__(self, model: nn.Module, *, fused: bool) -> None:
        self.model = model.to(*place())
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=fused)

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """The mean loss of the batch."""
        loss: Tensor = self.model(tokens_BS, labels_BS)
        return loss

    def step(self, tokens_BS: Tensor, labels_BS: Tensor) -> float:
        """See :class:`Side`."""
        self.model.train()
        loss = self.loss(*(part.to(place()[0]) for part in (tokens_BS, labels_BS)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    @torch.no_grad()
    def evaluate(self, tokens_BS: Tensor, labels_BS: Tensor) -> float:
        """See :class:`Side`."""
        self.model.eval()
        return float(self.loss(*(part.to(place()[0]) for part in (tokens_BS, labels_BS))))


class Transformers(Torch):
    """transformers' Qwen3-MoE, which is the same model; ``experts``: how it computes the experts."""

    def __init__(self, sizes: Sizes, experts: str) -> None:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        config = Qwen3MoeConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.groups,
            head_dim=sizes.hidden // sizes.heads,
            moe_intermediate_size=sizes.width,
            num_experts=sizes.experts,
            num_experts_per_tok=sizes.topk,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=sizes.sequence,
            attn_implementation="sdpa",
            experts_implementation=experts,
            use_cache=False,
        )
        torch.manual_seed(0)
        super().__init__(Qwen3MoeForCausalLM(config), fused=False)

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """It shifts labels by itself, so one position less is scored."""
        loss: Tensor = self.model(input_ids=tokens_BS, labels=tokens_BS).loss
        return loss


class Floor(nn.Module):
    """The model written down with nothing around it: the least that torch needs."""

    cos_SC: Tensor
    sin_SC: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(FloorLayer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        width = sizes.hidden // sizes.heads
        angle = torch.outer(
            torch.arange(sizes.sequence).float(), 1e4 ** -(torch.arange(0, width, 2).float() / width)
        )
        self.register_buffer("cos_SC", angle.cos().repeat(1, 2))
        self.register_buffer("sin_SC", angle.sin().repeat(1, 2))

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """The mean loss."""
        x_BSD = self.embedding(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.cos_SC, self.sin_SC)
        logits = (self.norm(x_BSD) @ self.embedding.weight.t()).flatten(0, 1)
        return F.cross_entropy(logits, labels_BS.flatten())


class FloorLayer(nn.Module):
    """Attention, and experts in one grouped product."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.width = sizes, sizes.hidden // sizes.heads
        self.first, self.second = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.of_queries, self.of_keys = nn.RMSNorm(self.width), nn.RMSNorm(self.width)
        self.qkv = nn.Linear(sizes.hidden, (sizes.heads + 2 * sizes.groups) * self.width, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.router = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.up = nn.Parameter(torch.randn(sizes.experts, sizes.hidden, 2 * sizes.width) * 0.02)
        self.down = nn.Parameter(torch.randn(sizes.experts, sizes.width, sizes.hidden) * 0.02)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """``_BSD``."""
        x_BSD = x_BSD + self.attention(self.first(x_BSD), cos_SC, sin_SC)
        return x_BSD + self.experts(self.second(x_BSD).flatten(0, 1)).view_as(x_BSD)

    def attention(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        """Causal, with rotary positions."""
        heads, groups = self.sizes.heads, self.sizes.groups
        parts = (
            self.qkv(x_BSD).unflatten(-1, (-1, self.width)).transpose(1, 2).split([heads, groups, groups], 1)
        )
        query, key = (
            turned(norm(part), cos_SC, sin_SC)
            for norm, part in ((self.of_queries, parts[0]), (self.of_keys, parts[1]))
        )
        found = F.scaled_dot_product_attention(query, key, parts[2], is_causal=True, enable_gqa=True)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out

    def experts(self, x_TD: Tensor) -> Tensor:
        """Tokens sorted by expert, two grouped products, a sum by ``index_add``."""
        topk, count = self.sizes.topk, self.sizes.experts
        logits_TK, experts_TK = self.router(x_TD).topk(topk, -1)
        order_R = experts_TK.flatten().argsort(stable=True)
        ends_E = torch.bincount(experts_TK.flatten(), minlength=count).cumsum(0).int()
        gate, up = F.grouped_mm(x_TD[order_R // topk], self.up, offs=ends_E).chunk(2, -1)
        out_RD = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends_E)
        out_RD = out_RD * logits_TK.softmax(-1).flatten()[order_R].unsqueeze(1)
        return torch.zeros_like(x_TD).index_add(0, order_R // topk, out_RD)


def turned(x: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotary positions."""
    a, b = x.chunk(2, -1)
    return x * cos_SC + torch.cat([-b, a], -1) * sin_SC


def made(name: str, sizes: Sizes, flags: list[str]) -> Side:
    """The side of this name."""
    kind, _, detail = name.partition(":")
    if kind in ("deepspeed", "megatron"):
        return Ours(sizes, kind, detail or "topk", flags)
    if kind == "transformers":
        return Transformers(sizes, detail or "grouped_mm")
    return Torch(Floor(sizes), fused=True)


def batch(sizes: Sizes, number: int) -> tuple[Tensor, Tensor]:
    """Made-up tokens, the same on all sides."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.sequence + 1), generator=generator)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def shares(side: Side, sizes: Sizes) -> dict[str, Any]:
    """Where a step's time goes: percent of self time by operator, and calls of operators."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        side.step(*batch(sizes, 10**6))
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    dearest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]
    return {
        "calls": sum(event.count for event in events),
        "shares": {event.key: 100 * event.self_cpu_time_total / total for event in dearest},
    }


def peak_mib() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(name: str, sizes: Sizes, flags: list[str], out: TextIO) -> None:
    """Answer until there are no more words."""
    begin = time.process_time()
    side = made(name, sizes, flags)
    loss = side.step(*batch(sizes, 0))
    print(json.dumps({"loss": loss, "cpu": time.process_time() - begin}), file=out, flush=True)
    for number, line in enumerate(sys.stdin, 1):
        word, begin = line.strip(), time.process_time()
        if word == "profile":
            answer = shares(side, sizes)
        else:
            loss = (side.step if word == "step" else side.evaluate)(*batch(sizes, number))
            answer = {"loss": loss, "cpu": time.process_time() - begin, "peak": peak_mib()}
        print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    """Whatever a host prints goes to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("sizes")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        serve(args.name, Sizes(**json.loads(args.sizes)), args.flags, out)


if __name__ == "__main__":
    main()
