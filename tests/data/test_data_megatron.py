"""A dataset is megatron-core's, sample for sample, over random corpora, blends, splits, lengths, epochs and
seeds.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from corpora import megatron_datasets, megatron_sample, write_corpus
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.config.derived import split_shares
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.blend import split_documents
from megatron_hyperrouter.data.stream.dataset import Dataset, build_splits
from megatron_hyperrouter.errors import DataError

NAMES = ("train", "valid", "test")
in_tmp_path = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=100,
)


def ours(
    words: tuple[str, ...], split: str | None, number: int, samples: int | None, **order: int
) -> Dataset | None:
    """Split ``number`` alone; without ``split`` the files are its own."""
    wanted: Any = {f"{name}_samples": samples if place == number else 0 for place, name in enumerate(NAMES)}
    if split:
        data = DataConfig(data_path=words, split=split)
    else:  # training must have files, too
        data = DataConfig(**{"train_data_path": words, f"{NAMES[number]}_data_path": words})
    found: Dataset | None = getattr(build_splits(data, vocab_size=1000, **order, **wanted), NAMES[number])
    return found


def theirs(
    prefixes: list[str],
    weights: list[float] | None,
    split: str | None,
    number: int,
    samples: int | None,
    **order: int,
) -> Any:
    """The same from megatron-core's own builder."""
    each = [(prefixes, weights) if place == number else None for place in range(3)]
    where: dict[str, Any] = (
        {"blend": (prefixes, weights), "split": split} if split else {"blend_per_split": each}
    )
    return megatron_datasets(
        tuple(samples if place == number else 0 for place in range(3)), **order, **where
    )[number]


def test_random_settings_give_the_samples_of_megatron_core(tmp_path: Path) -> None:
    met = Counter[str]()

    @in_tmp_path
    @given(
        corpora=st.lists(
            st.lists(st.sampled_from([0, 1, 2, 17, 40, 90]), min_size=8, max_size=40), min_size=1, max_size=4
        ),
        weights=st.one_of(st.none(), st.lists(st.floats(0.01, 100.0), min_size=4, max_size=4)),
        split=st.sampled_from([None, "2,1,1", "1,1,0", "1,0,0", "90,5,5"]),
        number=st.sampled_from([0, 1, 2]),
        seq_length=st.sampled_from([1, 2, 7, 24]),
        samples=st.one_of(st.integers(1, 40), st.integers(1, 1500), st.none()),
        seed=st.integers(0, 2**32 - 1),
    )
    @example([[30] * 9], [1.0] * 4, "1,0,0", 0, 5, 200, 1)
    @example([[30] * 9, [7] * 50], None, None, 2, 5, 40, 1)
    @example([[30] * 9, [7] * 50], [1.0, 2.0, 1.0, 1.0], "2,1,1", 1, 5, 90, 1)
    def compare(corpora, weights, split, number, seq_length, samples, seed):
        # a folder of its own: megatron-core would find the index of the last corpus under the same name
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        prefixes = [
            write_corpus(folder / str(place), sizes, seed=place) for place, sizes in enumerate(corpora)
        ]
        weights = None if weights is None else weights[: len(corpora)]
        if weights is not None and samples is None:
            samples = 50  # such a blend has no epoch
        words = tuple(prefixes)
        if weights is not None:
            words = tuple(word for pair in zip(map(str, weights), prefixes, strict=True) for word in pair)
        order = {"seq_length": seq_length, "seed": seed}
        spans = [split_documents(split or "1,0,0", len(sizes)) for sizes in corpora]
        tokens = [
            [sum(sizes[part.start : part.stop]) for part in three]
            for sizes, three in zip(corpora, spans, strict=True)
        ]
        own = [three[number if split else 0] for three in tokens]
        try:
            mine = ours(words, split, number, samples, **order)
        except DataError as error:
            assert "one sample needs" in error.message and min(own) <= seq_length
            met["too short"] += 1
            return
        if mine is None:
            assert not any(three[number] for three in spans)
            met["no documents"] += 1
            return
        assert min(own) > seq_length
        shares = split_shares(split) if split else ()
        if any(share and not sums[place] for sums in tokens for place, share in enumerate(shares)):
            met["a split without tokens"] += 1  # megatron-core counts its epochs for ever
            return
        if weights is None and samples is not None and len(corpora) > 1:
            once = ours(words, split, number, None, **order)
            assert once is not None
            if samples > len(once):  # megatron-core gives what there is
                met["more than an epoch without weights"] += 1
                return
        expected = theirs(prefixes, weights, split, number, samples, **order)
        assert len(mine) == len(expected)
        for i in {*range(min(len(mine), 40)), *range(max(len(mine) - 40, 0), len(mine))}:
            np.testing.assert_array_equal(mine[i], megatron_sample(expected, i))
        met[
            f"{NAMES[number]}, {'weights' if weights else 'no weights'}, "
            f"{'one' if len(corpora) == 1 else 'several'}"
        ] += 1

    compare()
    compared = [name.split(", ") for name in met.elements() if ", " in name]
    assert len(compared) > 30, met
    assert {name for kinds in compared for name in kinds} == {
        *NAMES,
        "weights",
        "no weights",
        "one",
        "several",
    }, met
