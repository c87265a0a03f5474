"""Weights of a Hugging Face folder under our global names; each is read or made when it is needed.

Legend: ``E`` experts, ``D`` hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_hyperrouter.analysis.shapes import shapes_of
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.classes.names import TensorPart, TensorSource, join, tensor_sources
from megatron_hyperrouter.importing.source import MOE, HfFolder

_CHOICE_BIAS = "e_score_correction_bias"
_ONE_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(\w+)\.weight$")
_DERIVED = "rotary_emb.inv_freq"  # a table that follows from the settings


class ImportedWeights:
    """Reads tensors by our names, whether the experts are stored separately or stacked."""

    def __init__(self, folder: HfFolder) -> None:
        self.folder = folder
        self.heads = folder.sizes.heads
        self._last: tuple[str, Tensor] | None = None
        biased = any(name.endswith(_CHOICE_BIAS) for name in folder.reader.names())
        leaves = ("weight", _CHOICE_BIAS) if biased else ("weight",)
        found = tensor_sources(folder.sizes, MOE[folder.architecture], leaves)
        self._parts: dict[str, dict[TensorPart, str]] = {}
        for theirs, place in found.items():
            self._parts.setdefault(place.ours[0], {})[place.part] = theirs
        self._check(found)

    def names(self) -> list[str]:
        """Our names, in the order of the layers."""
        return list(self._parts)

    def read(self, name: str) -> Tensor:
        """The tensor under our name."""
        parts = {part: self._theirs(theirs) for part, theirs in self._parts[name].items()}
        if TensorPart.MADE in parts:
            return parts[TensorPart.MADE]
        return join(parts, self.heads).contiguous()

    def _theirs(self, name: str) -> Tensor:
        reader = self.folder.reader
        if name in reader:
            return reader.read(name)
        packed, expert, leaf = self._packed(name)
        return self._slice(packed, expert, leaf)

    def _slice(self, packed: str, expert: int, leaf: str) -> Tensor:
        if self._last is None or self._last[0] != packed:  # the other experts come next
            self._last = (packed, self.folder.reader.read(packed))
        whole = self._last[1][expert]
        if packed.endswith("down_proj"):
            return whole
        return whole.chunk(2)[leaf == "up_proj"]

    def _packed(self, name: str) -> tuple[str, int, str]:
        """The tensor of all experts that has this one's matrix."""
        match = _ONE_EXPERT.match(name)
        if match is None:
            return "", 0, ""
        leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
        stem = match[1].replace("block_sparse_moe", "mlp")
        return f"{stem}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}", int(match[2]), leaf

    @property
    def left_out(self) -> bool:
        """Whether the folder has layers that are not imported."""
        return any(name.startswith(self.folder.predicting_layers) for name in self.folder.reader.names())

    def _check(self, found: dict[str, TensorSource]) -> None:
        reader, wanted = self.folder.reader, set()
        missing = []
        for name in found:
            source = name if name in reader else self._packed(name)[0]
            wanted.add(source)
            if source not in reader:
                missing.append(name)
        extra = [
            name
            for name in reader.names()
            if name not in wanted and not name.endswith(_DERIVED) and reader.meta(name).numel()
        ]
        extra = [name for name in extra if not name.startswith(self.folder.predicting_layers)]
        if self.folder.tied and "lm_head.weight" in extra:
            same = torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight"))
            extra = [name for name in extra if name != "lm_head.weight" or not same]
        lines = [f"{name}: missing" for name in missing] + [f"{name}: unexpected tensor" for name in extra]
        if lines:
            more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
            raise CheckpointError(
                "\n  - ".join(
                    [
                        f"the tensors in {self.folder.path} do not match its config.json:",
                        *lines[:8],
                        *more,
                    ]
                ),
                remedy="download the folder again",
            )


def checked(
    read: Callable[[str], Tensor], names: Sequence[str], run: RunConfig, folder: HfFolder
) -> Callable[[str], Tensor]:
    """``read``, with CheckpointError for a tensor that is no weight of the run's model: one of integers, with
    NaN, or with another shape.
    """
    matrix = (run.model.num_experts, run.model.hidden_size)
    shapes = shapes_of(run, folder.rows, folder.rows) | {
        name: matrix for name in names if name.endswith(".mlp.router.weight")
    }

    def read_checked(name: str) -> Tensor:
        wanted = shapes.get(name)
        try:
            tensor = read(name)
        except (IndexError, RuntimeError) as error:  # an expert that a stack does not have; heads that differ
            raise _unfit(
                folder.path, name, f"the shapes of its parts do not match config.json ({error})"
            ) from error
        if not tensor.is_floating_point():
            raise _unfit(folder.path, name, f"its data type is {tensor.dtype}, not a floating-point type")
        if wanted is not None and tuple(tensor.shape) != wanted:
            found = list(tensor.shape)
            raise _unfit(folder.path, name, f"its shape is {found}, but config.json describes {list(wanted)}")
        if not torch.isfinite(tensor).all():
            raise _unfit(folder.path, name, "it contains NaN or infinity")
        return tensor

    return read_checked


def _unfit(folder: Path, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the tensor for {name} cannot be used: {reason}",
        remedy="download the folder again, or save the model again",
    )
