"""The command `mhr train` of this checkout, for a launcher; --help explains it."""

from megatron_hyperrouter.commands.main import start

if __name__ == "__main__":
    start("train")
