"""The command `mhr train` of this checkout; --help explains it."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)
__import__("megatron_hyperrouter.commands.main", fromlist=["start"]).start("train")
