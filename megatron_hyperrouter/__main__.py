"""``python -m megatron_hyperrouter NAME ...`` is ``mhr NAME ...``."""

from __future__ import annotations

from megatron_hyperrouter.commands.main import mhr

if __name__ == "__main__":
    mhr()
