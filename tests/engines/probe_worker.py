"""The worker of the layout tests, where the probing router is known."""

from __future__ import annotations

import engines.probe_router  # noqa: F401 - registers itself
from engines.layout_worker import main

if __name__ == "__main__":
    main()
