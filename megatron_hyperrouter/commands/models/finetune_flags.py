"""The flags of ``mhr finetune``, from the command line and from a YAML file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.evaluate.trained import add_run_flags
from megatron_hyperrouter.finetuning.settings import Settings
from megatron_hyperrouter.guard.ranks import adopt_ranks
from megatron_hyperrouter.terminal import Parser, parser

_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


def read_flags(arguments: Sequence[str], description: str) -> Namespace:
    """The flags, those of --config first; a wrong one ends with status 2.  Tasks of srun and mpirun become
    ranks.
    """
    flags = all_flags(description)
    written, _ = _config_flag().parse_known_args(arguments)
    args = flags.parse_args([*(words_of(written.config) if written.config else ()), *arguments])
    if args.compare:
        return args
    if missing := [flag for flag in ("load", "task", "output") if getattr(args, flag) is None]:
        flags.error(f"the following arguments are required: {', '.join(f'--{flag}' for flag in missing)}")
    adopt_ranks()
    return args


def _config_flag() -> Parser:
    flags = Parser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config", type=Path)
    return flags


def words_of(path: Path) -> list[str]:
    """The settings of a YAML file as flags."""
    from megatron_hyperrouter.config.reading.yaml_text import load_yaml, why_not

    try:
        found = load_yaml(str(path)) or {}
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("--config", path, why_not(error), "give a YAML file of flags")]) from error
    if not isinstance(found, dict):
        remedy = "write one flag on each line, such as lr: 1.0e-4"
        raise ConfigError([Problem("--config", path, "must map flags to values", remedy)])
    words = list[str]()
    for name, value in found.items():
        flag = f"--{str(name).replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def all_flags(description: str) -> Parser:
    """What ``--help`` shows."""
    flags = parser(description)
    flags.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="YAML file with flags of this command; flags on the command line override the file",
    )
    add_run_flags(flags, data=False)
    _optional(flags, "--load")
    flags.add_argument("--task", type=Path, metavar="DIR", help="folder with the data of the task")
    flags.add_argument("--output", type=Path, metavar="DIR", help="folder to write the results to")
    flags.add_argument(
        "--test",
        action="store_true",
        help=(
            "instead of training, test the saved weights of an earlier fine-tuning run; name their "
            "folder with --load OUTPUT/seed-N"
        ),
    )
    flags.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="instead of training, compare the results in two output folders of this command, A and "
        "B, with McNemar's test and a paired bootstrap; to save the comparison, add --output "
        "FILE.json",
    )
    _method(flags)
    _course(flags)
    layout = flags.add_argument_group("engine and layout (default: as in the run if that fits the ranks)")
    layout.add_argument("--engine", choices=("deepspeed", "megatron"), help="training engine")
    for name in _LAYOUT:
        meaning = f"{name.removesuffix('_model_parallel_size')}-parallel size"
        layout.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=meaning)
    layout.add_argument(
        "--sequence-parallel",
        action="store_true",
        default=None,
        help=(
            "sequence parallelism: split the sequence over the tensor-parallel ranks in norms, "
            "dropout and the residual stream"
        ),
    )
    return flags


def _method(flags: ArgumentParser) -> None:
    add = flags.add_argument_group("method").add_argument
    add(
        "--topk",
        type=int,
        nargs="+",
        metavar="K",
        help="values of k (active experts per token) at which to test the model (default: the k of "
        "fine-tuning)",
    )
    add(
        "--finetune-k",
        type=int,
        metavar="K",
        help="number of active experts during fine-tuning (default: the final k of the run)",
    )
    add(
        "--freeze",
        default="none",
        metavar="PARTS",
        help="parts of the model to freeze: none, router, experts, or router,experts (default: none)",
    )
    add(
        "--aux-loss-coeff",
        type=float,
        metavar="X",
        help="weight of the load-balancing loss (default: as in the run)",
    )
    add(
        "--dropout",
        type=float,
        default=0.0,
        metavar="X",
        help="dropout rate in the classification head and on residual branches (default: 0)",
    )
    add(
        "--seq-length",
        type=int,
        metavar="N",
        help=(
            "maximum length of a text in tokens; longer texts are truncated to their last N tokens (default: "
            "the sequence length of the run)"
        ),
    )


def _course(flags: ArgumentParser) -> None:
    add = flags.add_argument_group("training schedule and seeds").add_argument
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="number of fine-tuning runs, with the seeds 1 to N (default: 1)",
    )
    add(
        "--epochs",
        type=float,
        default=3.0,
        metavar="X",
        help="number of passes over the training examples (default: 3)",
    )
    add("--steps", type=int, metavar="N", help="number of optimizer steps, instead of --epochs")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="number of texts in one optimizer step (default: 16)",
    )
    add(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="number of texts in one forward pass on one rank (default: 8)",
    )
    add("--lr", type=float, default=1e-4, metavar="X", help="peak learning rate of AdamW (default: 1e-4)")
    add(
        "--lr-decay-style",
        choices=("cosine", "linear", "constant"),
        default="cosine",
        help="shape of the learning-rate decay after the warm-up (default: cosine)",
    )
    add(
        "--warmup",
        type=float,
        default=0.06,
        metavar="X",
        help="length of the learning-rate warm-up, as a fraction of the steps (default: 0.06)",
    )
    add(
        "--weight-decay", type=float, default=0.01, metavar="X", help="decoupled weight decay (default: 0.01)"
    )
    add(
        "--clip-grad",
        type=float,
        default=1.0,
        metavar="X",
        help="clip gradients to the global norm X; 0: no clipping (default: 1)",
    )
    add(
        "--evaluations",
        type=int,
        default=3,
        metavar="N",
        help=(
            "number of evaluations on the dev data during training; the weights with the best score "
            "are then tested (default: 3)"
        ),
    )


def _optional(flags: ArgumentParser, name: str) -> None:
    """Make the flag optional: --compare needs no run, and --config may name it.  The run is opened later."""
    action = next(action for action in flags._actions if name in action.option_strings)
    action.required, action.type = False, Path


def settings_of(args: Namespace) -> Settings:
    """The flags as settings; the list of parts to freeze is split."""
    values = {each.name: getattr(args, each.name) for each in fields(Settings)}
    words = [word for word in args.freeze.split(",") if word]
    values["freeze"] = tuple(word for word in words if word != "none")
    values["topk"] = None if args.topk is None else tuple(args.topk)
    return Settings(**values)


def layout_of(args: Namespace) -> dict[str, object]:
    """The settings of engine and layout that were given."""
    names = ("engine", *_LAYOUT, "sequence_parallel")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


@contextmanager
def own_flags() -> Iterator[None]:
    """Problems of settings name the flags of this command."""
    own = {"--global-batch-size": "--batch-size", "--moe-aux-loss-coeff": "--aux-loss-coeff"}
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            [replace(each, field=own.get(each.field, each.field)) for each in error.problems]
        ) from error
