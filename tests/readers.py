"""A table of all readers of untrusted files: a good file, how to read it, and the errors that are allowed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import torch
from checkpoint.test_checkpoint_optimizer import SHAPES, staged, whole
from encode_settings import settings
from fakes import Alone, FakeEngine
from pyarrow import parquet

from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, find, verify
from megatron_hyperrouter.checkpoint.folder import read_manifest as read_checkpoint_manifest
from megatron_hyperrouter.checkpoint.optimizer import INDEX, MOMENTS, read_box
from megatron_hyperrouter.checkpoint.optimizer import read_index as read_optimizer
from megatron_hyperrouter.checkpoint.weights import Reader as CheckpointReader
from megatron_hyperrouter.config.cli import load_file
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.order import index_files
from megatron_hyperrouter.data.store.journal import Journal
from megatron_hyperrouter.data.store.manifest import read_manifest
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.text.corpus import documents, read_batches
from megatron_hyperrouter.data.tokenize import bpe
from megatron_hyperrouter.data.tokenize import preprocess as preprocessing
from megatron_hyperrouter.data.tokenize.tokenizer import HuggingFaceTokenizer
from megatron_hyperrouter.errors import CheckpointError, ConfigError, DataError
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.recovery import Recovery
from megatron_hyperrouter.train.run import Run


@dataclass(frozen=True)
class Reader:
    """``make(folder)``: writes a good file and returns its path; ``read(path)``: reads it, as a run would.

    ``refuses``: the only errors that ``read`` may raise.  ``json_lines``: the file is lines of JSON, whose
    values are changed, too.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...] = (DataError,)
    json_lines: bool = False


TEXTS = [f"document {number} with some text, naïve" for number in range(40)]


