"""Converts a raw value - words of a flag, or a YAML value - into the typed value of its leaf, or says what
it must be.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_hyperrouter.config.by_role import MODEL
from megatron_hyperrouter.config.leaves import Leaf
from megatron_hyperrouter.errors import BadValue
from megatron_hyperrouter.paths import expanded

LIKENESS = 0.8  # below it, a suggestion is more often wrong than right


def from_words(leaf: Leaf, words: list[str]) -> Any:
    """The value of a flag that was given with ``words``; raises :class:`BadValue`."""
    if any("\udc80" <= letter <= "\udcff" for word in words for letter in word):  # os.fsdecode made them
        raise BadValue("is not UTF-8 text, so config.yaml could not contain it", "use another name")
    return _as_meant(leaf, _from_words(leaf, words))


def from_file(leaf: Leaf, raw: object) -> Any:
    """The value of a setting that a YAML file gives; raises :class:`BadValue`."""
    return _as_meant(leaf, convert(leaf, raw))


def _from_words(leaf: Leaf, words: list[str]) -> Any:
    if leaf.base is bool and not words:
        return True
    if not words:
        raise BadValue("needs a value", f"give {leaf.describe()}")
    if leaf.is_tuple and not (len(words) == 1 and _is_none(leaf, words[0])):
        return convert(leaf, words)
    if len(words) > 1:
        raise BadValue(
            f"takes one value, got {len(words)}", "give one value; put a value with spaces in quotes"
        )
    return convert(leaf, words[0])


def switched_off(leaf: Leaf, on: list[str] | None, off: list[str]) -> bool:
    """The value of a bool whose ``--no-`` flag was given, with the words ``off`` after it; raises
    :class:`BadValue`.
    """
    if off:
        raise BadValue("takes no value", f"write {leaf.off_flag} alone, or {leaf.flag} false")
    if on is not None:
        raise BadValue(f"contradicts {leaf.flag}", "keep one of the two flags")
    return False


def convert(leaf: Leaf, raw: object) -> Any:
    """The typed value of ``raw``, which is a word, a YAML value or already of the right type; raises
    :class:`BadValue`.
    """
    if _is_none(leaf, raw):
        return None
    try:
        return _adapter(leaf).validate_python(_prepared(leaf, raw))
    except ValidationError as error:
        raise BadValue(f"must be {leaf.describe()}", _remedy(leaf, raw)) from error


def _as_meant(leaf: Leaf, value: Any) -> Any:
    """Paths expanded as by a shell, and a blend that was written as one text split into words."""
    if not leaf.is_path or value is None:
        return value
    return tuple(map(expanded, _blend_words(value))) if leaf.is_tuple else expanded(value)


def _blend_words(words: tuple[str, ...]) -> Iterable[str]:
    """``("0.3 a 0.7 b",)`` -> its four words; a prefix with spaces in it stays as it is."""
    parts = words[0].split() if len(words) == 1 else []
    return parts if len(parts) > 1 and re.fullmatch(r"\d+(\.\d*)?|\.\d+", parts[0]) else words


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``word`` was probably meant to be."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=LIKENESS)
    return found[0] if found else None


def _is_none(leaf: Leaf, raw: object) -> bool:
    return leaf.optional and (raw is None or (isinstance(raw, str) and raw.strip().lower() == "none"))


@lru_cache(maxsize=512)
def _adapter(leaf: Leaf) -> TypeAdapter[Any]:
    return TypeAdapter(leaf.kind, config=ConfigDict(allow_inf_nan=False))


def _prepared(leaf: Leaf, raw: object) -> object:
    """Undo YAML's typing where words are meant (0.3 in a blend), and refuse what Python would accept (True
    as an int).
    """
    if leaf.is_tuple:
        items = [raw] if isinstance(raw, str) else raw
        if not isinstance(items, (list, tuple)):
            return None
        return [
            str(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else item
            for item in items
        ]
    if leaf.choices:
        return {str(choice): choice for choice in leaf.choices}.get(str(raw), raw)
    if isinstance(raw, bool) and leaf.base is not bool:
        return None
    return raw


def _remedy(leaf: Leaf, raw: object) -> str:
    if leaf.name == "tokenizer_type" and str(raw).endswith("Tokenizer"):  # another library's, not a slip
        return (
            "use HuggingFaceTokenizer and set --tokenizer-model to a folder or to a model name on the "
            "Hugging Face hub"
        )
    if close := nearest(str(raw), map(str, leaf.choices)):
        return f"did you mean {close}?"
    # Omitting a setting that defines the model is not a remedy: the default is another model.
    has_default = leaf.default is not None and not leaf.is_tuple and leaf.role not in MODEL
    default = f", or leave it out (default: {leaf.default})" if has_default else ""
    if leaf.base is str:
        return "put the value in quotes"
    if leaf.choices:
        return f"choose one of these values{default}"
    return f"give {leaf.describe()}{default}"
