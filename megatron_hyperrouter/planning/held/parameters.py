"""How many parameters each rank trains, from the settings alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_hyperrouter.analysis.shapes import Shape, shapes_of
from megatron_hyperrouter.analysis.size import OUTPUT, ModelSize, size_of
from megatron_hyperrouter.config.derived import expert_tensor_size
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS, is_expert
from megatron_hyperrouter.model.sharding import is_cut
from megatron_hyperrouter.model.spec import padded_vocab_size
from megatron_hyperrouter.planning.held.stages import StageContent, stages_of

_LAYER = "decoder.layers."


class Held(NamedTuple):
    """Parameters of one rank."""

    dense: int = 0
    expert: int = 0
    largest: int = 0  # of its tensors: a matrix, or the stacked matrices of its experts

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert


class _ParameterCount(NamedTuple):
    """Parameters of a piece of the model, before any layout."""

    cut: int = 0  # by tensor parallelism
    whole: int = 0  # on every tensor-parallel rank
    experts: int = 0
    largest_cut: int = 0
    largest_stack: int = 0  # of all experts

    def add(self, other: _ParameterCount) -> _ParameterCount:
        return _ParameterCount(
            self.cut + other.cut,
            self.whole + other.whole,
            self.experts + other.experts,
            max(self.largest_cut, other.largest_cut),
            max(self.largest_stack, other.largest_stack),
        )


@dataclass(frozen=True)
class Model:
    """The parameters of a model, divided into the pieces of pipeline stages; the same for every layout."""

    size: ModelSize
    layers: tuple[_ParameterCount, ...]
    embedding: _ParameterCount
    output: _ParameterCount  # empty if it is tied to the embedding
    norm: _ParameterCount
    ahead: _ParameterCount  # multi-token prediction

    def held(self, config: RunConfig, stage: StageContent) -> Held:
        """Parameters on a rank of pipeline stage ``stage``, with the layout of ``config``."""
        part = _ParameterCount()
        for number in stage.layers:
            part = part.add(self.layers[number])
        if stage.first:
            part = part.add(self.embedding)
        if stage.last:
            part = part.add(self.norm).add(self.output).add(self.ahead)
            for _ in range(self._copies(config, stage)):
                part = part.add(self.embedding)
        tensor = config.parallel.tensor_model_parallel_size
        over = config.parallel.expert_model_parallel_size * expert_tensor_size(config)
        largest = max(part.largest_cut // tensor, part.largest_stack // over)
        return Held(part.cut // tensor + part.whole, part.experts // over, largest)

    @staticmethod
    def _copies(config: RunConfig, stage: StageContent) -> int:
        """Copies of the embedding on the last stage: for a tied output, and for multi-token prediction."""
        if stage.first:
            return 0
        tied = not config.model.untie_embeddings_and_output_weights
        return int(tied) + int(config.model.mtp_num_layers is not None)


def model_of(config: RunConfig, vocab_size: int) -> Model:
    """``vocab_size``: ids of the tokenizer, before padding."""
    shapes = shapes_of(config, padded_vocab_size(vocab_size, config), vocab_size)
    layers: list[dict[str, Shape]] = [{} for _ in range(config.model.num_layers)]
    ahead: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if name.startswith(_LAYER):
            layers[int(name[len(_LAYER) :].partition(".")[0])][name] = shape
        elif name.startswith("mtp."):
            ahead[name] = shape

    def single(name: str) -> _ParameterCount:
        return _part([(name, shapes[name])]) if name in shapes else _ParameterCount()

    return Model(
        size=size_of(config, shapes),
        layers=tuple(_part(layer.items()) for layer in layers),
        embedding=single(WORD_EMBEDDINGS),
        output=single(OUTPUT),
        norm=single("decoder.final_layernorm.weight"),
        ahead=_part(ahead.items()),
    )


def parameters_of_ranks(model: Model, config: RunConfig, world_size: int) -> list[int]:
    """Trained parameters of each rank; the ranks of a pipeline stage are neighbours."""
    stages = stages_of(config)
    of_stages = [model.held(config, stage).total for stage in stages]
    return [count for count in of_stages for _ in range(world_size // len(stages))]


def _part(named: Iterable[tuple[str, Shape]]) -> _ParameterCount:
    cut = whole = experts = largest = 0
    stacks: dict[str, int] = {}
    for name, shape in named:
        count = math.prod(shape)
        if is_expert(name):
            experts += count
            matrix = name.rpartition("linear_")[2]
            stacks[matrix] = stacks.get(matrix, 0) + count
        elif is_cut(name):
            cut, largest = cut + count, max(largest, count)
        else:
            whole += count
    return _ParameterCount(cut, whole, experts, largest, max(stacks.values(), default=0))
