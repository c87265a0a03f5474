"""The first samples of a split, each of them once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from megatron_hyperrouter import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_hyperrouter.data.stream.dataset import Dataset
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.evaluate.trained import TrainedRun


def at_most(run: TrainedRun, batches: int | None, *, most: int, flag: str = "") -> int | None:
    """The samples of ``batches`` global batches; None if those are all ``most`` samples or more.

    ``flag``: that asked for the batches; too many of them are then reported.
    """
    wanted = batches and batches * run.global_batch_size
    if flag and wanted and wanted > most:
        console.note(
            f"{flag} {batches} selects {wanted:,} samples, but there are only {most:,}, so each of them "
            "is scored once"
        )
    return wanted if wanted and wanted < most else None


def first_batches(
    run: TrainedRun,
    tokenizer: Tokenizer,
    batches: int | None,
    *,
    split: str | None = None,
    data_path: Sequence[str] | None = None,
    flag: str = "",
) -> tuple[Dataset, int | None]:
    """A split (the test split by default), and how many of its samples to use; None: all.

    For training data, which are read for many epochs, the number of different samples is not computed.  A
    blend with weights may repeat a small file within one pass.
    """
    of_split = partial(run.dataset, tokenizer, split=split, data_path=data_path)
    if batches and split == "train":
        wanted = batches * run.global_batch_size
        return of_split(samples=wanted), wanted
    whole = of_split(samples=None)
    samples = at_most(run, batches, most=len(whole), flag=flag)
    return (whole, None) if samples is None else (of_split(samples=samples), samples)
