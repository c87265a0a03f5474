"""The tokenizer of a run as the files that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_hyperrouter.data.tokenize.other_libraries import GPTSentencePieceTokenizer, TikTokenizer
from megatron_hyperrouter.data.tokenize.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
)
from megatron_hyperrouter.errors import DataError


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that ends a text, or None."""
    try:
        return tokenizer.eod
    except DataError:
        return None


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, seq_length: int) -> bool:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; if there can be no such file, write the
    tokenizer's own file, if it has one, and return False.
    """
    text = tokenizer_json(tokenizer)
    if text is None:
        if (own := _own_file(tokenizer)) is not None:
            (folder / own.name).write_bytes(own.read_bytes())
        return False
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    eod = end_of_text(tokenizer)
    end = None if eod is None else tokenizer.decode([eod])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "eos_token": end,
        "pad_token": end,
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return True


def tokenizer_json(tokenizer: Tokenizer) -> str | None:
    """The text of a ``tokenizer.json`` that gives the same ids for the same text; None if there can be
    none.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.json()
    if isinstance(tokenizer, ByteTokenizer):
        return _bytes_json(tokenizer.eod)
    return None


def is_byte_tokenizer(file: Path) -> bool:
    """Whether this ``tokenizer.json`` is the one that :func:`write_tokenizer` writes for ByteTokenizer."""
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return bool(tree == json.loads(_bytes_json(ByteTokenizer().eod)))


def without_text(tokenizer: Tokenizer) -> str | None:
    """What to know of a folder that has no ``tokenizer.json``; None if it has one."""
    if tokenizer_json(tokenizer) is not None:
        return None
    own = _own_file(tokenizer)
    if own is None:
        return f"the folder has no tokenizer, because {tokenizer.type} knows only token ids"
    return (
        f"the folder has {own.name} instead of a tokenizer.json, and "
        f"AutoTokenizer may read it differently from {tokenizer.type}"
    )


def _own_file(tokenizer: Tokenizer) -> Path | None:
    if isinstance(tokenizer, (GPTSentencePieceTokenizer, TikTokenizer)):
        return Path(tokenizer.path)
    return None


def _bytes_json(eod: int) -> str:
    """A byte-level BPE without merges: the 256 letters of its alphabet, each with its byte as id, and one
    special token.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    backend = Backend(BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = Decoder()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    if backend.token_to_id(END_OF_TEXT) != eod:
        raise ValueError(f"{END_OF_TEXT} has the id {backend.token_to_id(END_OF_TEXT)}, not {eod}")
    return str(backend.to_str())


def _letters() -> list[str]:
    """The letter of each byte in GPT-2's alphabet: printable bytes represent themselves, the others U+0100
    and following.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
