"""The description that every checkpoint of a run contains."""

from __future__ import annotations

from megatron_hyperrouter.checkpoint.description import Description, describe
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
from megatron_hyperrouter.train.samples import Samples


def description_of(samples: Samples, tokenizer: Tokenizer, again: RunConfig) -> Description:
    """Settings (those that start the run ``again``), tokenizer, and the identities of the data."""
    fetched = getattr(tokenizer, "files", None)
    described = describe(
        again,
        tokenizer=tokenizer.identity(),
        fetched=(*fetched.model, *fetched.settings) if fetched else (),
    )
    described.meta["files"] = samples.files()
    return described
