"""Writes a Hugging Face folder out of a checkpoint, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.streams import Tensors, TensorToWrite, shards, write_shard
from megatron_hyperrouter.data.tokenize.transformers_files import end_of_text, write_tokenizer
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.export.classes.names import (
    ModelShape,
    TensorPart,
    TensorSource,
    cut,
    tensor_sources,
)
from megatron_hyperrouter.export.classes.target import CHOICE_BIAS, config_json
from megatron_hyperrouter.export.gates import MODELING_FILE, Gates
from megatron_hyperrouter.export.sources import vocabulary_rows, weight_reader
from megatron_hyperrouter.files import write_json

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SECOND_MATRIX = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.\d+\.linear_fc2\.weight")
MODELING = Path(__file__).resolve().parent.parent / "huggingface" / MODELING_FILE


@dataclass(frozen=True)
class Export:
    """Everything that determines the content of a folder."""

    run: RunConfig
    checkpoint: Path
    gates: Gates
    tokenizer: Tokenizer
    dtype: str
    topk: int
    max_shard_bytes: int
    notes: tuple[str, ...] = ()  # what the user of the folder should know
    # layer number (from 1) -> what the output of its routed experts is multiplied by: that of --calibrate-k
    scales: Mapping[int, float] | None = None


def write_model(job: Export, folder: Path, reader: Tensors | None = None) -> dict[str, str]:
    """Write every file of the folder but the model card and the certificate; returns the digest of each
    tensor.  ``reader``: of the tensors by our names; default: those of the checkpoint.
    """
    reader = weight_reader(job.checkpoint) if reader is None else reader
    digests = _write_weights(job, reader, folder)
    eod = end_of_text(job.tokenizer)
    rows = vocabulary_rows(reader)
    config = config_json(job.run, job.gates.target, rows=rows, eod=eod, dtype=job.dtype, topk=job.topk)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json", {"do_sample": False, "eos_token_id": eod, "pad_token_id": eod}
    )
    write_tokenizer(folder, job.tokenizer, seq_length=job.run.model.seq_length)
    if job.gates.target.custom_code:
        (folder / MODELING_FILE).write_text(MODELING.read_text(encoding="utf-8"), encoding="utf-8")
    return digests


def _write_weights(job: Export, reader: Tensors, folder: Path) -> dict[str, str]:
    sizes, target = ModelShape.of(job.run), job.gates.target
    found = tensor_sources(sizes, target.naming, target.router_leaves)
    if missing := [
        name
        for place in found.values()
        if place.part is not TensorPart.MADE
        for name in place.ours
        if name not in reader
    ]:
        raise CheckpointError(
            f"{job.checkpoint} does not match the settings of its run: it has no tensor {missing[0]}"
            + (f" ({len(missing)} tensors are missing in total)" if missing[1:] else ""),
            remedy="export from the run folder in which this checkpoint was written",
        )
    source = _TensorReader(job, reader, sizes)
    planned = [
        TensorToWrite(name, source.dtype(name), tuple(source.meta(place).shape))
        for name, place in found.items()
    ]
    tensors = (source.tensor(place).to(source.dtype(name)) for name, place in found.items())
    parts = shards(planned, job.max_shard_bytes)
    if len(parts) == 1:
        return write_shard(folder / "model.safetensors", parts[0], tensors)
    digests: dict[str, str] = {}
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        digests |= write_shard(folder / file, part, tensors)
        where |= dict.fromkeys((each.name for each in part), file)
    total = sum(each.nbytes for each in planned)
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
    )
    return digests


class _TensorReader:
    """Tensors of the folder, made from those of the checkpoint. The last tensor read is kept, because its
    other parts come next.
    """

    def __init__(self, job: Export, reader: Tensors, sizes: ModelShape) -> None:
        self.reader, self.heads = reader, sizes.heads
        self.routers: Mapping[str, Tensor] = job.gates.tensors
        self.target_dtype = TYPES[job.dtype]
        self.custom = job.gates.target.custom_code
        self.scales = job.scales or {}
        self._last: tuple[str, Tensor] | None = None

    def dtype(self, name: str) -> torch.dtype:
        """The router's weights stay in float32 if the class uses them in float32."""
        routed = ".gate." in name
        kept = name.endswith(CHOICE_BIAS) or (self.custom and routed)
        return torch.float32 if kept else self.target_dtype

    def meta(self, place: TensorSource) -> Tensor:
        """The tensor without its numbers."""
        if place.part is TensorPart.MADE:
            return self.routers[place.ours[0]]
        return cut([self.reader.meta(name) for name in place.ours], place.part, self.heads)

    def tensor(self, place: TensorSource) -> Tensor:
        """The tensor."""
        if place.part is TensorPart.MADE:
            return self.routers[place.ours[0]]
        return cut([self._read(name) for name in place.ours], place.part, self.heads)

    def _read(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._scaled(name, self.reader.read(name)))
        return self._last[1]

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        """A layer's scale is in the second matrices of its experts, which every class of transformers has."""
        found = _SECOND_MATRIX.fullmatch(name)
        scale = self.scales.get(int(found[1]) + 1) if found else None
        return tensor if scale is None else tensor.float() * scale
