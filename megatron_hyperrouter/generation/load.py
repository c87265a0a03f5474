"""A trained run, or a Hugging Face folder, as a decoder with its tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.export.classes.target import refuse_unknown
from megatron_hyperrouter.export.sources import check_files, plain_run, routers_of, weight_reader
from megatron_hyperrouter.generation.decoder import FOLLOWED, Decoder, Loaded
from megatron_hyperrouter.generation.folder import load_folder


def load(path: Path, *, tokenizer_model: str | None = None) -> Loaded:
    """The model in ``path``: a run folder, one of its checkpoints, or a Hugging Face folder."""
    if (path / "config.json").is_file():
        return load_folder(path, tokenizer_model)
    trained = TrainedRun.open(path, tokenizer_model=tokenizer_model)
    check_files(trained.checkpoint)
    run, tokenizer = plain_run(trained.settings), trained.tokenizer()
    if run.model.mlp_type != "standard":
        raise CheckpointError(
            "generation does not support --mlp-type residual",
            remedy="use mhr evaluate to score the run",
        )
    refuse_unknown(run, FOLLOWED, "generation")
    reader = weight_reader(trained.checkpoint)
    routers = routers_of(run, reader, vocab_size=tokenizer.vocab_size)
    decoder = Decoder(run, lambda name: reader.read(name).float(), routers, step=trained.step)
    return Loaded(decoder, tokenizer, run)