def pair(folder: Path) -> str:
    """A pair of token files with its manifest; returns the prefix."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    how = settings("ByteTokenizer", append_eod=True)
    return preprocessing.preprocess([str(folder / "a.jsonl")], str(folder / "p"), how)[0].prefix


def make_manifest(folder: Path) -> Path:
    return Path(f"{pair(folder)}.manifest.json")


def read_pair_manifest(path: Path) -> None:
    read_manifest(str(path).removesuffix(".manifest.json"))


def make_index(folder: Path) -> Path:
    return Path(f"{pair(folder)}.idx")


def read_index(path: Path) -> None:
    data = IndexedDataset(path.with_suffix(""))
    for number in range(len(data)):
        data.get(number)


HEAD: dict[str, Any] = {"--tokenizer-type": "ByteTokenizer", "--append-eod": True}
INPUTS = [("a.jsonl", 1000, 5)]


def make_journal(folder: Path) -> Path:
    journal = Journal(str(folder / "o.journal"), HEAD, INPUTS)
    for number in (1, 2):
        counts = {"documents": number, "sequences": number, "tokens": 9, "open_sequences": 0, "words": 4}
        pairs = [{"counts": counts, "bin": {"bytes": 18, "sha256": "ab" * 32}}]
        journal.append(
            {"place": [0, 90 * number, 1], "position": 90, "pairs": pairs, "complete": False, "left_out": 0,
             "first_left_out": ""}
        )  # fmt: skip
    journal.close(remove=False)
    return folder / "o.journal"


def read_journal(path: Path) -> None:
    journal = Journal(str(path), HEAD, INPUTS)
    try:
        for record in journal.records:
            preprocessing.saved_of(str(path), record, keys=1)
    finally:
        journal.close(remove=False)


KEY = {"kind": "test", "seed": 1}
ARRAYS = {"documents": np.arange(50, dtype=np.int32), "starts": np.arange(60, dtype=np.int64).reshape(-1, 2)}


def make_index_file(folder: Path) -> Path:
    cache = index_files.IndexCache(str(folder), cached_from=1)
    cache.arrays(KEY, tuple(ARRAYS), lambda: iter(ARRAYS.items()), beside="x", numbers=1)
    return cache.used[0]


def read_index_file(path: Path) -> None:
    """Whatever is there, the arrays are those that were asked for: a damaged file is built again."""
    cache = index_files.IndexCache(str(path.parent), cached_from=1)
    found = cache.arrays(KEY, tuple(ARRAYS), lambda: iter(ARRAYS.items()), beside="x", numbers=1)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def make_tokenizer(folder: Path) -> Path:
    bpe.train_bpe(iter(TEXTS), 280, str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def read_tokenizer(path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(str(path))
    tokenizer.decode(tokenizer.encode(TEXTS[0]))
    tokenizer.token_bytes_V()
    _ = tokenizer.eod


def make_parquet(folder: Path) -> Path:
    table = pyarrow.table({"text": TEXTS, "number": list(range(len(TEXTS)))})
    parquet.write_table(table, folder / "a.parquet", row_group_size=15)
    return folder / "a.parquet"


def read_parquet(path: Path) -> None:
    for batch in read_batches([str(path)]):
        list(documents(batch, ("text",)))


def make_checkpoint(folder: Path) -> Path:
    """The manifest of a checkpoint that holds settings, and state of an optimizer."""
    folders = CheckpointFolders(folder / "checkpoints", Alone())
    meta = {"order": {"seed": 1}, "bad_steps": {"good": [[1.0, 2.0]], "skipped": [3], "in_a_row": 0}}
    part = staged(whole(), 0, ranks=1)
    texts = {"settings.yaml": SETTINGS.encode()}
    return folders.save(7, part.write, meta, texts=texts, join=part.join) / "manifest.json"


def read_checkpoint(path: Path) -> None:
    """As a start does: its place, its files, and what it says of earlier steps."""
    folder = find(path.parent)
    assert folder is not None
    manifest = read_checkpoint_manifest(folder)
    verify(folder, Alone())
    config = RunConfig()
    run = SimpleNamespace(recovery=Recovery(FakeEngine(4), config, remedy=str))
    Run.restore(run, manifest["meta"], folder)  # type: ignore[arg-type]


def read_sealed_again(path: Path) -> None:
    """A manifest that somebody changed on purpose: its own checksum fits."""
    with contextlib.suppress(ValueError, RecursionError):
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest, dict) and isinstance(manifest.get("meta"), dict):
            manifest.pop("sha256", None)
            content = json.dumps(manifest, sort_keys=True)
            manifest["sha256"] = hashlib.sha256(content.encode()).hexdigest()
            path.write_text(json.dumps(manifest))
    read_checkpoint(path)


def make_optimizer_index(folder: Path) -> Path:
    return make_checkpoint(folder).with_name(INDEX)


def read_optimizer_index(path: Path) -> None:
    """Whatever the index says, the numbers that are read are in the files."""
    index, reader = read_optimizer(path.parent), CheckpointReader(path.parent)
    for name, entry in (index or {}).items():
        for box in (stored.box for stored in entry.boxes):
            for field in MOMENTS if entry.shape == SHAPES.get(name) else ():
                read_box(reader, entry, field, box, torch.zeros(box.numel))


def make_settings(folder: Path) -> Path:
    (folder / "settings.yaml").write_text(SETTINGS)
    return folder / "settings.yaml"


def read_settings(path: Path) -> None:
    load_file(path, routers=ROUTERS, world_size=1)


SETTINGS = """
# of a small model
num_layers: 2
hidden_size: 64
num_attention_heads: 2
moe_ffn_hidden_size: 128
seq_length: 64
num_experts: 4
moe_router_topk: 2
router: {name: hyper, hypernet_width: 16}
micro_batch_size: 2
lr: 1.0e-3
adam_beta1: &beta 0.9
adam_beta2: *beta
split: "90,5,5"
data_path: [0.3, ~/a, 0.7, "$HOME/b"]
tokenizer_type: ByteTokenizer
"""


READERS = {
    "checkpoint manifest": Reader(make_checkpoint, read_checkpoint, (CheckpointError,), json_lines=True),
    "checkpoint manifest, sealed again": Reader(
        make_checkpoint, read_sealed_again, (CheckpointError,), json_lines=True
    ),
    "optimizer index": Reader(
        make_optimizer_index, read_optimizer_index, (CheckpointError,), json_lines=True
    ),
    "settings": Reader(make_settings, read_settings, (ConfigError,)),
    "pair manifest": Reader(make_manifest, read_pair_manifest, json_lines=True),
    "journal": Reader(make_journal, read_journal, (DataError, ConfigError), json_lines=True),
    "token index": Reader(make_index, read_index),
    "index file": Reader(make_index_file, read_index_file),
    "tokenizer.json": Reader(make_tokenizer, read_tokenizer, json_lines=True),
    "Parquet": Reader(make_parquet, read_parquet),
}
