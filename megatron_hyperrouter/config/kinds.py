"""The kinds of values that settings and routers' options share."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le
from pydantic import BeforeValidator

Count = Annotated[int, Ge(1)]  # 1, 2, 3, ...
Natural = Annotated[int, Ge(0)]  # 0, 1, 2, ...
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
NonNegative = Annotated[float, Ge(0.0)]
MOST_LAYERS = 10_000  # more is a typing error, which must not fill the memory
Layers = Annotated[int, Ge(1), Le(MOST_LAYERS)]
Experts = Annotated[int, Ge(1), Le(100_000)]  # for the same reason
# Text that a YAML file may hold as a number or a list too: 2, [0, 1, 1].
YamlWord = Annotated[str, BeforeValidator(lambda raw: str(raw) if isinstance(raw, int | list) else raw)]
