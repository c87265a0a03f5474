"""A trained run, or a Hugging Face folder, as a decoder with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer, build_tokenizer
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.export.sources import check_files, plain_run, routers_of, weight_reader
from megatron_hyperrouter.export.target import refuse_unknown
from megatron_hyperrouter.generation.decoder import Decoder


@dataclass(frozen=True)
class Loaded:
    """A model that writes text."""

    decoder: Decoder
    tokenizer: Tokenizer
    run: RunConfig


def load(path: Path, *, tokenizer_model: str | None = None) -> Loaded:
    """What ``path`` holds: a run folder, one of its checkpoints, or a Hugging Face folder."""
    if (path / "config.json").is_file():
        return _from_folder(path, tokenizer_model)
    trained = TrainedRun.open(path, tokenizer_model=tokenizer_model)
    check_files(trained.checkpoint)
    run, tokenizer = plain_run(trained.settings), trained.tokenizer()
    _check(run)
    reader = weight_reader(trained.checkpoint)
    routers = routers_of(run, reader, vocab_size=tokenizer.vocab_size)
    decoder = Decoder(run.model, lambda name: reader.read(name).float(), routers, step=trained.step)
    return Loaded(decoder, tokenizer, run)


def _from_folder(path: Path, tokenizer_model: str | None) -> Loaded:
    from megatron_hyperrouter.importing.routers import imported_routers
    from megatron_hyperrouter.importing.settings import run_of
    from megatron_hyperrouter.importing.source import open_folder, settings_of_folder
    from megatron_hyperrouter.importing.weights import ImportedWeights

    folder = open_folder(path)
    if folder.dense:
        raise CheckpointError(
            f"{path} holds a dense model", remedy="import it first: mhr import-hf --upcycle E --input FOLDER"
        )
    weights = ImportedWeights(folder)
    name = tokenizer_model or str(path / "tokenizer.json")
    settings = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": name}
    run = run_of({**settings_of_folder(folder), **settings})
    tokenizer = build_tokenizer("HuggingFaceTokenizer", name, None)
    with torch.no_grad():
        routers = imported_routers(
            run, weights.names(), weights.read, vocab_size=tokenizer.vocab_size, reset=False
        )
    decoder = Decoder(run.model, lambda each: weights.read(each).float(), routers)
    return Loaded(decoder, tokenizer, run)


def _check(run: RunConfig) -> None:
    if run.model.mlp_type != "standard":
        raise CheckpointError(
            "generation does not have --mlp-type residual", remedy="score the run with mhr evaluate instead"
        )
    refuse_unknown(run, None)
