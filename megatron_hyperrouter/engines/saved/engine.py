"""Saving and loading for both engines; each engine only adds the state of its optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.folder import MANIFEST, read_manifest
from megatron_hyperrouter.checkpoint.optimizer import Staged, read_index
from megatron_hyperrouter.checkpoint.weights import Reader
from megatron_hyperrouter.engines.saved import generators
from megatron_hyperrouter.engines.saved.format1 import read_state
from megatron_hyperrouter.engines.saved.replicas import Replicas
from megatron_hyperrouter.engines.saved.state import (
    Memory,
    load_optimizer,
    load_weights,
    stage,
    verify,
    without_new_head,
)

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Deviation, RankPlace
    from megatron_hyperrouter.engines.saved.pieces import Holding


class SavedEngine(ABC):
    """The part of ``engines.base.Engine`` that saves and loads."""

    config: RunConfig
    place: RankPlace

    def __init__(self) -> None:
        self._memory = Memory()
        self._replicas = Replicas()

    def stage(self, *, weights_only: bool = False) -> Staged:
        """See :class:`megatron_hyperrouter.engines.base.Engine`; ``weights_only``: without the optimizer."""
        place = self.place
        texts = {generators.file_of(place.rank): generators.later_text(self.config, place.world_size)}
        held = self.holding()
        if weights_only or self.config.checkpoint.no_save_optim:
            held = held._replace(pieces=None)
        return stage(place.rank, place.world_size, held, self._memory, texts)

    def save(self, folder: Path, *, weights_only: bool = False) -> None:
        """See :class:`megatron_hyperrouter.engines.base.Engine`; ``weights_only``: without the optimizer."""
        staged = self.stage(weights_only=weights_only)
        staged.write(folder)
        self.barrier()
        if self.place.is_main:
            staged.join(folder)
        self.barrier()

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        reader, index = Reader(folder), read_index(folder)
        holding = without_new_head(self.holding(), folder)
        asked = self.config.checkpoint
        weights_only = weights_only or asked.no_load_optim or holding.pieces is None
        load_weights(reader, holding)
        step = 0
        if (folder / MANIFEST).is_file():
            step = int(read_manifest(folder)["step"])
            self.go_to(step)  # an evaluation may follow, and a router may depend on the step
        self.take_weights_over()
        if not weights_only and index is None:
            self._load_format_1(folder)
        elif not weights_only and index is not None:
            load_optimizer(reader, index, holding)
            if not asked.no_load_rng:
                self._restore_generators(folder, step)
        if index is not None:
            verify(reader, index, holding, weights_only=weights_only)
        self.weights_changed()

    def deviations(self) -> list[Deviation]:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        return self._replicas.deviations(self.place.rank, self.holding())

    def _load_format_1(self, folder: Path) -> None:
        state = read_state(
            folder,
            self.place.rank,
            ranks=self.place.world_size,
            trusted=self.config.checkpoint.trust_checkpoint,
            stacked=self.config.engine.moe_grouped_gemm,
        )
        self.load_format_1(state["optimizer"])
        generators.set_format_1(state["random"])

    def _restore_generators(self, folder: Path, step: int) -> None:
        world_size = self.place.world_size
        kept = generators.restore(folder, self.place.rank, self.config, world_size=world_size, step=step)
        model = self.config.model
        if not kept and self.place.is_main and max(model.hidden_dropout, model.attention_dropout) > 0:
            console.note(
                f"the layout has changed, so dropout draws different random numbers from step {step + 1} on"
            )

    @abstractmethod
    def holding(self) -> Holding:
        """What this rank saves and loads; its weights are whole and up to date."""

    @abstractmethod
    def take_weights_over(self) -> None:
        """Make the optimizer's copies of the weights equal to those of the model."""

    @abstractmethod
    def load_format_1(self, state: Any) -> None:
        """Restore the optimizer from the state file of this rank, in the host's own format."""

    @abstractmethod
    def go_to(self, step: int) -> None:
        """Set the number of completed steps, because the model may depend on it."""

    @abstractmethod
    def weights_changed(self) -> None:
        """Tell the routers that their weights may have changed."""

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()
