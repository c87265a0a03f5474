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
    shared: float  # once on each rank


def frozen_of(config: RunConfig, vocab_size: int) -> FrozenBytes:
    """Hypernetworks, fixed routers and buffers, all float32 and on every rank."""
    router = router_on_meta(config, vocab_size)
    per_layer = float(sum(each.numel() * each.element_size() for each in router.buffers()))
    recipe = getattr(getattr(router, "frozen", None), "recipe", None)
    if isinstance(recipe, HypernetRecipe):
        width = config.router.options.hypernet_width
        made = recipe.num_experts * (recipe.hidden_size + recipe.bias)
        network = float(_FLOAT32 * (width * (recipe.embedding_size + 1 + made) + made))
        embeddings = recipe.num_experts if config.router.options.per_expert_embedding else 1
        per_layer += _FLOAT32 * (made + embeddings * width)  # this step's router, and its hidden units
        if recipe.name == "hypernet.model":
            return FrozenBytes(per_layer, network)
        return FrozenBytes(per_layer + network, 0.0)
    if recipe is not None:
        per_layer += _FLOAT32 * recipe.num_experts * recipe.hidden_size
    return FrozenBytes(per_layer, 0.0)
