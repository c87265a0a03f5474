"""A dense model as a mixture of experts: copies of its MLP, or of slices of it, which together compute the
same.

The weights of a group of G slices add up to the group's share, so each slice needs a factor G: its square
root in ``up`` and in ``down``, which keeps both at the same scale.  silu is not linear, so ``gate`` keeps its
values.  The router's rows are drawn once for each group and repeated, so that top-k chooses whole
groups if k is a multiple of G.

Legend: ``E`` experts, ``G`` slices of the MLP (granularity), ``D`` hidden size, ``F`` width of an expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem
from megatron_hyperrouter.export.classes.names import ModelShape, TensorPart, join
from megatron_hyperrouter.importing.source import HfFolder
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS
from megatron_hyperrouter.ops import keyed

_EXPERT = re.compile(r"^decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.linear_(fc[12])\.weight$")
_ROUTER_STD = 0.02
_ALIKE = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
}
_QK_NORMS = {
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
}


@dataclass(frozen=True)
class UpcycleOptions:
    """How a dense model becomes a mixture."""

    experts: int
    granularity: int = 1  # slices of the MLP
    topk: int = 2
    noise: float = 0.0  # of a matrix's own standard deviation, on all groups but the first
    redraw: float = 0.0  # share of hidden units drawn anew in all groups but the first (arXiv 2502.19261)
    seed: int = 1234
    pre_softmax: bool = False  # weights that sum to k/E where the router is indifferent, not to 1

    @property
    def scale(self) -> float:
        """The factor on ``up`` and on ``down``."""
        share = self.experts / self.topk if self.pre_softmax else 1.0
        return math.sqrt(self.granularity * share)

    def problems(self, width: int) -> Iterator[Problem]:
        """Problems of these options for an MLP of this width."""
        if width % self.granularity:
            yield Problem(
                "--granularity",
                self.granularity,
                (f"must divide the MLP width, {width}"),
                f"use a divisor of {width}",
            )
        if self.experts % self.granularity:
            rule = f"must be a multiple of --granularity = {self.granularity}"
            yield Problem("--upcycle", self.experts, rule, "use a multiple of --granularity")
        if self.topk % self.granularity or not 1 <= self.topk <= self.experts:
            rule = (
                f"must be a multiple of --granularity = {self.granularity}, and at most "
                f"--upcycle = {self.experts}"
            )
            remedy = f"use a multiple of {self.granularity} that is at most {self.experts}"
            yield Problem("--topk", self.topk, rule, remedy)
        for name in ("noise", "redraw"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                yield Problem(
                    f"--{name}", getattr(self, name), "must be from 0 to 1", "use a number from 0 to 1"
                )

    def check(self, width: int) -> None:
        """ConfigError that lists all problems."""
        if found := list(self.problems(width)):
            raise ConfigError(found)


class UpcycledWeights:
    """Reads tensors of the mixture by our names; the MLP is divided when an expert is read."""

    def __init__(self, folder: HfFolder, recipe: UpcycleOptions) -> None:
        recipe.check(folder.expert_width)
        self.folder, self.recipe = folder, recipe
        self.sizes: ModelShape = folder.sizes
        self._check()

    def names(self) -> list[str]:
        """Our names, in the order of the layers."""
        found = [WORD_EMBEDDINGS]
        for layer in range(len(self.sizes.routed)):
            prefix = f"decoder.layers.{layer}."
            found += [f"{prefix}{leaf}.weight" for leaf in ("self_attention.linear_qkv", *self._alike())]
            found.append(f"{prefix}mlp.router.weight")
            expert = f"{prefix}mlp.experts.local_experts."
            found += [
                f"{expert}{each}.linear_{fc}.weight"
                for each in range(self.recipe.experts)
                for fc in ("fc1", "fc2")
            ]
        return [
            *found,
            "decoder.final_layernorm.weight",
            *([] if self.sizes.tied else ["output_layer.weight"]),
        ]

    def read(self, name: str) -> Tensor:
        """Read the tensor that has this name in our model."""
        if match := _EXPERT.match(name):
            return self._expert(int(match[1]), int(match[2]), match[3])
        outside = {
            WORD_EMBEDDINGS: "model.embed_tokens.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "output_layer.weight": "lm_head.weight",
        }
        if name in outside:
            return self._theirs(outside[name])
        layer, leaf = name.removeprefix("decoder.layers.").removesuffix(".weight").split(".", 1)
        theirs = f"model.layers.{layer}."
        if leaf == "mlp.router":
            return self._router(name)
        if leaf == "self_attention.linear_qkv":
            kinds = zip((TensorPart.QUERY, TensorPart.KEY, TensorPart.VALUE), "qkv", strict=True)
            parts = {part: self._theirs(f"{theirs}self_attn.{letter}_proj.weight") for part, letter in kinds}
            return join(parts, self.sizes.heads)
        return self._theirs(f"{theirs}{self._alike()[leaf]}.weight")

    def _alike(self) -> dict[str, str]:
        """Our leaf -> theirs, of the tensors of a layer that are the same on both sides."""
        return _ALIKE | (_QK_NORMS if self.sizes.qk_norm else {})

    def _router(self, name: str) -> Tensor:
        groups = self.recipe.experts // self.recipe.granularity
        width = self.folder.reader.meta("model.embed_tokens.weight").size(1)
        rows = keyed.normal((groups, width), seed=self.recipe.seed, name=name) * _ROUTER_STD
        return rows.repeat_interleave(self.recipe.granularity, 0)

    def _expert(self, layer: int, expert: int, matrix: str) -> Tensor:
        recipe = self.recipe
        mlp = f"model.layers.{layer}.mlp."
        slice_number, scale = expert % recipe.granularity, recipe.scale
        group = expert // recipe.granularity
        fresh = self._redrawn(layer, expert)

        def part(leaf: str, dim: int, factor: float) -> Tensor:
            whole = self._theirs(f"{mlp}{leaf}.weight")
            own = whole.chunk(recipe.granularity, dim)[slice_number].float() * factor
            if group:
                own = self._moved(own, f"upcycle.{layer}.{expert}.{leaf}", fresh, dim)
            return own.to(whole.dtype)

        if matrix == "fc2":
            return part("down_proj", 1, scale).contiguous()
        return torch.cat((part("gate_proj", 0, 1.0), part("up_proj", 0, scale)))

    def _moved(self, own: Tensor, name: str, fresh: Tensor, dim: int) -> Tensor:
        """The weights with noise, and with hidden units drawn anew."""
        recipe, std = self.recipe, own.std()
        if recipe.noise:
            own = own + recipe.noise * std * keyed.normal(tuple(own.shape), seed=recipe.seed, name=name)
        if len(fresh):
            drawn = std * keyed.normal(tuple(own.shape), seed=recipe.seed, name=f"{name}.redrawn")
            own = own.index_copy(dim, fresh, drawn.index_select(dim, fresh))
        return own

    def _redrawn(self, layer: int, expert: int) -> Tensor:
        """Hidden units that are drawn anew in this expert: the same in its three matrices."""
        width = self.folder.expert_width // self.recipe.granularity
        order = keyed.normal(
            (width,), seed=self.recipe.seed, name=f"upcycle.{layer}.{expert}.units"
        ).argsort()
        return order[: round(self.recipe.redraw * width)]

    def _theirs(self, name: str) -> Tensor:
        return self.folder.reader.read(name)

    def _check(self) -> None:
        known = {"model.embed_tokens.weight", "model.norm.weight"} | (
            set() if self.sizes.tied else {"lm_head.weight"}
        )
        for layer in range(len(self.sizes.routed)):
            prefix = f"model.layers.{layer}."
            known |= {f"{prefix}{leaf}.weight" for leaf in self._alike().values()}
            known |= {f"{prefix}self_attn.{letter}_proj.weight" for letter in "qkv"}
            known |= {f"{prefix}mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}
        there = {name for name in self.folder.reader.names() if not name.endswith("rotary_emb.inv_freq")}
        there -= {"lm_head.weight"} if self.sizes.tied else set()
        if lines := [f"{name}: missing" for name in sorted(known - there)] + [
            f"{name}: unexpected tensor" for name in sorted(there - known)
        ]:
            raise CheckpointError(
                "\n  - ".join(
                    [f"the tensors in {self.folder.path} do not match its config.json:", *lines[:8]]
                ),
                remedy="download the folder again",
            )
