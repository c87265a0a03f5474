"""A run that separates documents gets a warning if the files have no ends of documents; a few tokens are
read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.store.token_files import IndexedDataset, IndexedWriter
from megatron_hyperrouter.data.stream.document_ends import warning_about_ends

EOD = 9
ALL = DataConfig(reset_attention_mask=True, eod_mask_loss=True)


def written(prefix: Path, documents: list[list[int]], *, halves: bool = False) -> IndexedDataset:
    """``halves``: each document in two sequences."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            lengths = [len(document) // 2, len(document) - len(document) // 2]
            writer.add_document(np.array(document, np.uint16), lengths if halves else None)
    return IndexedDataset(prefix, whole=False)


@pytest.mark.parametrize(
    ("documents", "warns"),
    [
        ([[1, 2, EOD], [3, EOD]], False),
        ([[1, 2], [3, EOD], [4]], False),  # some end: a document that was cut is no reason
        ([[]] * 30 + [[1, EOD]], False),
        ([[1, 2], [3]], True),
        ([[1, EOD, 2], [EOD, 3], []], True),  # inside, and not at the end
        ([[]], False),  # nothing to be seen
    ],
)
@pytest.mark.parametrize("halves", [False, True])
def test_what_is_told(tmp_path: Path, documents: list[list[int]], warns: bool, halves: bool) -> None:
    told = warning_about_ends(ALL, [written(tmp_path / "a", documents, halves=halves)], EOD)
    assert (told is not None) is warns
    if told:
        assert told.startswith(f"{tmp_path / 'a'}: none of the first documents ends with id 9, but --reset-")
        assert "mask-loss need this id to separate documents; preprocess the text with --append-eod" in told


def test_once_for_all_files(tmp_path: Path) -> None:
    stores = [written(tmp_path / str(number), [[1, EOD] if number == 2 else [1]]) for number in range(6)]
    told = warning_about_ends(DataConfig(reset_position_ids=True), stores, EOD)
    assert told is not None
    assert (
        told.startswith(f"{tmp_path}/0, {tmp_path}/1, {tmp_path}/3 and 2 more files: none")
        and "--reset-position-ids needs this id" in told
    )


def test_nothing_is_told_where_nothing_goes_by_it(tmp_path: Path) -> None:
    stores = [written(tmp_path / "a", [[1]])]
    assert warning_about_ends(DataConfig(), stores, EOD) is None
    assert warning_about_ends(ALL, stores, None) is None
