"""Samples of token files: pieces of fixed length in a random order that depends only on the seed, from one
file or a blend of several.

``S`` is the sequence length; a sample is S + 1 tokens: positions 0 .. S - 1 are the inputs, 1 .. S their
labels. Sample i is the same as that of megatron-core 0.16's ``GPTDataset`` or ``BlendedDataset`` for the
same files, split and seed, unless the file has an on-demand index (``--data-index``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.order.blend import (
    Blend,
    blend_sizes,
    normalise,
    parse_blend,
    set_counts,
    split_documents,
)
from megatron_hyperrouter.data.order.index_files import IndexCache, NamedArrays
from megatron_hyperrouter.data.order.on_demand import OnDemandOrder
from megatron_hyperrouter.data.order.packed import PackedDataset, Packing, pack
from megatron_hyperrouter.data.order.shuffled import (
    Order,
    SampleOrder,
    Span,
    check_room,
    order_of,
    plan_order,
)
from megatron_hyperrouter.data.stream.stores import MOCK, cache_key, open_store
from megatron_hyperrouter.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import DataConfig
    from megatron_hyperrouter.data.order.index import Implementation
    from megatron_hyperrouter.data.store.token_files import IndexedDataset

Sample = npt.NDArray[np.int64]
SPLITS = ("train", "valid", "test")
ON_DEMAND_FROM = 2**25  # sequences of a file; an epoch of that many takes a second and a gigabyte to shuffle


class Dataset(Protocol):
    """Samples by number."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``: int64 [S + 1].  IndexError outside 0 .. len - 1; DataError for a token id outside the
        vocabulary.
        """
        ...


@dataclass(frozen=True)
class Splits:
    """The datasets of a run; None: no samples were requested, or the split has no documents."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None


class SequenceDataset:
    """The samples of one file in the order that is given, by any number of threads."""

    def __init__(
        self,
        store: IndexedDataset,
        order: Order,
        *,
        seq_length: int,
        vocab_size: int,
        impl: Implementation | None = None,
    ) -> None:
        self.store, self.order, self.seq_length, self.vocab_size = store, order, seq_length, vocab_size
        self._impl = impl or index.IMPLEMENTATIONS[index.implementation()]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.order)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``: int64 [S + 1].  IndexError outside 0 .. len - 1; DataError for a token id outside the
        vocabulary.
        """
        return self.read(self.order.span(i), self.seq_length + 1)

    def read(self, span: Span, length: int) -> Sample:
        """The ``length`` tokens of a span."""
        store, sample = self.store, np.empty(length, np.int64)
        store.check_length()
        bad = self._impl.gather(store.tokens, store.pointers, store.sizes, *span, self.vocab_size, sample)
        if bad >= 0:
            raise self._foreign_token(span, bad, int(sample[bad]))
        return sample

    def _foreign_token(self, span: Span, bad: int, token: int) -> DataError:
        """Find the document and the byte of token number ``bad`` of a sample."""
        offset = span.begin + bad
        for position in range(span.first, span.last + 1):
            sequence = int(span.documents[position])
            if offset < self.store.sizes[sequence]:
                break
            offset -= int(self.store.sizes[sequence])
        return self.store.foreign_token(sequence, offset, token, self.vocab_size)


class BlendedDataset:
    """Samples of several datasets, mixed: sample i is sample ``sample_index[i]`` of dataset
    ``dataset_index[i]``.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        dataset_index: npt.NDArray[np.int16],
        sample_index: npt.NDArray[np.int64],
    ) -> None:
        self.datasets, self.dataset_index, self.sample_index = tuple(datasets), dataset_index, sample_index

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``: int64 [S + 1].  IndexError outside 0 .. len - 1; DataError for a token id outside the
        vocabulary.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is out of range: there are {len(self)} samples")
        return self.datasets[int(self.dataset_index[i])][int(self.sample_index[i])]


def build_splits(
    data: DataConfig,
    *,
    seq_length: int,
    seed: int,
    vocab_size: int,
    train_samples: int | None,
    valid_samples: int | None,
    test_samples: int | None,
    eod: int | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    cache: IndexCache | None = None,
    impl: Implementation | None = None,
) -> Splits:
    """The datasets of a run, each with at least the requested number of samples (None: one epoch; 0: no
    dataset).

    ``data.data_path`` is divided by ``data.split``; without it, each split has separate files.  Validation
    and test may have no documents at all, and are then None.  ``eod``: the id that ends a document, for
    ``--pack-documents``. ``cache``: place of index files; by default as ``data`` says.

    Raises DataError for files that are unusable, empty, or shorter than one sample.
    """
    if not data.data_path and not data.train_data_path and not data.mock_data:
        remedy = "add --data-path PREFIX (mhr preprocess writes such data), --train-data-path or --mock-data"
        raise ConfigError([Problem("--data-path", "()", "there is no training data", remedy)])
    builder = Builder(
        data, seq_length, seed, vocab_size, cache or IndexCache(data.data_cache_path), impl, eod, tokenizer
    )
    samples = (train_samples, valid_samples, test_samples)
    return Splits(*(builder.build(number, wanted) for number, wanted in enumerate(samples)))


