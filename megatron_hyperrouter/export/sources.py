"""A checkpoint as the source of an export: checked files, settings that affect what it computes, and its
routers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hyperrouter.checkpoint.folder import read_manifest, verify
from megatron_hyperrouter.checkpoint.streams import TensorReader, Tensors
from megatron_hyperrouter.config.derived import moe_layers
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS
from megatron_hyperrouter.routers.base import Router

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig


def weight_reader(checkpoint: Path) -> TensorReader:
    """The weights that the checkpoint's manifest lists."""
    files = read_manifest(checkpoint)["files"]
    names = sorted(name for name in files if name.startswith("weights-") and name.endswith(".safetensors"))
    if not names:
        raise CheckpointError(
            f"{checkpoint} has no weights", remedy="use a run folder or one of its checkpoints"
        )
    return TensorReader(checkpoint / name for name in names)


def run_name(run: RunConfig, checkpoint: Path) -> str:
    """The name of the run's folder when it was trained; of a run with ``--run-dir .``, its name now."""
    return Path(run.logging.run_dir).name or checkpoint.absolute().parent.parent.name


def vocabulary_rows(reader: Tensors) -> int:
    """Rows of the embedding."""
    if WORD_EMBEDDINGS not in reader:
        raise CheckpointError(
            f"the checkpoint has no {WORD_EMBEDDINGS}", remedy="use a checkpoint that this program wrote"
        )
    return reader.meta(WORD_EMBEDDINGS).size(0)


def plain_run(run: RunConfig) -> RunConfig:
    """The run's model as a single text sees it: float32, no tokens dropped, no borders of documents, nothing
    that predicts further tokens.
    """
    return replace(
        run,
        model=replace(run.model, moe_expert_capacity_factor=None, mtp_num_layers=None),
        train=replace(run.train, bf16=False),
        data=replace(
            run.data,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            pack_documents=False,
        ),
    )


def routers_of(run: RunConfig, reader: TensorReader, *, vocab_size: int) -> dict[int, Router]:
    """The router of each MoE layer, by its number from 0, with the checkpoint's weights."""
    found: dict[int, Router] = {}
    for layer in (number for number, routed in enumerate(moe_layers(run)) if routed):
        router = make_router(run, layer + 1, vocab_size=vocab_size)
        prefix = f"decoder.layers.{layer}.mlp.router."
        names = [prefix + name for name in router.state_dict()]
        if missing := [name for name in names if name not in reader]:
            raise CheckpointError(
                f"the checkpoint has no {missing[0]}: the settings name the wrong router, {run.router.name}",
                remedy="use the settings of the run that wrote the checkpoint",
            )
        router.load_state_dict({name.removeprefix(prefix): reader.read(name) for name in names})
        router.eval()
        found[layer] = router
    return found


class _SingleRank:
    rank, world_size = 0, 1


class OneProcess:
    """The ranks that read or write a checkpoint: this process alone."""

    place = _SingleRank()

    def any_rank(self, flag: bool) -> bool:
        """There are no other ranks."""
        return flag

    def first_word(self, word: str) -> str:
        """There are no other ranks."""
        return word


def check_files(checkpoint: Path) -> None:
    """Compare every file with the checkpoint's manifest; CheckpointError names the one that is missing or
    altered.
    """
    verify(checkpoint, OneProcess())
