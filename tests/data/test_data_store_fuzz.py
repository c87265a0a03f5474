"""Files with damaged headers, numbers and ends: refused with a DataError, or read without leaving the file.

``tests/sanitize.sh`` runs this under the address sanitizer; MHR_FUZZ=100000 for as many mutations.
"""

from __future__ import annotations

import os
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from corpora import write_corpus
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.stream.dataset import build_splits
from megatron_hyperrouter.errors import DataError

in_tmp_path = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
every = pytest.mark.parametrize(
    "impl", [pytest.param(impl, id=name) for name, impl in sorted(index.IMPLEMENTATIONS.items())]
)

SIZES = [40, 0, 7, 1, 90, 17, 3, 60, 25, 31]
FIELDS = {"magic": (0, 9), "version": (9, 8), "type": (17, 1), "sequences": (18, 8), "marks": (26, 8)}
EDGES = [
    0,
    1,
    2,
    3,
    7,
    9,
    10,
    11,
    12,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def read_everything(prefix: Path, kind: str, impl: index.Implementation) -> int:
    """Open the pair, and read each sample; the number of samples, or -1 where the files were refused."""
    data = DataConfig(train_data_path=(str(prefix),), data_index=kind)
    wanted = {"train_samples": None, "valid_samples": 0, "test_samples": 0}
    try:
        found = build_splits(data, seq_length=16, seed=1, vocab_size=2**63 - 1, impl=impl, **wanted).train
        for i in range(len(found)):
            assert found[i].shape == (17,)
    except DataError as error:
        assert str(prefix) in error.message and error.remedy
        return -1
    return len(found)


def mutate(good: bytes, dice: random.Random) -> bytes:
    """One to three changes: of a header field, of a number, of bits, or of the length."""
    bad = bytearray(good)
    for _ in range(dice.randint(1, 3)):
        kind = dice.randrange(5)
        if kind == 0:
            at, size = dice.choice(list(FIELDS.values()))
            bad[at : at + size] = (dice.choice(EDGES) % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 1:
            size = dice.choice([4, 8])
            at = dice.randrange(34, max(len(bad) - 8, 35))
            bad[at : at + size] = (dice.choice(EDGES) % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 2 and bad:
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        elif kind == 3:
            del bad[dice.randrange(len(bad) + 1) :]
        else:
            bad += dice.randbytes(dice.randint(1, 40))
    return bytes(bad)


@every
@pytest.mark.parametrize("kind", ["materialised", "on-demand"])
def test_no_mutation_of_an_index_crashes_or_leaves_the_file(tmp_path, impl, kind):
    prefix = Path(write_corpus(tmp_path / "corpus", SIZES))
    good, dice = Path(f"{prefix}.idx").read_bytes(), random.Random(11)
    outcomes = [read_everything(prefix, kind, impl)]
    for _ in range(int(os.environ.get("MHR_FUZZ", "300"))):
        Path(f"{prefix}.idx").write_bytes(mutate(good, dice))
        outcomes.append(read_everything(prefix, kind, impl))
    assert outcomes[0] > 0, "the file itself is good"
    assert -1 in outcomes, "damage is found"


@every
@in_tmp_path
@given(cut=st.integers(0, 2 * sum(SIZES) + 8), kind=st.sampled_from(["materialised", "on-demand"]))
@example(cut=0, kind="on-demand")
@example(cut=1, kind="on-demand")
@example(cut=2 * sum(SIZES) + 2, kind="on-demand")
def test_tokens_of_another_length_are_refused(tmp_path, impl, cut, kind):
    prefix = Path(write_corpus(tmp_path / "corpus", SIZES))
    good = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes((good + bytes(8))[:cut])
    assert (read_everything(prefix, kind, impl) > 0) == (cut == len(good))


@every
@in_tmp_path
@given(content=st.binary(max_size=200), head=st.booleans())
@example(content=b"", head=False)
@example(content=struct.pack("<QBQQ", 1, 8, 0, 1) + bytes(8), head=True)
def test_any_bytes_at_all_are_refused_or_read(tmp_path, impl, content, head):
    prefix = Path(write_corpus(tmp_path / "corpus", SIZES))
    Path(f"{prefix}.idx").write_bytes((b"MMIDIDX\0\0" if head else b"") + content)
    for kind in ("materialised", "on-demand"):
        assert read_everything(prefix, kind, impl) == -1


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("kind", ["materialised", "on-demand", "packed"])
def test_a_file_that_is_cut_while_it_is_read_ends_in_a_message(tmp_path, kind, ending):
    prefix = Path(write_corpus(tmp_path / "corpus", [400] * 100))
    own = {"pack_documents": True} if kind == "packed" else {"data_index": kind}
    data = DataConfig(train_data_path=(str(prefix),), **own)
    counts = {"train_samples": None, "valid_samples": 0, "test_samples": 0}
    found = build_splits(data, seq_length=16, seed=1, vocab_size=1000, eod=0, **counts).train
    expected = found[0]
    path = Path(f"{prefix}.{ending}")
    size = path.stat().st_size
    with open(path, "ab") as stream:
        stream.write(b"longer")
    np.testing.assert_array_equal(found[0], expected)
    os.truncate(path, 100)
    with pytest.raises(
        DataError, match=re.escape(f"{path}, byte 100: the file now ends here, but it had {size} bytes")
    ) as caught:
        found[0]
    assert "while a run reads" in caught.value.remedy


def test_a_file_that_is_replaced_while_it_is_read_does_no_harm(tmp_path):
    prefix = Path(write_corpus(tmp_path / "corpus", [400] * 100))
    store = IndexedDataset(prefix)
    before = store.tokens.copy()
    for ending in ("bin", "idx"):
        (tmp_path / "new").write_bytes(b"short")
        (tmp_path / "new").replace(f"{prefix}.{ending}")
    store.check_length()
    np.testing.assert_array_equal(store.tokens, before)
