"""The command `mhr lm-eval` of this checkout; --help explains it."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
__import__("megatron_hyperrouter.commands.main", fromlist=["start"]).start("lm-eval")
