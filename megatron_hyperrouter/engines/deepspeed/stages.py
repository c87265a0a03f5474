"""DeepSpeed's pipeline stages, which may have different numbers of layers."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule

from megatron_hyperrouter.config.derived import has_uneven_stages, stage_layers
from megatron_hyperrouter.config.tree import RunConfig


class Stages(PipelineModule):  # type: ignore[misc]
    """The layers of a run, cut between its transformer layers; --decoder-first-pipeline-num-layers and its
    sibling count these.
    """

    def __init__(self, run: RunConfig, layers: list[LayerSpec], **given: Any) -> None:
        """``given``: the host's arguments."""
        self._counts = stage_layers(run) if has_uneven_stages(run) else None
        super().__init__(layers, partition_method="type:Block", **given)

    def _partition_layers(self, method: str = "uniform") -> None:
        if self._counts is None:
            super()._partition_layers(method)
            return
        # The embedding comes before the first transformer layer, norm and output after the last one.
        inner = list(accumulate(self._counts[:-1], initial=1))[1:]
        self.parts = [0, *inner, len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])
