"""Tokenizers of the library ``tokenizers``: a ``tokenizer.json``, GPT-2's ``vocab.json`` and ``merges.txt``,
or a model's name on the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.data.text.corpus import SAFE_CUT, BadText
from megatron_hyperrouter.data.tokenize.base import END_OF_TEXT, MOST_IDS, Tokenizer, no_end_token
from megatron_hyperrouter.errors import DataError, HostError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# The usual names of the end of a document, by preference: GPT-2, NeoX and Qwen; Llama 3; Llama 2 and T5;
# Gemma; DeepSeek; BERT.
END_TOKENS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[EOS]",
    "[SEP]",
)
REMEDY = (
    "set --tokenizer-model to a tokenizer.json, its folder, or the name of a model on the "
    "Hugging Face hub (mhr tokenizer trains a tokenizer)"
)
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The classes of tokenizer_config.json whose vocab.json and merges.txt split words as GPT-2 does.
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "RobertaTokenizer", "RobertaTokenizerFast")
_SAFE_CUT = re.compile(SAFE_CUT)
_PIECE = 1 << 15  # characters encoded at a time: the library takes about 100 bytes of memory for each
_GROUP = 8  # pieces in one call
_LONGEST_REPLACEMENT = 1 << 10  # characters that a normalizer may put in place of a match


@dataclass(frozen=True)
class TokenizerFiles:
    """``model``: ``(tokenizer.json,)``, or ``(vocab.json, merges.txt)``.  ``settings``: the existing files
    that name special tokens.
    """

    model: tuple[Path, ...]
    settings: tuple[Path, ...] = ()

    def sha256(self) -> str:
        """The SHA-256 of the model's files, one after the other."""
        digest = hashlib.sha256()
        for path in self.model:
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}", remedy=REMEDY) from error
        return digest.hexdigest()

    def special_tokens(self) -> dict[str, str]:
        """Role (``eos_token``) to token, as the settings files say; the first file that
        names a role counts.
        """
        found: dict[str, str] = {}
        for path in self.settings:
            for role, token in _json_object(path).items():
                content = token.get("content") if isinstance(token, dict) else token
                if role.endswith("_token") and isinstance(content, str):
                    found.setdefault(role, content)
        return found


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library ``tokenizers``.

    Special tokens that a text contains as plain characters (a literal ``<|endoftext|>``) become their id, as
    everywhere with this format.
    """

    type = "HuggingFaceTokenizer"

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        """``path``: a file, a folder or a name on the hub.  ``eod_token``: the token that ends a document."""
        self._load(path, find_files(path, from_hub), eod_token)

    def _load(self, path: str, files: TokenizerFiles, eod_token: str | None) -> None:
        self.path, self.files, self._eod_token = path, files, eod_token
        self._backend = _backend_of(files)
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self._cuts_exactly = _cuts_exactly(self._backend)

    @cached_property
    def _eod(self) -> int:
        if self._eod_token is not None:
            if self._eod_token not in self._vocab:
                raise no_end_token(
                    self.path, self._eod_token, [name for name in END_TOKENS if name in self._vocab]
                )
            return self._vocab[self._eod_token]
        named = self.files.special_tokens().get("eos_token")
        if named and named not in self._vocab:
            message = f"{self.path}: the eos_token of the tokenizer, {named}, is not in its vocabulary"
            remedy = "correct eos_token in tokenizer_config.json, or give the token with --eod-token"
            raise DataError(message, remedy=remedy)
        for name in [named] if named else END_TOKENS:
            if name in self._vocab:
                return self._vocab[name]
        raise no_end_token(self.path, None, END_TOKENS)

    @property
    def eod(self) -> int:
        """The id of ``--eod-token``, or of ``eos_token`` in ``tokenizer_config.json``, or of the first usual
        name that exists.  DataError if there is none.
        """
        return self._eod

    def sha256(self) -> str:
        """The SHA-256 of ``tokenizer.json``, or of the vocabulary and the merges."""
        return self.files.sha256()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """See the base class."""
        if not self._cuts_exactly:
            return [ids for text in texts for ids in self._encode([text])]
        pieces_of = [list(_pieces(text)) for text in texts]
        flat = [piece for pieces in pieces_of for piece in pieces]
        encoded = iter(
            [
                ids
                for start in range(0, len(flat), _GROUP)
                for ids in self._encode(flat[start : start + _GROUP])
            ]
        )
        return [_joined([next(encoded) for _ in pieces]) for pieces in pieces_of]

    def _encode(self, pieces: list[str]) -> list[NDArray[np.int32]]:
        with encoding(self.path, pieces[0]):
            found = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int32) for each in found]

    def json(self) -> str:
        """A ``tokenizer.json`` with truncation and padding off: the file itself if it is one, so that data
        which were made with it still fit; else as the library writes it.
        """
        if len(self.files.model) == 1:
            text = self.files.model[0].read_bytes().decode("utf-8")
            tree = json.loads(text)
            if not tree.get("truncation") and not tree.get("padding"):
                return text
        return str(self._backend.to_str())

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def token_bytes_V(self) -> NDArray[np.int32] | None:
        """See the base class; None if the tokenizer is not byte-level.

        A byte-level vocabulary writes each byte as one character, so a token has as many bytes as characters.
        Text that a normalizer changes counts in its changed form.
        """
        added = self._backend.get_added_tokens_decoder()
        alphabet = _byte_alphabet(self._backend)
        plain = [name for name, token in self._vocab.items() if token not in added]
        if alphabet is None or not all(alphabet.issuperset(name) for name in plain):
            return None
        bytes_V = np.zeros(self.vocab_size, dtype=np.int32)
        for name, token in self._vocab.items():
            if token not in added:
                bytes_V[token] = len(name)
            elif not added[token].special:
                bytes_V[token] = len(added[token].content.encode())
        return bytes_V


class GPT2BPETokenizer(HuggingFaceTokenizer):
    """Megatron-LM's name for GPT-2's tokenizer: ``--vocab-file`` and ``--merge-file``, or a folder that
    contains both.
    """

    type = "GPT2BPETokenizer"

    def __init__(
        self,
        vocab_file: str | None,
        merge_file: str | None,
        folder: str | None = None,
        eod_token: str | None = None,
    ) -> None:
        files = vocab_and_merges(vocab_file, merge_file) if folder is None else find_files(folder, from_hub)
        self._load(folder or str(vocab_file), files, eod_token)


def _backend_of(files: TokenizerFiles) -> Backend:
    """The library's tokenizer, with truncation and padding off: a corpus keeps every token."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        message = "HuggingFaceTokenizer needs the tokenizers library"
        raise HostError(message, remedy="run bash tools/setup_env.sh") from error
    with _library_errors(f"{files.model[0]}: this is not a tokenizer file"):
        backend = (
            Library.from_file(str(files.model[0])) if len(files.model) == 1 else _of_vocab_and_merges(files)
        )
    vocab = backend.get_vocab(with_added_tokens=True)
    if not vocab:
        message = f"{files.model[0]}: the tokenizer has no tokens"
        raise DataError(message, remedy="train a tokenizer with mhr tokenizer")
    name, highest = max(vocab.items(), key=lambda each: each[1])
    if highest >= MOST_IDS:  # before the library is asked for the whole tree, which it makes id by id
        message = (
            f"{files.model[0]}: token {name[:40]!r} has id {highest}, but ids must be less than {MOST_IDS}"
        )
        raise DataError(message, remedy="download or train the tokenizer again; its file is damaged")
    for content in _replacements(json.loads(backend.to_str())["normalizer"]):
        if len(content) > _LONGEST_REPLACEMENT:
            message = f"{files.model[0]}: its normalizer inserts a string of {len(content)} characters"
            raise DataError(
                message, remedy=f"use a normalizer that inserts at most {_LONGEST_REPLACEMENT} characters"
            )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _of_vocab_and_merges(files: TokenizerFiles) -> Backend:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(*map(str, files.model)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = dict.fromkeys([END_OF_TEXT, *files.special_tokens().values()])
    special = [name for name in names if backend.token_to_id(name) is not None]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return backend


def is_library_error(error: BaseException) -> bool:
    """Whether a library written in Rust may have raised it: any Exception, or PanicException, which is not an
    Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """Turns an error of the library into DataError."""
    try:
        yield
    except BaseException as error:
        if not is_library_error(error):
            raise
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(f"{message}: {reason}", remedy=REMEDY) from error


@contextmanager
def encoding(path: str, text: str) -> Iterator[None]:
    """Turns an error of a tokenizer's library about a text into BadText; ``path``: the tokenizer's file."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, MemoryError) or not is_library_error(error):
            raise
        reason = str(error).strip().split("\n", 1)[0]
        message = f"the tokenizer {path} cannot encode {text[:40]!r} ...: {reason}"
        raise BadText(message, remedy="use another tokenizer, or correct or remove this text") from error


def _cuts_exactly(backend: Backend) -> bool:
    """Whether a text may be encoded in pieces with the ids of the whole: certain for GPT-2's words and plain
    added tokens.
    """
    tree = json.loads(backend.to_str())
    words = tree["pre_tokenizer"] or {}
    gpt2 = words.get("type") == "ByteLevel" and words.get("use_regex", True) and not words["add_prefix_space"]
    plain = all(
        "\n" not in token["content"] and not token["lstrip"] and not token["rstrip"]
        for token in tree["added_tokens"]
    )
    return bool(gpt2 and plain and tree["normalizer"] is None)


def _pieces(text: str) -> Iterator[str]:
    """Cut ``text`` at safe places into pieces of about ``_PIECE`` characters, longer where no safe place is
    near.
    """
    start = 0
    while len(text) - start > _PIECE:
        cut = _SAFE_CUT.search(text, start + _PIECE)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _byte_alphabet(backend: Backend) -> frozenset[str] | None:
    """The 256 characters that represent bytes, or None if the tokenizer is not byte-level."""
    from tokenizers.pre_tokenizers import ByteLevel

    tree = json.loads(backend.to_str())
    marked = tree["model"].get("end_of_word_suffix") or tree["model"].get("continuing_subword_prefix")
    steps = [*_steps(tree["pre_tokenizer"]), *_steps(tree["normalizer"])]
    if marked or not any(step["type"] == "ByteLevel" for step in steps):
        return None
    return frozenset(ByteLevel.alphabet())


def _replacements(normalizer: dict[str, Any] | None) -> list[str]:
    """What the steps of a normalizer insert into a text."""
    return [
        str(step[name])
        for step in _steps(normalizer)
        for name in ("content", "prepend", "append")
        if name in step
    ]


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer or a normalizer, with those inside a sequence."""
    if part is None:
        return
    yield part
    for name in ("pretokenizers", "normalizers"):
        for step in part.get(name, ()):
            yield from _steps(step)


def find_files(name: str, fetch: Callable[[str, str], Path | None]) -> TokenizerFiles:
    """The files of ``--tokenizer-model NAME``: a file, a folder, or a name on the hub.

    ``fetch(model, file name)`` gets a file of a model on the hub; None if the model lacks that file.
    """
    path = Path(name)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        if path.name == "vocab.json":
            return _of_folder(path.parent, merged_only=True)
        return TokenizerFiles((path,), _settings_in(path.parent))
    if path.suffix in (".json", ".model") or not _HUB_NAME.fullmatch(name):
        raise DataError(f"{name}: there is no such tokenizer file", remedy=REMEDY)
    model = fetch(name, "tokenizer.json")
    if model is None:
        raise DataError(f"{name}: this model on the hub has no tokenizer.json", remedy=REMEDY)
    return TokenizerFiles((model,), tuple(filter(None, (fetch(name, each) for each in SETTINGS_FILES))))


def vocab_and_merges(vocab: str | None, merges: str | None) -> TokenizerFiles:
    """The two files of ``--vocab-file`` and ``--merge-file``."""
    paths = (Path(vocab or ""), Path(merges or ""))
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{path}: there is no such tokenizer file",
                remedy=("set --vocab-file and --merge-file to existing files"),
            )
    return TokenizerFiles(paths, _settings_in(paths[0].parent))


def _of_folder(folder: Path, *, merged_only: bool = False) -> TokenizerFiles:
    settings = _settings_in(folder)
    if (whole := folder / "tokenizer.json").is_file() and not merged_only:
        return TokenizerFiles((whole,), settings)
    pair = (folder / "vocab.json", folder / "merges.txt")
    missing = [path.name for path in pair if not path.is_file()]
    if missing:
        message = f"{folder}: the folder has neither tokenizer.json nor vocab.json with merges.txt"
        raise DataError(message, remedy=REMEDY)
    for path in settings:
        kind = _json_object(path).get("tokenizer_class")
        if kind is not None and kind not in _GPT2_CLASSES:
            message = (
                f"{path}: vocab.json and merges.txt are supported only for GPT-2, not for the class {kind}"
            )
            raise DataError(message, remedy="convert the tokenizer to a tokenizer.json, and use that file")
    return TokenizerFiles(pair, settings)


def _settings_in(folder: Path) -> tuple[Path, ...]:
    return tuple(path for name in SETTINGS_FILES if (path := folder / name).is_file())


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; DataError if it is not one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            (f"{path} cannot be read: {error}"), remedy="download or write the file again"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: must be a JSON object", remedy="download or write the file again")
    return found


def from_hub(name: str, file: str) -> Path | None:
    """A file of a model on the Hugging Face hub, from the library's own cache where it is there; None where
    the model lacks it.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except (EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, EntryNotFoundError) and not (offline and file == "tokenizer.json"):
            return None
        reason = str(error).strip().split("\n", 1)[0]
        message = f"{name}: this is not a file, and the Hugging Face hub does not have it: {reason}"
        raise DataError(message, remedy=REMEDY) from error
