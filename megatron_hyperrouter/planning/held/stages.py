"""The part of the model on each pipeline stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_hyperrouter.config.derived import has_uneven_stages, stage_layers
from megatron_hyperrouter.config.tree import RunConfig


@dataclass(frozen=True)
class StageContent:
    """The content of one pipeline stage, the same on all of its ranks."""

    layers: tuple[int, ...]  # numbers of transformer layers, from 0
    first: bool  # has the embedding
    last: bool  # has the last norm and the output


def stages_of(config: RunConfig) -> list[StageContent]:
    """The pipeline stages, first to last."""
    stages = config.parallel.pipeline_model_parallel_size
    layers = config.model.num_layers
    if has_uneven_stages(config):
        parts = _named_stages(stage_layers(config))
    elif layers % stages == 0:
        parts = _even_stages(config)
    else:  # the rules allow it on the deepspeed engine alone
        parts = _balanced_stages(layers, stages)
    return [StageContent(part, number == 0, number == stages - 1) for number, part in enumerate(parts)]


def _even_stages(config: RunConfig) -> list[tuple[int, ...]]:
    """Under the interleaved schedule a stage has a chunk of each of several passes through the ranks."""
    stages, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    passes = config.parallel.virtual_pipeline_model_parallel_size or 1
    size = layers // (stages * passes)
    return [
        tuple(
            number
            for turn in range(passes)
            for number in range((turn * stages + stage) * size, (turn * stages + stage + 1) * size)
        )
        for stage in range(stages)
    ]


def _named_stages(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """As the settings say, one after the other; interleaved chunks are counted with their stage."""
    ends = list(itertools.accumulate(sizes))
    return [tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def _balanced_stages(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Like DeepSpeed's ``PipelineModule``, which divides its list of layers with
    ``partition_method="type:Block"``.
    """
    from deepspeed.runtime.utils import partition_balanced

    bounds = partition_balanced([0, *[1] * layers, 0, 0], stages)  # embedding, layers, norm, output
    cuts = [min(max(bound - 1, 0), layers) for bound in bounds]
    return [tuple(range(cuts[number], cuts[number + 1])) for number in range(stages)]
