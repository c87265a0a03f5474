"""The training samples of a run whose mix, sequence length or batch size changes, and the ledger of what
it has read.

A run is a list of segments.  Within a segment, nothing changes that affects the order of samples.  At its
end, each of its files has been read up to some sample, and the next segment that reads the file continues
with what is left (:mod:`remaining`).  A ledger is the list of these segments, as JSON: their settings, and
the number of samples that each file has given.  The samples of the next segment are a pure function of the
ledger and of its settings.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_hyperrouter import console
from megatron_hyperrouter.data.order.blend import normalise, parse_blend, set_counts
from megatron_hyperrouter.data.order.on_demand import OnDemandOrder
from megatron_hyperrouter.data.order.shuffled import SampleOrder
from megatron_hyperrouter.data.stream.dataset import (
    BlendedDataset,
    Builder,
    Dataset,
    Sample,
    SequenceDataset,
    Splits,
)
from megatron_hyperrouter.data.stream.file_identity import (
    Identity,
    Ledger,
    changed_settings,
    check_unchanged,
    identity,
    repeated,
    same_text,
    under_present_names,
)
from megatron_hyperrouter.data.stream.remaining import BuiltStream, Remaining, RemainingOrder
from megatron_hyperrouter.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
    from megatron_hyperrouter.data.store.token_files import IndexedDataset

# (completed steps after which the mix begins, words of --data-path)
Mixes = Sequence[tuple[int, tuple[str, ...]]]


class RemainingDataset:
    """Samples of the unread part of one file."""

    def __init__(self, order: RemainingOrder, *, size: int, whole: SequenceDataset) -> None:
        """``whole``: reads the spans of the file."""
        self._order, self._size, self._whole = order, size, whole

    def __len__(self) -> int:
        """Number of samples."""
        return self._size

    def __getitem__(self, i: int) -> Sample:
        """See :class:`Dataset`."""
        if not 0 <= i < self._size:
            raise IndexError(f"sample {i} is out of range: there are {self._size} samples")
        sample: Sample = np.concatenate(
            [self._whole.read(span, length) for span, length in self._order.spans(i)]
        )
        return sample


@dataclass
class _Set:
    """One file: what is unread of it, and the streams that this refers to."""

    store: IndexedDataset
    stream: OnDemandOrder
    seed: int
    built: BuiltStream | None = None
    unread: Remaining | None = None  # None: nothing was read yet


class TrainingSamples:
    """The training samples of all steps, one step after the other."""

    def __init__(
        self,
        segments: list[tuple[int, Dataset, dict[str, Any]]],
        past: Ledger,
        *,
        num_samples: int,
        sizes: BatchSizes,
    ) -> None:
        self._segments, self._past, self._num_samples, self._sizes = segments, past, num_samples, sizes

    def __len__(self) -> int:
        """Number of samples."""
        return self._num_samples

    def __getitem__(self, i: int) -> Sample:
        """See :class:`Dataset`."""
        for first_step, dataset, _ in reversed(self._segments):
            if (place := i - self._sizes.samples(first_step)) >= 0:
                sample: Sample = dataset[place]
                return sample
        raise IndexError(f"sample {i} was read before this run was resumed")

    def consumed(self, step: int) -> tuple[int, int]:
        """Number of samples, and of their input tokens, that the whole run has read after ``step`` steps,
        over all changes of settings.
        """
        first_step, _, now = self._segments[0]
        parts = [(sum(one["samples"] for one in entry["sets"]), entry) for entry in self._past]
        parts.append((self._sizes.samples(step) - self._sizes.samples(first_step), now))
        samples = sum(count for count, _ in parts)
        return samples, sum(count * entry["seq_length"] for count, entry in parts)

    def files(self) -> dict[str, Identity | None]:
        """Each file that the run has read or will read, and its identity where the ledger has it."""
        parts = [*self._past, *(settings for _, _, settings in self._segments)]
        return {entry["path"]: entry.get("file") for part in parts for entry in part["sets"]}

    def ledger(self, step: int) -> Ledger:
        """A record of what has been read after ``step`` steps."""
        told = list(self._past)
        for number, (first_step, dataset, settings) in enumerate(self._segments):
            if step <= first_step and number:
                break
            ends = [start for start, _, _ in self._segments[number + 1 :]]
            until = min([step, *ends])
            read = self._sizes.samples(until) - self._sizes.samples(first_step)
            counts = _counts(dataset, read, len(settings["sets"]))
            sets = [
                {**entry, "samples": count} for entry, count in zip(settings["sets"], counts, strict=True)
            ]
            told.append({**settings, "until_step": until, "sets": sets})
        return told


def build_training_samples(
    builder: Builder,
    mixes: Mixes,
    ledger: Ledger,
    *,
    step: int,
    train_iters: int,
    sizes: BatchSizes,
) -> TrainingSamples:
    """Samples of the steps from ``step`` (completed ones) to ``train_iters``; ``ledger`` says what was
    read before.

    ``mixes``: the mix from each step on; the first begins at 0.  DataError if a file is not the one that
    was read, CheckpointError if ``--split`` gives training another part of it.
    """
    if not ledger:  # of no run, or of one without a ledger
        step = 0
    first = max(number for number, (start, _) in enumerate(mixes) if start <= step)
    files = _identities(
        builder, [words for start, words in mixes[first:] if start <= step or start < train_iters]
    )
    past, sets = under_present_names(ledger, files), dict[str, _Set]()
    recorded = {entry["path"]: entry.get("file") for segment in past for entry in segment["sets"]}
    for prefix, now_known in files.items():
        if recorded.get(prefix):
            check_unchanged(builder.open(prefix), recorded[prefix], now_known, builder.cache)
    for entry in (entry for segment in past for entry in segment["sets"] if entry["path"] in files):
        _check_part(entry, builder)
    end = min([train_iters, *(start for start, _ in mixes[first + 1 :])])
    now, last = _settings(builder, mixes[first][1], sizes), past[-1] if past else None
    same = last is not None and now == {name: last.get(name, False) for name in now}
    if last is not None and (now["pack_documents"] or last.get("pack_documents")):
        longer = sizes.samples(end) - sizes.samples(last["from_step"]) > last["planned"]
        _check_packed(now, last, longer=longer)
        step = int(last["from_step"])
        past, last = [], None  # nothing was built for a number of samples
    elif last is not None and same:
        earlier = {entry["path"] for segment in past[:-1] for entry in segment["sets"] if entry["samples"]}
        planned = sizes.samples(end) - sizes.samples(last["from_step"])
        last = _planned_for(builder, mixes[first][1], last, earlier, samples=planned)
        if last is not None:
            past.pop()
        else:
            console.note(
                "the new --train-iters changes the order of samples; continuing with "
                "data that the run has not read yet"
            )
    else:
        if last is not None and len(mixes) == 1:  # a schedule changes its mix as planned
            _tell_of_other_mix(last["mix"], now["mix"])
        last = None
    for segment in past:  # except for files that are no longer read, which may be gone
        _replay(
            {**segment, "sets": [entry for entry in segment["sets"] if entry["path"] in files]}, builder, sets
        )
    segments: list[tuple[int, Dataset, dict[str, Any]]] = []
    starts = [int(last["from_step"]) if last else step, *(start for start, _ in mixes[first + 1 :])]
    for number, (start, (_, words)) in enumerate(zip(starts, mixes[first:], strict=True)):
        if start >= train_iters and number:
            break
        samples = sizes.samples(min([train_iters, *starts[number + 1 :]])) - sizes.samples(start)
        dataset, settings = _segment(builder, words, sets, last if number == 0 else None, samples=samples)
        settings["sets"] = [{**entry, "file": files[entry["path"]]} for entry in settings["sets"]]
        segments.append(
            (start, dataset, {"from_step": start, **_settings(builder, words, sizes), **settings})
        )
        if number + 1 < len(starts):  # another one follows, which reads on
            counts = _counts(dataset, samples, len(settings["sets"]))
            done = [
                {**entry, "samples": count} for entry, count in zip(settings["sets"], counts, strict=True)
            ]
            _replay({**segments[-1][2], "sets": done}, builder, sets)
    return TrainingSamples(segments, past, num_samples=sizes.samples(train_iters), sizes=sizes)


def _identities(builder: Builder, mixes: Sequence[Sequence[str]]) -> dict[str, Identity]:
    """The identity of each file of these mixes."""
    prefixes = dict.fromkeys(
        prefix for words in mixes for prefix in parse_blend(words, flag="--data-path").prefixes
    )
    files = {prefix: identity(builder.open(prefix)) for prefix in prefixes}
    _warn_of_repeated(mixes, files)
    return files


def _warn_of_repeated(mixes: Sequence[Sequence[str]], files: Mapping[str, Identity]) -> None:
    """Report text that a blend contains twice: it would be read twice an epoch."""
    for words in mixes:
        prefixes = parse_blend(words, flag="--data-path").prefixes
        for prefix in sorted({each for each in prefixes if prefixes.count(each) > 1}):
            console.warn(f"the blend contains {prefix} twice")
        for prefix, earlier in repeated({prefix: files[prefix] for prefix in prefixes}):
            console.warn(f"{prefix} has the same text as {earlier}, so the blend reads it twice")


def _tell_of_other_mix(before: Sequence[str], now: Sequence[str]) -> None:
    """Report files or weights that are not those of the checkpoint."""
    if list(before) != list(now):
        was, is_now = (" ".join([*words[:8], "..."][: len(words) or 1]) for words in (before, now))
        console.note(
            f"the training data were {was} in the checkpoint and are now {is_now}: the run continues with "
            "data that it has not read yet"
        )


def _planned_for(
    builder: Builder,
    words: Sequence[str],
    last: Mapping[str, Any],
    earlier: Container[str],
    *,
    samples: int,
) -> dict[str, Any] | None:
    """The last segment of a ledger, planned for ``samples`` samples; None if that has another order.

    A longer run has the order of the shorter one if the index of each file has the same number of epochs.
    ``earlier``: files that were partly read before that segment, whose index has no length.
    """
    if samples <= last["planned"]:
        return dict(last)
    blend = parse_blend(words, flag="--data-path")
    lengths = [(entry["tokens"] - 1) // builder.seq_length for entry in last["sets"]]
    if blend.weights is None and len(lengths) > 1 and samples > sum(lengths) >= last["planned"]:
        return None  # its shares follow from the length
    asked = builder.samples_of(blend, lengths, samples)
    sets = []
    for entry, wanted in zip(last["sets"], asked, strict=True):
        if entry["path"] not in earlier and not builder.same_order(entry, wanted):
            return None
        sets.append({**entry, "asked": wanted})
    return {**last, "planned": samples, "sets": sets}


def _check_part(entry: Mapping[str, Any], builder: Builder) -> None:
    """The documents of a file that training reads are those of the ledger."""
    found = _entry(builder, entry["path"], None)
    if any(found[name] != entry[name] for name in ("documents", "tokens")):
        raise CheckpointError(
            (
                f"{entry['path']}: the run has read documents {entry['documents']} with {entry['tokens']} "
                f"tokens, but these settings select documents {found['documents']} "
                f"with {found['tokens']} tokens"
            ),
            remedy="use the files and the --split of that run, or start a new run from its weights with "
            "--finetune",
        )


def _check_packed(now: Mapping[str, Any], last: Mapping[str, Any], *, longer: bool) -> None:
    """Packed samples are not pieces of a stream, so unread packed samples cannot be divided in another
    way, nor can unread pieces of a stream be packed.
    """
    changed = changed_settings(now, last)
    if longer and parse_blend(now["mix"], flag="--data-path").weights is None and len(now["mix"]) > 1:
        changed.append(
            f"the run was planned for {last['planned']} samples and is now longer, "
            "which changes how files without weights are blended"
        )
    if changed:
        raise CheckpointError(
            "with --pack-documents, settings that affect the order of samples cannot change: "
            + "; ".join(changed),
            remedy="use the settings of that run, or start a new run from its weights with --finetune",
        )


def splits_of_run(
    builder: Builder,
    mixes: Mixes,
    ledger: Ledger,
    *,
    step: int,
    train_iters: int,
    sizes: BatchSizes,
    valid_samples: int,
    test_samples: int,
) -> Splits:
    """Like ``build_splits``, but with the training samples of the whole run."""
    course = build_training_samples(builder, mixes, ledger, step=step, train_iters=train_iters, sizes=sizes)
    _warn_of_shared(builder, course.files(), valid_samples, test_samples)
    return Splits(course, builder.build(1, valid_samples), builder.build(2, test_samples))


def _warn_of_shared(
    builder: Builder, trained: Mapping[str, Identity | None], valid_samples: int, test_samples: int
) -> None:
    """Report text for validation or the test that training also reads, by whatever name, if each split has
    separate files.
    """
    data = builder.data
    if data.data_path:
        return
    for name, words, samples in (
        ("validation", data.valid_data_path, valid_samples),
        ("test", data.test_data_path, test_samples),
    ):
        prefixes = parse_blend(words, flag=f"--{name}-data-path").prefixes if words else ()
        for prefix in sorted(set(prefixes)):
            if prefix in trained:
                console.warn(f"{prefix} is used for training and also for {name}")
            elif samples and (twin := same_text(identity(builder.open(prefix)), trained)):
                console.warn(f"{prefix}, used for {name}, has the same text as {twin}, used for training")


def _settings(builder: Builder, words: Sequence[str], sizes: BatchSizes) -> dict[str, Any]:
    """The settings that determine the order of samples in a segment."""
    return {
        "mix": list(words),
        "split": builder.data.split if builder.data.data_path else None,
        "seq_length": builder.seq_length,
        "global_batch_size": sizes.full,
        "rampup_batch_size": sizes.rampup is not None and list(sizes.rampup),
        "seed": builder.seed,
        "data_index": builder.data.data_index,
        "pack_documents": builder.data.pack_documents,
    }


def _segment(
    builder: Builder,
    words: Sequence[str],
    sets: Mapping[str, _Set],
    last: Mapping[str, Any] | None,
    *,
    samples: int,
) -> tuple[Dataset, dict[str, Any]]:
    """``samples`` samples of a mix, and the ledger's entry for them; ``last``: the segment of the ledger
    that continues.
    """
    blend, planned = parse_blend(words, flag="--data-path"), samples if last is None else int(last["planned"])
    if not sets and last is None:  # the order of megatron-core, as of a run that never changes
        dataset = builder.mixed(blend, 0, samples)
        built = zip(blend.prefixes, builder.asked[-len(blend.prefixes) :], strict=True)
        return dataset, {"planned": planned, "sets": [_entry(builder, *each) for each in built]}
    tokens = [
        builder.check_length(builder.open(prefix), builder.documents(prefix, 0), 0)
        for prefix in blend.prefixes
    ]
    lengths = [(count - 1) // builder.seq_length for count in tokens]
    shares = normalise(lengths) if blend.weights is None else blend.weights
    if blend.weights is not None or planned > sum(lengths):
        shares = normalise(shares)
    mixed = builder.mix(blend, shares, samples) if len(blend.prefixes) > 1 else None
    counts = [samples] if mixed is None else set_counts(mixed[0], len(blend.prefixes))
    # a file can be in the mix twice, so its entry is found by its place
    asked = counts if last is None else [entry["asked"] for entry in last["sets"]]
    parts: list[Dataset] = []
    entries = []
    for prefix, wanted, count in zip(blend.prefixes, asked, counts, strict=True):
        entries.append(_entry(builder, prefix, wanted))
        parts.append(_part(builder, prefix, sets.get(prefix), asked=wanted, size=count))
    dataset = parts[0] if mixed is None else BlendedDataset(parts, *mixed)
    return dataset, {"planned": planned, "sets": entries}


def _part(builder: Builder, prefix: str, known: _Set | None, *, asked: int | None, size: int) -> Dataset:
    """The samples of one file."""
    if known is None or known.unread is None:
        return builder.one(prefix, 0, asked)
    order = RemainingOrder(
        known.unread,
        known.stream,
        known.built,
        seq_length=builder.seq_length,
        seed=known.seed,
        impl=builder.impl,
    )
    whole = SequenceDataset(
        known.store,
        known.stream,
        seq_length=builder.seq_length,
        vocab_size=builder.vocab_size,
        impl=builder.impl,
    )
    return RemainingDataset(order, size=size, whole=whole)


def _entry(builder: Builder, prefix: str, asked: int | None) -> dict[str, Any]:
    """What a ledger says about a file, except for the samples read; ``asked``: for how many its index was
    built.
    """
    store, documents = builder.open(prefix), builder.documents(prefix, 0)
    return {
        "path": prefix,
        "documents": [documents.start, documents.stop],
        "tokens": builder.tokens(store, documents),
        "on_demand": builder.on_demand(store),
        "asked": asked,
    }


def _replay(segment: Mapping[str, Any], builder: Builder, sets: dict[str, _Set]) -> None:
    """Advance ``sets`` by one segment."""
    length, seen = int(segment["seq_length"]), set()
    for entry in segment["sets"]:
        prefix, read = entry["path"], int(entry["samples"])
        if prefix in seen:
            raise CheckpointError(
                f"{prefix}: the checkpoint's data mix lists this file twice, so its unread part is unknown",
                remedy="use the settings of that run, or start a new run from its weights with --finetune",
            )
        seen.add(prefix)
        if not read:
            continue
        if prefix not in sets:
            store, documents, seed = builder.open(prefix), builder.documents(prefix, 0), int(segment["seed"])
            stream = OnDemandOrder(
                store, documents, seq_length=1, num_samples=1, seed=seed, impl=builder.impl
            )
            sets[prefix] = _Set(store, stream, seed)
            if not entry["on_demand"]:
                data = replace(builder.data, data_index="materialised")
                index_of = replace(builder, data=data, seq_length=length, seed=seed).order(
                    store, documents, entry["asked"]
                )
                assert isinstance(index_of, SampleOrder)
                sets[prefix].built = BuiltStream(index_of, store.sizes)
        known = sets[prefix]
        if known.unread is None and known.built is not None:
            known.unread = known.built.after(read, length)
        else:
            # The samples of one epoch were shuffled without those that begin in it and end in the next.
            limit = (
                (entry["tokens"] - 1) // length if known.unread is None and entry["asked"] is None else None
            )
            before = known.unread or Remaining()
            order = RemainingOrder(
                before,
                known.stream,
                known.built,
                seq_length=length,
                seed=known.seed,
                limit=limit,
                impl=builder.impl,
            )
            known.unread = order.after(read)


def _counts(dataset: Dataset, read: int, sets: int) -> list[int]:
    """How many of the first ``read`` samples each file gives."""
    if not isinstance(dataset, BlendedDataset):
        return [read]
    return set_counts(dataset.dataset_index[:read], sets)
