"""Layer specs of megatron-core, which differ between its versions."""

from __future__ import annotations

from functools import partial
from typing import Any


def submodules_of(spec: Any) -> Any:
    """The submodules that ``spec`` was made with, to read or to replace.

    megatron-core 0.16.1 has a ``ModuleSpec`` for each part of a layer; 0.19.2 has a ``functools.partial`` for
    some (moe_module_specs.py:87).
    """
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