@dataclass
class Builder:
    """Builds the datasets of one run; a file that several splits read is opened once."""

    data: DataConfig
    seq_length: int
    seed: int
    vocab_size: int
    cache: IndexCache
    impl: Implementation | None = None
    eod: int | None = None  # the id that ends a document; needed for packing
    tokenizer: Mapping[str, Any] | None = None  # identity of the tokenizer that the data must have; None: any
    stores: dict[str, IndexedDataset] = field(default_factory=dict)
    # for how many samples each index was made, in the order of the calls of one()
    asked: list[int | None] = field(default_factory=list)

    def build(self, number: int, num_samples: int | None) -> Dataset | None:
        """Dataset of split ``number``."""
        flag, words = self.words(number)
        if num_samples == 0 or not words:
            return None
        blend = parse_blend(words, flag=flag)
        if number > 0 and not any(self.documents(prefix, number) for prefix in blend.prefixes):
            return None
        return self.mixed(blend, number, num_samples)

    def words(self, number: int) -> tuple[str, tuple[str, ...]]:
        """The flag that names the files of split ``number``, and its value."""
        data = self.data
        if data.mock_data:
            return MOCK, (MOCK,)
        if data.data_path:
            return "--data-path", data.data_path
        own = (data.train_data_path, data.valid_data_path, data.test_data_path)[number]
        return f"--{SPLITS[number]}-data-path", own

    def mixed(self, blend: Blend, number: int, num_samples: int | None) -> Dataset:
        """The files of a blend, or the one file."""
        # megatron-core treats one prefix with a weight as a blend of one, but only where --split divides it.
        if len(blend.prefixes) == 1 and (blend.weights is None or not self.data.data_path):
            return self.one(blend.prefixes[0], number, num_samples)
        return self.blended(blend, number, num_samples)

    def blended(self, blend: Blend, number: int, num_samples: int | None) -> BlendedDataset:
        """Several files with the given weights; without weights, each sample at most once, as long as
        there are samples.
        """
        weights = blend.weights
        if weights is None:
            parts = [self.one(prefix, number, None) for prefix in blend.prefixes]
            lengths = [len(part) for part in parts]
            if num_samples is None:
                return BlendedDataset(parts, *self.mix(blend, lengths, None))
            weights = normalise(lengths)
            if num_samples <= sum(lengths):
                return BlendedDataset(parts, *self.mix(blend, weights, num_samples))
            # More than one epoch: megatron-core stops here; we continue with the same shares.
        elif num_samples is None:
            raise ValueError("num_samples must be given for a blend with weights")
        sets, samples, needed = self.weighted(blend, weights, num_samples)
        parts = [
            self.one(prefix, number, count) for prefix, count in zip(blend.prefixes, needed, strict=True)
        ]
        return BlendedDataset(parts, sets, samples)

    def weighted(
        self, blend: Blend, weights: Sequence[float], num_samples: int
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64], list[int]]:
        """Set and sample of each sample of a blend in these shares, and for how many samples each set is
        built.
        """
        size, built = blend_sizes(weights, num_samples)
        sets, samples = self.mix(blend, normalise(weights), size)
        # The surplus can be too small for many small sets, where megatron-core gives up.
        return sets, samples, [max(pair) for pair in zip(built, set_counts(sets, len(built)), strict=True)]

    def samples_of(self, blend: Blend, lengths: Sequence[int], num_samples: int) -> list[int | None]:
        """For how many samples the index of each file is built (None: one epoch), where their epochs have
        ``lengths`` samples and training reads ``num_samples`` of them all.
        """
        if len(blend.prefixes) == 1 and (blend.weights is None or not self.data.data_path):
            return [num_samples]
        if blend.weights is None and num_samples <= sum(lengths):
            return [None] * len(lengths)
        return [*self.weighted(blend, blend.weights or normalise(lengths), num_samples)[2]]

    def same_order(self, entry: Mapping[str, Any], asked: int | None) -> bool:
        """Whether the index of a file in the ledger has the same order when it is built for ``asked``
        samples.
        """
        if (entry["asked"] is None) != (asked is None):
            return False
        if entry["on_demand"]:
            return True
        before, now = (
            plan_order(entry["tokens"], seq_length=self.seq_length, num_samples=number)
            for number in (entry["asked"], asked)
        )
        return before == now

    def mix(self, blend: Blend, shares: Sequence[float], size: int | None) -> index.BlendIndices:
        """Set and sample of each of ``size`` samples in these shares; None: until sets of these sizes are
        used up.
        """

        def build() -> NamedArrays:
            made = (
                index.exhaustive_blending_indices(shares, impl=self.impl)
                if size is None
                else index.blending_indices(shares, size, impl=self.impl)
            )
            yield from zip(("sets", "samples"), made, strict=True)

        key = {
            "kind": "megatron-core 0.16 BlendedDataset",
            "shares": [float(share).hex() for share in shares],
            "size": size,
        }
        found = self.cache.arrays(
            key,
            ("sets", "samples"),
            build,
            beside=blend.prefixes[0],
            numbers=2 * (round(sum(shares)) if size is None else size),
        )
        return found["sets"], found["samples"]

    def one(self, prefix: str, number: int, num_samples: int | None) -> Dataset:
        """One file, or its part in this split."""
        store, documents = self.open(prefix), self.documents(prefix, number)
        self.check_length(store, documents, number)
        self.asked.append(num_samples)
        if self.data.pack_documents:
            return self.packed(store, documents, num_samples)
        order = self.order(store, documents, num_samples)
        return SequenceDataset(
            store, order, seq_length=self.seq_length, vocab_size=self.vocab_size, impl=self.impl
        )

    def check_length(self, store: IndexedDataset, documents: range, number: int) -> int:
        """Tokens that these documents hold; DataError if they are fewer than one sample."""
        tokens = self.tokens(store, documents)
        if tokens < self.seq_length + 1:
            part = (
                f"the {SPLITS[number]} split has {len(documents)} of the {len(store)} documents, with "
                f"{tokens} tokens"
            )
            raise DataError(
                (
                    f"{store.bin_path}: {part}, but one sample needs {self.seq_length + 1} "
                    f"tokens (--seq-length {self.seq_length}, plus 1 for the last label)"
                ),
                remedy="use more text, a smaller --seq-length, or another --split",
            )
        return tokens

    def packed(self, store: IndexedDataset, documents: range, num_samples: int | None) -> PackedDataset:
        """Samples of whole documents."""
        if self.eod is None:
            raise ValueError("packing documents needs eod, the token id that ends a document")
        length = self.seq_length + 1
        key = {
            "kind": "packed documents",
            "file": cache_key(store),
            "documents": [documents.start, documents.stop],
            "seed": self.seed,
            "length": length,
        }

        def build() -> NamedArrays:
            yield from vars(
                pack(store.sizes, documents, length=length, seed=self.seed, impl=self.impl)
            ).items()

        packing = Packing(
            **self.cache.arrays(
                key, ("documents", "begins", "starts"), build, beside=store.prefix, numbers=3 * len(documents)
            )
        )
        return PackedDataset(
            store,
            packing,
            seq_length=self.seq_length,
            vocab_size=self.vocab_size,
            eod=self.eod,
            seed=self.seed,
            num_samples=num_samples,
            impl=self.impl,
        )

    def order(self, store: IndexedDataset, documents: range, num_samples: int | None) -> Order:
        """The samples of these documents, made from the kind of index that the file has."""
        if self.on_demand(store):
            return OnDemandOrder(
                store,
                documents,
                seq_length=self.seq_length,
                num_samples=num_samples,
                seed=self.seed,
                impl=self.impl,
            )
        plan = plan_order(self.tokens(store, documents), seq_length=self.seq_length, num_samples=num_samples)
        key = {
            "kind": "megatron-core 0.16 GPTDataset",
            "file": cache_key(store),
            "documents": [documents.start, documents.stop],
            "seed": self.seed,
            "seq_length": self.seq_length,
            **asdict(plan),
        }

        def build() -> NamedArrays:
            check_room(store.prefix, plan, len(documents), self.seq_length)
            return order_of(
                plan, store.sizes, documents, seq_length=self.seq_length, seed=self.seed, impl=self.impl
            )

        names = ("document_index", "sample_index", "shuffle_index")
        numbers = plan.epochs * (len(documents) + 3 * plan.tokens_per_epoch // self.seq_length)
        return SampleOrder(**self.cache.arrays(key, names, build, beside=store.prefix, numbers=numbers))

    def on_demand(self, store: IndexedDataset) -> bool:
        """Whether the index of this file is looked up rather than built: the same for all its splits and
        whatever the run's length.
        """
        if self.data.pack_documents:
            return False
        if store.prefix == MOCK:  # has no folder for an index
            return True
        kind = self.data.data_index
        return kind == "on-demand" or (kind == "auto" and len(store) >= ON_DEMAND_FROM)

    def tokens(self, store: IndexedDataset, documents: range) -> int:
        """Tokens that these documents hold."""
        if self.on_demand(store):
            begin, end = store.first_tokens((documents.start, documents.stop)).tolist()
            return int(end - begin)
        return int(store.sizes[documents.start : documents.stop].sum(dtype=np.int64))

    def documents(self, prefix: str, number: int) -> range:
        """The documents of a file that split ``number`` reads."""
        count = len(self.open(prefix))
        divided = self.data.data_path and prefix != MOCK
        return split_documents(self.data.split, count)[number] if divided else range(count)

    def open(self, prefix: str) -> IndexedDataset:
        """The file, checked."""
        if prefix not in self.stores:
            store = open_store(prefix, self.tokenizer, vocab_size=self.vocab_size, eod=self.eod)
            if not self.on_demand(store):
                store.check()
            self.stores[prefix] = store
        return self.stores[prefix]
