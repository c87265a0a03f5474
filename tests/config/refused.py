"""What the parser says of a command line that it refuses."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError

DATA = ["--data-path", "corpus"]


def problems_of(routers, *argv: str, **keywords) -> list:
    with pytest.raises(ConfigError) as error:
        parse(argv, routers=routers, **keywords)
    return list(error.value.problems)
