"""A Hugging Face folder as a decoder with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.generation.decoder import Decoder, Loaded
from megatron_hyperrouter.importing.fitting import check_equal, check_rows, fitting_folder, settings_of_folder
from megatron_hyperrouter.importing.routers import imported_routers
from megatron_hyperrouter.importing.settings import run_of
from megatron_hyperrouter.importing.weights import ImportedWeights


def load_folder(path: Path, tokenizer_model: str | None = None) -> Loaded:
    """The model of the folder; a dense one is refused."""
    folder = fitting_folder(path)
    if folder.dense:
        raise CheckpointError(
            f"{path} contains a dense model, without experts",
            remedy=("import the model first: mhr import-hf --upcycle E --input FOLDER --output RUN"),
        )
    weights = ImportedWeights(folder)
    name = tokenizer_model or str(path / "tokenizer.json")
    settings = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": name}
    run = run_of({**settings_of_folder(folder), **settings})
    tokenizer = build_tokenizer("HuggingFaceTokenizer", name, None)
    if tokenizer_model:  # the folder's own tokenizer may have ids that no text uses
        check_rows(tokenizer, name, folder.rows)
    with torch.no_grad():
        routers = imported_routers(
            run, weights.names(), weights.read, vocab_size=tokenizer.vocab_size, reset=False
        )
    decoder = Decoder(run, lambda each: weights.read(each).float(), routers)
    return Loaded(decoder, tokenizer, run, lambda topks: check_equal(folder, run, topks, "--topk"))
