"""Which checkpoint is proved: a step with a normal loss has followed it, so its weights are good.

A checkpoint is written after an update whose effect is not known yet.  The next step shows it.  So the
newest proved checkpoint is kept, and the run can go back to it if the loss diverges.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_hyperrouter.checkpoint.folder import CheckpointFolders

_RUINED = 2.0  # times the last sound loss


class CheckpointHealth:
    """Follows the steps of one run to tell which of its checkpoints are good."""

    def __init__(self, folders: CheckpointFolders, *, step: int) -> None:
        """``step``: completed steps of the checkpoint that the run begins with."""
        self._folders = folders
        self._newest, self._sound_step, self._sound_loss = step, 0, math.inf
        self._proved = 0

    def after_step(self, step: int, loss: float) -> None:
        """A step was taken, with this loss of the weights before it."""
        if math.isfinite(loss) and loss <= _RUINED * self._sound_loss:
            self._sound_step, self._sound_loss = step, loss
            self._prove()

    def after_save(self, step: int) -> None:
        """A checkpoint was published."""
        self._newest = step
        self._prove()

    def _prove(self) -> None:
        if self._proved < self._newest < self._sound_step:
            self._folders.prove(self._newest)
            self._proved = self._newest
