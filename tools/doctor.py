"""The command `mhr doctor` of this checkout; --help explains it."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
__import__("megatron_hyperrouter.commands.main", fromlist=["start"]).start("doctor")
