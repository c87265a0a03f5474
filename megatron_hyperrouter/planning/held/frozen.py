"""Memory of routers in addition to their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megatron_hyperrouter.analysis.size import router_on_meta
from megatron_hyperrouter.routers.hyper import HypernetRecipe

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig

_FLOAT32 = 4


class FrozenBytes(NamedTuple):
    """Bytes of routers in addition to their parameters."""

    per_layer: float
    first: float = 0.0  # of a hypernetwork: its first layer
    second: float = 0.0  # its second layer, which ranks may divide
    sums: float = 0.0  # gradients of a layer's router, if a step has several micro-batches
    for_all_layers: bool = False  # one hypernetwork

    def on_a_rank(self, routers: int, *, parts: int, micro_batches: int) -> float:
        """``parts``: into how many the second layer is divided."""
        networks = min(routers, 1) if self.for_all_layers else routers
        sums = self.sums if micro_batches > 1 else 0.0
        return networks * (self.first + self.second / parts) + routers * (self.per_layer + sums)


def frozen_of(config: RunConfig, vocab_size: int) -> FrozenBytes:
    """Hypernetworks, fixed routers and buffers, all float32."""
    router = router_on_meta(config, vocab_size)
    per_layer = float(sum(each.numel() * each.element_size() for each in router.buffers()))
    recipe = getattr(getattr(router, "frozen", None), "recipe", None)
    if isinstance(recipe, HypernetRecipe):
        width = config.router.options.hypernet_width
        made = recipe.num_experts * (recipe.hidden_size + recipe.bias)
        embeddings = recipe.num_experts if config.router.options.per_expert_embedding else 1
        return FrozenBytes(
            per_layer + _FLOAT32 * (made + embeddings * width),  # this step's router, and its hidden units
            first=float(_FLOAT32 * width * (recipe.embedding_size + 1)),
            second=float(_FLOAT32 * made * (width + 1)),
            sums=float(_FLOAT32 * made),
            for_all_layers=recipe.name == "hypernet.model",
        )
    if recipe is not None:
        per_layer += _FLOAT32 * recipe.num_experts * recipe.hidden_size
    return FrozenBytes(per_layer)
