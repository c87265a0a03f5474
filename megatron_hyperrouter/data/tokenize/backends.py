"""Which library converts text to ids: ``tokenizers``, or ``gigatoken``, which is many times faster and
supports fewer tokenizers.

The ids are always those of ``tokenizers``: before a corpus is encoded, both libraries encode its first
documents and a set of difficult texts, and a back end with any difference is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.data.tokenize.huggingface import is_library_error
from megatron_hyperrouter.data.tokenize.tokenizer import (
    HuggingFaceTokenizer,
    Tokenizer,
    TokenizerOptions,
    tokenizer_from,
)
from megatron_hyperrouter.errors import ConfigError, DataError, HostError, Problem

Backend = Literal["tokenizers", "gigatoken"]
BACKENDS = ("auto", "gigatoken", "tokenizers")
_FLAG = "--tokenizer-backend"
# bytes of memory by which the library's cache of words may grow before it is emptied
_CACHE_LIMIT = 128 << 20
_LOOK_EVERY = 1 << 22  # characters encoded between two looks at the memory
_BLIND_LIMIT = (
    1 << 26
)  # characters between two clearings of the cache, if the system does not report its memory

# What patterns of words are known to disagree about: white space and line ends, contractions, digits, letters
# with marks, both forms of an accent, scripts without spaces, joined emoji, characters outside the first
# plane, controls, unassigned code points, special tokens.
PROBES = (
    "",
    " ",
    "  leading, trailing  ",
    "a\n\n b\r\n\tc \n   d\u00a0e\u2003f\u3000g\u0085h\u2028i",
    "don't DON'T we'll I'd they've 'tis '\u017f it\u2019s",
    "1 12 123 1234567890 3.14159 \u0661\u0662\u0663 \u00bd \u2167 x2y3",
    "caf\u00e9 cafe\u0301 \u017c\u00f3\u0142w \u01c5 \ufb01 \u1e9e na\u0131ve",
    "\u6771\u4eac\u306f\u6674\u308c\u3001\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1f5\U0001f1f1 \u2764\ufe0f \U0001d7d8\U00020000",
    "\x00\x01\x7f\ufeff\ufffd\ufffe \ue000\U0010ffff \u0378",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # ...!!!\n\n\n",
    "<|endoftext|> a<|endoftext|>b <|end_of_text|></s><s>[SEP]<pad> <|im_start|>user",
    "a" * 700 + " " + "!?" * 300 + " " * 300 + "\n" * 300 + "7" * 300,
)


class GigatokenTokenizer(HuggingFaceTokenizer):
    """The same ``tokenizer.json``, encoded by the library ``gigatoken``.

    ConfigError for a tokenizer that the library does not know, HostError if it is not installed.
    """

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        super().__init__(path, eod_token)
        self._fast = self._load_fast()
        self._since_look = self._since_reload = 0
        self._base = _resident_bytes()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """See the base class; memory stays bounded, although the library's own cache of words is not."""
        size = sum(map(len, texts))
        self._since_look += size
        self._since_reload += size
        if self._since_look > _LOOK_EVERY:
            self._since_look = 0
            self._empty_a_full_cache()
        encode = self._fast.encode
        return [encode(text).view(np.int32) for text in texts]

    def encode_batch_exactly(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids as the library ``tokenizers`` gives them."""
        return super().encode_batch(texts)

    def _empty_a_full_cache(self) -> None:
        resident = _resident_bytes()
        if resident is None or self._base is None:
            full = self._since_reload > _BLIND_LIMIT
        else:
            full = resident - self._base > _CACHE_LIMIT
        if full:
            del self._fast  # before the next one is there
            self._fast = self._load_fast()
            self._since_reload, self._base = 0, _resident_bytes()

    def _load_fast(self) -> Any:
        try:
            import gigatoken  # type: ignore[import]
        except ImportError as error:
            raise HostError(
                f"{_FLAG} gigatoken needs the gigatoken library", remedy="run: pip install gigatoken"
            ) from error
        try:
            return gigatoken.Tokenizer.from_json(self.json())
        except BaseException as error:
            if not is_library_error(error):
                raise
            reason = str(error).split("\n", 1)[0]
            rule = f"does not support the tokenizer {self.path}: {reason}"
            raise ConfigError([Problem(_FLAG, "gigatoken", rule, "use auto or tokenizers")]) from error


def build_encoder(options: TokenizerOptions, backend: Backend) -> Tokenizer:
    """The tokenizer that encodes a corpus, with the back end that :func:`choose_encoder` named."""
    if (
        backend == "gigatoken"
        and options.tokenizer_type == "HuggingFaceTokenizer"
        and options.tokenizer_model
    ):
        return GigatokenTokenizer(options.tokenizer_model, options.eod_token)
    return tokenizer_from(options)


def choose_encoder(
    options: TokenizerOptions,
    wanted: str,
    first: Iterable[tuple[str, str]],
    report: Callable[[str], None] | None = None,
) -> tuple[Tokenizer, Backend]:
    """The tokenizer to encode with, and the name of its back end.

    ``wanted``: one of ``BACKENDS``; ``auto`` takes the fastest that is installed, supports the tokenizer
    and agrees with ``tokenizers``.  ``first``: names and texts of the first documents.  ``report``: called
    with what is ignored, and with the reason why ``auto`` rejected a back end.  Raises DataError
    (document, and first id that differs) if a back end was given by name and disagrees, ConfigError,
    HostError.
    """
    kind = options.tokenizer_type
    if wanted not in BACKENDS:
        raise ConfigError([Problem(_FLAG, wanted, "is not a backend", f"use {', '.join(BACKENDS)}")])
    if kind != "HuggingFaceTokenizer" and wanted != "auto":
        rule = f"applies only to HuggingFaceTokenizer, not to {kind}"
        raise ConfigError([Problem(_FLAG, wanted, rule, "leave it out")])
    if report and options.tokenizer_model and kind == "ByteTokenizer":
        report(f"--tokenizer-model is ignored: {kind} needs no file")
    if kind != "HuggingFaceTokenizer" or wanted == "tokenizers" or not options.tokenizer_model:
        return tokenizer_from(options), "tokenizers"
    try:
        fast = GigatokenTokenizer(options.tokenizer_model, options.eod_token)
    except (HostError, ConfigError) as error:
        if wanted == "gigatoken":
            raise
        plain = tokenizer_from(options)
        if report and isinstance(error, ConfigError):  # a library that is not installed needs no report
            report(f"using the tokenizers library, because gigatoken {error.problems[0].rule}")
        return plain, "tokenizers"
    found = difference(fast, first)
    if found is None:
        return fast, "gigatoken"
    if wanted == "gigatoken":
        raise DataError(
            found, remedy=(f"use {_FLAG} tokenizers, because both libraries must give the same ids")
        )
    if report:
        report(f"using the tokenizers library, because gigatoken gives other ids: {found}")
    return tokenizer_from(options), "tokenizers"


def difference(fast: GigatokenTokenizer, first: Iterable[tuple[str, str]]) -> str | None:
    """Where the ids of ``PROBES`` or of a (name, text) of ``first`` are not those of ``tokenizers``, in
    words; None: nowhere.
    """
    texts = [*((f"the text {text[:60]!r}", text) for text in PROBES), *first]
    for name, text in texts:
        (found,), (expected,) = fast.encode_batch([text]), fast.encode_batch_exactly([text])
        if found.shape == expected.shape and (found == expected).all():
            continue
        shared = min(found.size, expected.size)
        differs = np.flatnonzero(found[:shared] != expected[:shared])
        place = int(differs[0]) if differs.size else shared
        ids = [f"id {side[place]}" if place < side.size else "no id" for side in (found, expected)]
        return (
            f"the two libraries differ at token {place + 1} of {name}: gigatoken gives {ids[0]}, and "
            f"tokenizers gives {ids[1]}"
        )
    return None


def _resident_bytes() -> int | None:
    """Memory of this process, or None if the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
