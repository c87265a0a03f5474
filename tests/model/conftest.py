"""One rank's parallel groups, which megatron-core's layers ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from one_rank import world


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with world(tmp_path_factory.mktemp("world")):
        yield
