"""Python processes that this package starts: they import the same copy of the package from any folder."""

from __future__ import annotations

import os
from pathlib import Path

# Set in the environment of ranks that have met: the prefix of their keys in the rendezvous store.
ROUND = "HYPERROUTER_ROUND"
_PARENT = str(Path(__file__).resolve().parent.parent)


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for ``python -m megatron_hyperrouter...``, with ``more`` variables."""
    path = os.pathsep.join(filter(None, (_PARENT, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | more
