"""The command `mhr finetune` of this checkout; --help explains it."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.path[0] = sys.path[0].removesuffix("tools")
    import_module("megatron_hyperrouter.commands.main").start("finetune")
