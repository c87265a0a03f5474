"""Rules about where tokens come from."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hyperrouter.config.derived import split_shares
from megatron_hyperrouter.config.leaves import flag, value_of
from megatron_hyperrouter.config.rules.base import Rule, broken
from megatron_hyperrouter.config.schedules.mixes import SCHEDULE_REMEDY, prefixes_and_weights, scheduled
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem

PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def some_data(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """There is something to train on."""
    data = config.data
    if not (data.mock_data or data.data_path or data.train_data_path or data.data_schedule is not None):
        remedy = (
            "add --data-path PREFIX (mhr preprocess writes such files), --train-data-path, "
            "--data-schedule or --mock-data"
        )
        yield broken(config, "data_path", "there is no training data", remedy)


def mock_data_stands_alone(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Synthetic tokens replace all data files."""
    if not config.data.mock_data:
        return
    for name in (*PATHS, "data_schedule"):
        if value_of(config, name):
            yield broken(config, name, "cannot be combined with --mock-data", "keep one of the two flags")


def one_source_of_data(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """--data-path is split into three parts; the other three are those parts already."""
    if not config.data.data_path:
        return
    for name in PATHS[1:]:
        if getattr(config.data, name):
            yield broken(
                config,
                name,
                (
                    "cannot be combined with --data-path, which --split divides into training, "
                    "validation and test data"
                ),
                "leave out either --data-path or FLAG",
            )


def blends(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A blend is a list of prefixes, either all without weights or each after its weight."""
    for name in PATHS:
        words = getattr(config.data, name)
        try:
            prefixes_and_weights(words)
        except ValueError as error:
            remedy = "put a weight before every prefix (0.3 PREFIX-A 0.7 PREFIX-B), or give no weights"
            yield broken(config, name, str(error), remedy)


def schedule_is_one(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """--data-schedule must be a list of mixes; whether their files exist is checked when they are opened."""
    if config.data.data_schedule is None:
        return
    try:
        scheduled(config.data)
    except ValueError as error:
        yield broken(config, "data_schedule", str(error), SCHEDULE_REMEDY)


def split_is_three_shares(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Shares for training, validation and test; training needs one."""
    try:
        shares = split_shares(config.data.split)
    except ValueError as error:
        remedy = "write the shares of training, validation and test data, such as 969,30,1"
        yield broken(config, "split", str(error), remedy)
        return
    only_scheduled = config.data.data_schedule is not None and not any(
        getattr(config.data, name) for name in PATHS[1:]
    )
    if shares[0] == 0 and (config.data.data_path or only_scheduled):
        remedy = "make the first number greater than 0, as in 969,30,1"
        yield broken(config, "split", "leaves no training data", remedy)


def tokenizer_is_complete(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each tokenizer has the files or numbers that define its vocabulary."""
    kind = config.data.tokenizer_type
    if kind == "GPT2BPETokenizer":
        if config.data.tokenizer_model is None and None in (config.data.vocab_file, config.data.merge_file):
            yield broken(
                config,
                "tokenizer_type",
                "needs --vocab-file and --merge-file",
                "add --vocab-file vocab.json and --merge-file merges.txt",
            )
    elif kind not in ("ByteTokenizer", "NullTokenizer") and config.data.tokenizer_model is None:
        yield broken(
            config,
            "tokenizer_type",
            "needs --tokenizer-model",
            "add --tokenizer-model FILE (mhr tokenizer trains a tokenizer)",
        )
    if kind == "NullTokenizer" and config.data.vocab_size is None:
        yield broken(
            config, "tokenizer_type", "needs --vocab-size", "add --vocab-size N, the number of token ids"
        )


def packed_documents_stay_apart(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Documents that are packed into one sample are unrelated, so they must not attend to each other;
    padding must not count.
    """
    for name in ("reset_attention_mask", "eod_mask_loss"):
        if config.data.pack_documents and not getattr(config.data, name):
            remedy = f"add {flag(name)}, or leave out FLAG"
            yield broken(
                config,
                "pack_documents",
                f"needs {flag(name)}, because documents packed into one sample are unrelated",
                remedy,
            )


def packing_knows_all_documents(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Packing has to sort all documents, and packed samples do not follow the token stream that the ledger
    records.
    """
    if not config.data.pack_documents:
        return
    if config.data.data_index == "on-demand":
        rule = (
            "cannot be combined with --pack-documents, which needs the lengths of all documents at the start"
        )
        yield broken(config, "data_index", rule, "use --data-index auto, or leave out --pack-documents")
    if config.data.data_schedule is not None:
        rule = "cannot be combined with --pack-documents"
        yield broken(
            config, "data_schedule", rule, "use one mix with --data-path, or leave out --pack-documents"
        )


RULES: tuple[Rule, ...] = (
    some_data,
    mock_data_stands_alone,
    one_source_of_data,
    blends,
    schedule_is_one,
    split_is_three_shares,
    tokenizer_is_complete,
    packed_documents_stay_apart,
    packing_knows_all_documents,
)
