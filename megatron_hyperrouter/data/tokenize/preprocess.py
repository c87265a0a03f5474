"""Text files to token files: read, encode in worker processes, write in order; the next run continues one
that was killed.

Memory is bounded: only a few batches are processed at a time, and the results of a batch are written
before the next is read.  The output depends only on the inputs and the tokenizer, not on the number of
workers, machines or interruptions. Documents are like Megatron-LM's: an empty text is an empty document,
and the end-of-document token joins the last sequence of a document that has any token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from megatron_hyperrouter.data.store.journal import Journal
from megatron_hyperrouter.data.store.manifest import Manifest, write_manifest
from megatron_hyperrouter.data.store.pair_writer import (
    Counts,
    DiskRefused,
    FileSum,
    PairWriter,
    changed_since,
    holds,
    put_in_place,
    remove_partial,
)
from megatron_hyperrouter.data.text.corpus import (
    BadLine,
    BadText,
    ReadPosition,
    begins_with,
    checksum_of,
    documents,
    read_batches,
)
from megatron_hyperrouter.data.text.inputs import WHOLE, InputRange, facts_of, repeated, total_bytes
from megatron_hyperrouter.data.tokenize.backends import choose_encoder
from megatron_hyperrouter.data.tokenize.encode import Encoder, EncodeSettings, encode_all
from megatron_hyperrouter.errors import ConfigError, DataError, Problem

__all__ = ["EncodeSettings", "Job", "Written", "preprocess"]
_CHECKED_CHARACTERS = 1 << 18  # of the first documents are encoded by two back ends, and compared
_LONGEST_NAME = 255  # bytes: of Linux' file systems
_MOST_WORKERS = 1024  # each holds batches of text, and more workers than cores do not help
SAVE_SECONDS = 10.0


class InputChanged(DataError):
    """Another program wrote to an input while it was read: what is done stays."""


@dataclass(frozen=True)
class Written:
    """One finished pair of files."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Job:
    """The input files, the part of them to read, and the output."""

    inputs: tuple[str, ...]
    output_prefix: str
    settings: EncodeSettings
    part: InputRange = WHOLE

    def stem(self) -> str:
        """The output prefix, with the number of the shard where there are several."""
        return (
            self.output_prefix
            if self.part == WHOLE
            else f"{self.output_prefix}.shard-{self.part.number:05}-of-{self.part.of:05}"
        )

    def journal(self) -> str:
        """The file that contains the progress."""
        return f"{self.stem()}.journal"

    def prefixes(self) -> list[str]:
        """Of each key's pair."""
        return [f"{self.stem()}_{key}_document" for key in self.settings.keys]


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    settings: EncodeSettings,
    *,
    workers: int = 1,
    part: InputRange = WHOLE,
    overwrite: bool = False,
    save_seconds: float = SAVE_SECONDS,
    progress: Callable[[int, int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Written]:
    """Write ``{output_prefix}_{key}_document.bin/.idx/.manifest.json`` for each key of the settings, each
    pair as a whole or not at all.

    ``workers``: processes that encode; 1 encodes in this process.  ``part``: process only this part, as
    ``{output_prefix}.shard-I-of-N``. ``overwrite``: discard the progress of an unfinished run instead of
    continuing it. ``save_seconds``: seconds between saves of the progress.  ``progress(bytes done, all
    bytes, documents)`` of the inputs on disk, also at the start. ``report``: called with notes for the
    user: a back end that is not used, a repeated input, lines that were skipped.

    Raises DataError (with file, and line or byte, of bad input), ConfigError, HostError.  After a crash, a
    signal, a full disk and a line that cannot be used, the saved progress stays next to the output, under
    temporary names; other bad input leaves nothing.
    """
    job = Job(tuple(inputs), output_prefix, settings, part)
    _check(job, workers, save_seconds)
    total_bytes(inputs)
    if report:
        for path, earlier in repeated(inputs):
            report(f"{path} has the same text as {earlier}, so its documents are written twice")
    first = _first_documents(job)
    tokenizer, backend = choose_encoder(settings.tokenizer, settings.backend, first, report)
    encoder = Encoder(replace(settings, backend=backend), tokenizer)
    run = _Preprocessing(job, encoder, overwrite, save_seconds, progress)
    if run.mended and report:
        report(
            f"continuing from the saved progress: {', '.join(run.mended)} changed after the unfinished run, "
            "but only in parts that this run had not read"
        )
    old = [prefix for prefix in job.prefixes() if os.path.exists(f"{prefix}.idx")]
    if old and report and not run.saved.complete:
        report(f"{', '.join(old)}: the existing files will be replaced when the new ones are complete")
    try:
        if not run.saved.complete:
            run.encode(workers)
        written = run.finish()
    except BaseException as error:
        kept = not isinstance(error, DataError) or isinstance(error, DiskRefused | InputChanged | BadLine)
        run.close(forget=not kept or not run.saved.pairs)
        if isinstance(error, BadLine):
            skip = "" if isinstance(error, BadText) else "; or skip such lines with --on-bad-line skip"
            goes_on = ", which continues from the saved progress" if run.saved.pairs and skip else ""
            raise BadLine(error.message, remedy=f"{error.remedy}{skip}{goes_on}") from error
        raise
    if run.saved.left_out and report:
        lines = "line" if run.saved.left_out == 1 else "lines"
        report(f"skipped {run.saved.left_out:,} bad {lines}; the first: {run.saved.first_left_out}")
    run.close(forget=True)
    return written


@dataclass(frozen=True)
class Saved:
    """The progress in the last record of the journal."""

    place: ReadPosition = field(default_factory=ReadPosition)
    position: int = 0
    checksum: int = 0  # of the present input up to ``place``
    pairs: tuple[tuple[Counts, FileSum], ...] = ()
    complete: bool = False  # everything is encoded; only the final names are missing
    left_out: int = 0
    first_left_out: str = ""

    def record(self) -> dict[str, Any]:
        """For the journal."""
        pairs = [{"counts": counts.as_dict(), "bin": asdict(total)} for counts, total in self.pairs]
        return asdict(self) | {"place": list(asdict(self.place).values()), "pairs": pairs}


def saved_of(path: str, record: Mapping[str, Any], keys: int) -> Saved:
    """What a record of the journal at ``path`` says; DataError for one that no run of this program saves."""
    try:
        pairs = tuple((Counts(**pair["counts"]), FileSum(**pair["bin"])) for pair in record["pairs"])
        saved = Saved(**dict(record) | {"place": ReadPosition(*record["place"]), "pairs": pairs})
    except (KeyError, TypeError) as error:
        raise _unknown_record(path) from error
    numbers = [saved.position, saved.left_out, saved.checksum, *asdict(saved.place).values()]
    for counts, total in pairs:
        numbers += [*counts.as_dict().values(), total.bytes]
    texts = [saved.first_left_out, *(total.sha256 for _, total in pairs)]
    right = (
        all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        and all(type(text) is str for text in texts)
        and type(saved.complete) is bool
        and len(pairs) == keys
    )
    if not right:
        raise _unknown_record(path)
    return saved


def _unknown_record(path: str) -> DataError:
    message = f"{path}: the journal has a line that this program did not write"
    return DataError(message, remedy="add --overwrite to start from the beginning")


class _Preprocessing:
    """The journal, its state, and the steps from there to the finished files."""

    def __init__(
        self,
        job: Job,
        encoder: Encoder,
        overwrite: bool,
        save_seconds: float,
        progress: Callable[[int, int, int], None] | None,
    ) -> None:
        self._job, self._encoder, self._save_seconds, self._progress = job, encoder, save_seconds, progress
        self._low, self._high = job.part.stretch(total_bytes(job.inputs))
        self._files = [facts_of(path) for path in job.inputs]
        self._tokenizer = encoder.tokenizer.identity()
        self.dtype = encoder.dtype
        self._journal = Journal(
            job.journal(), self._settings(), self._files, overwrite=overwrite, unchanged=self._unchanged
        )
        # this run may have other keys
        keys = str(self._journal.forgotten.get("--json-keys", ""))  # joined by spaces, which a key may have
        for key in {keys, *keys.split()} - {""}:
            remove_partial(f"{job.stem()}_{key}_document")
        self.mended = self._journal.mended
        try:
            self.saved = self._newest(self._journal.records)
        except BaseException:
            self._journal.close(remove=False)
            raise

    def encode(self, workers: int) -> None:
        """Encode what is not yet encoded, and save it."""
        keys, saved = self._job.settings.keys, self.saved
        counts: list[Counts | None] = [counts for counts, _ in saved.pairs]
        writers = [
            PairWriter(prefix, self.dtype, each)
            for prefix, each in zip(self._job.prefixes(), counts or [None] * len(keys), strict=True)
        ]
        last_save = time.monotonic()
        try:
            for writer, (_, total) in zip(writers, saved.pairs, strict=False):
                if writer.bin_sum() != total:
                    raise changed_since(f"{writer.prefix}.bin.partial")
            self._show(saved.position, writers[0])
            batches = read_batches(self._job.inputs, keys, part=self._job.part, start=saved.place)
            for batch, results in encode_all(batches, self._encoder, workers):
                for writer, encoded in zip(writers, results.columns, strict=True):
                    writer.write(
                        encoded.tokens,
                        encoded.lengths,
                        encoded.sequences,
                        words=encoded.words,
                        closes=batch.closes,
                    )
                before = saved.checksum if batch.end.source == saved.place.source else 0
                saved = replace(
                    saved,
                    place=batch.end,
                    checksum=checksum_of(batch, before),
                    position=batch.position,
                    left_out=saved.left_out + results.left_out,
                    first_left_out=saved.first_left_out or results.first_left_out,
                )
                self._show(saved.position, writers[0])
                if time.monotonic() - last_save >= self._save_seconds:
                    self._save(writers, saved)
                    last_save = time.monotonic()
            if self._job.part == WHOLE:
                for writer, key in zip(writers, keys, strict=True):
                    check_not_empty(writer.counts, key, self._job.inputs)
            self._save(writers, replace(saved, complete=True))
        except BadLine:  # everything before its batch is written
            if saved != self.saved:
                self._save(writers, saved)
            raise
        finally:
            for writer in writers:
                writer.close()

    def finish(self) -> list[Written]:
        """Give the files their names and write the manifests."""
        self._check_inputs()
        written = []
        names = zip(self._job.prefixes(), self._job.settings.keys, strict=True)
        for (prefix, key), (counts, total) in zip(names, self.saved.pairs, strict=True):
            manifest = Manifest(
                counts.documents,
                counts.sequences,
                counts.tokens,
                self.dtype.name,
                bin=total,
                idx=put_in_place(prefix, self.dtype, counts),
                tokenizer=self._tokenizer,
                settings={"key": key, "append_eod": self._job.settings.append_eod},
                inputs=[{"path": path, "bytes": size} for path, size, _ in self._files],
                part=str(self._job.part),
                words=counts.words,
                left_out=self.saved.left_out,
            )
            write_manifest(prefix, manifest)
            written.append(Written(prefix, counts.documents, counts.sequences, counts.tokens, self.dtype))
        return written

    def close(self, *, forget: bool) -> None:
        """``forget``: remove the journal and the growing files; else they stay for the next run."""
        self._journal.close(remove=forget)
        for prefix in self._job.prefixes() if forget else ():
            remove_partial(prefix)

    def _check_inputs(self) -> None:
        """InputChanged if another program has written to an input since then: it is unknown what was read."""
        for was in self._files:
            now = facts_of(was[0])
            if now != was:
                sizes = f" (it had {was[1]} bytes and now has {now[1]})" if was[1] != now[1] else ""
                remedy = (
                    "start from the beginning with --overwrite, and do not change the input while it is read"
                )
                raise InputChanged(f"{was[0]}: the input changed while it was read{sizes}", remedy=remedy)

    def _save(self, writers: list[PairWriter], saved: Saved) -> None:
        saved = replace(saved, pairs=tuple((writer.save(), writer.bin_sum()) for writer in writers))
        self._journal.append(saved.record())
        self.saved = saved

    def _unchanged(self, number: int, records: list[dict[str, Any]]) -> bool:
        """Whether an input that was changed since an earlier run still has all that was read of it."""
        saved = self._newest(records)
        if saved.complete or self._job.part != WHOLE:
            return False
        if number != saved.place.source:
            return number > saved.place.source
        return begins_with(self._job.inputs[number], saved.place.offset, saved.checksum)

    def _newest(self, records: list[dict[str, Any]]) -> Saved:
        return next(filter(None, map(self._usable, reversed(records))), Saved())

    def _usable(self, record: dict[str, Any]) -> Saved | None:
        """The content of a record, if the files contain all of it; the tokens of a complete run may already
        have their final name.
        """
        saved = saved_of(self._job.journal(), record, len(self._job.settings.keys))
        pairs = zip(self._job.prefixes(), saved.pairs, strict=True)
        whole = all(
            holds(prefix, self.dtype, counts, complete=saved.complete) for prefix, (counts, _) in pairs
        )
        return saved if whole else None

    def _settings(self) -> dict[str, object]:
        settings = self._job.settings
        return {
            "--tokenizer-type": settings.tokenizer.tokenizer_type,
            "--tokenizer-model": f"a file with SHA-256 {self._tokenizer['sha256'][:16]}..."
            if self._tokenizer["sha256"]
            else None,
            "--json-keys": " ".join(settings.keys),
            "--append-eod": settings.append_eod,
            "--eod-token": self._encoder.tokenizer.eod if settings.append_eod else None,
            "--shard": str(self._job.part),
        }

    def _show(self, position: int, writer: PairWriter) -> None:
        if self._progress:
            total = self._high - self._low
            self._progress(min(max(0, position - self._low), total), total, writer.counts.documents)


def check_not_empty(counts: Counts, key: str, inputs: Sequence[str]) -> None:
    """DataError if there is nothing to train on."""
    names = ", ".join(inputs)
    if not counts.documents:
        raise DataError(
            f"{names}: the input has no documents",
            remedy='use JSON lines {"text": "..."}, or plain text that is not empty',
        )
    if not counts.tokens:
        raise DataError(
            f"{names}: all {counts.documents} documents are empty under the key {key!r}",
            remedy="choose another key with --json-keys KEY",
        )


def _check(job: Job, workers: int, save_seconds: float) -> None:
    keys, problems = job.settings.keys, []
    if not 1 <= workers <= _MOST_WORKERS:
        problems.append(
            Problem(
                "--workers",
                workers,
                f"must be from 1 to {_MOST_WORKERS}",
                "use the number of processor cores",
            )
        )
    if not save_seconds >= 0:
        problems.append(
            Problem("--save-seconds", save_seconds, "must be at least 0", f"use {SAVE_SECONDS:g}")
        )
    if not keys or len(set(keys)) < len(keys):
        problems.append(
            Problem("--json-keys", " ".join(keys), "must name each key once", "leave out the repeated key")
        )
    for key in keys:
        if not key or "/" in key:
            rule = "must not be empty or contain a slash, because it is part of the output name"
            problems.append(Problem("--json-keys", repr(key), rule, "rename the key in the input"))
    if not job.output_prefix:
        problems.append(
            Problem(
                "--output-prefix",
                "''",
                "must not be empty",
                "set --output-prefix to the start of the output names, such as data/corpus",
            )
        )
    elif job.output_prefix.endswith("/"):
        remedy = f"add the start of a file name, such as {job.output_prefix}corpus"
        problems.append(Problem("--output-prefix", job.output_prefix, "must not end with a slash", remedy))
    longest = max((len(os.fsencode(_last_name(prefix))) for prefix in job.prefixes()), default=0)
    if longest > _LONGEST_NAME:
        rule = (
            f"is too long: the longest file name would have {longest} bytes, but {_LONGEST_NAME} is the limit"
        )
        remedy = f"shorten the file name in the prefix by {longest - _LONGEST_NAME} bytes"
        problems.append(Problem("--output-prefix", job.output_prefix, rule, remedy))
    endings = ("bin", "idx", "manifest.json", "bin.partial", "idx.partial", "sizes.partial", "counts.partial")
    written = [
        job.journal(),
        *(f"{prefix}.{ending}" for prefix in job.prefixes() for ending in endings),
    ]
    for path in sorted(
        {os.path.realpath(path) for path in job.inputs} & {os.path.realpath(path) for path in written}
    ):
        problems.append(
            Problem(
                "--output-prefix",
                job.output_prefix,
                f"would overwrite the input {path}",
                "choose another prefix",
            )
        )
    if problems:
        raise ConfigError(problems)


def _last_name(prefix: str) -> str:
    """The longest name of a file of this pair, which is also the last to be written."""
    return os.path.basename(f"{prefix}.manifest.json.partial")


def _first_documents(job: Job) -> Iterator[tuple[str, str]]:
    """Names and texts of the first usable documents: those of the first batch."""
    batch = next(read_batches(job.inputs, job.settings.keys, part=job.part), None)
    if batch is None:
        return
    size = 0
    # a bad line is reported when the whole corpus is read
    for number, document in enumerate(documents(batch, job.settings.keys, []), start=1):
        for key, sequences in zip(job.settings.keys, document, strict=True):
            for text in sequences:
                yield f"{batch.path}, document {number}, key {key!r}", text[:_CHECKED_CHARACTERS]
                size += len(text)
        if size > _CHECKED_CHARACTERS:
            return
