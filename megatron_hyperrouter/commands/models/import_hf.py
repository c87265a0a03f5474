"""Turn a Hugging Face model into a run folder for training, evaluation and export.

A mixture-of-experts model keeps its router (--router topk), or a HyperRouter is added to that router
(--router hyper).  In both cases the run computes the same function as the given model.  --reset-router
initializes a new router at random, so the run's outputs differ from the model's.  --upcycle E turns a dense
model (Llama, Mistral, Qwen3, or a run of this program with one expert) into a mixture of E experts.  The
command compares the run with the given model in transformers, and writes the result to
import_certificate.json in the run folder.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem
from megatron_hyperrouter.terminal import note, parser, show

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.importing.source import HfFolder
    from megatron_hyperrouter.importing.upcycle import UpcycledWeights
    from megatron_hyperrouter.importing.weights import ImportedWeights

CERTIFICATE = "import_certificate.json"
_UNEQUAL = "the run and the given model compute different results:"
_NOT_COMPARED = "the run could not be compared with the given model:"
_KEEP = ("topk", "hyper")  # routers that can compute a given matrix
_NOT_SUMMED = ("xmoe", "stablemoe")  # a token's weights do not sum to 1
_SCALED = ("topk", "hyper", "smoe_dropout")  # have --router.pre-softmax


def main(arguments: Sequence[str]) -> None:
    """Folder -> settings, routers and weights -> draft of the run folder -> proof -> its name."""
    args = read_flags(arguments)
    from megatron_hyperrouter.files import publish, unfinished_folder, write_json
    from megatron_hyperrouter.importing.fitting import fitting_folder
    from megatron_hyperrouter.importing.weights import ImportedWeights
    from megatron_hyperrouter.proof.imports import check_other_side, prove_import

    if not args.no_proof:
        check_other_side(args.python)
    with given_folder(args) as (given, tokenizer), unfinished_folder(args.output) as draft:
        folder = fitting_folder(given)
        check_flags(args, folder)
        weights = weights_of(args, folder)
        if isinstance(weights, ImportedWeights) and weights.left_out:
            note(
                "note: the multi-token prediction layers are not imported; the model's logits do "
                "not depend on them"
            )
        run = run_of(args, folder, weights, tokenizer)
        for line in run.router.options.warnings(topk=run.model.moe_router_topk):
            note(f"note: {line}")
        if run.data.tokenizer_type == "NullTokenizer" and not tokenizer:
            note(
                f"note: {given} has no tokenizer.json, so the run has no tokenizer for text "
                "(to give it one: --tokenizer-model FILE)"
            )
        write(draft, run, weights, reset=args.reset_router or copies(args, folder))
        moved = bool(args.reset_router or args.noise or args.redraw or args.scale_pre_softmax)
        asked, topks = asked_of(args), topks_of(args, folder, run)
        certificate, faults = prove_import(draft, folder, topks, asked, moved=moved)
        write_json(draft / CERTIFICATE, certificate)
        target = publish(draft, args.output, failed=bool(faults))
    if faults:
        raise CheckpointError(
            "\n  - ".join([_UNEQUAL if not moved else _NOT_COMPARED, *faults]),
            remedy=f"read {CERTIFICATE} in {target}, which lists all differences",
        )
    report(target, run, folder, certificate)


@contextmanager
def given_folder(args: Namespace) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The Hugging Face folder; a dense run of this program is first written as one.  Also the settings of
    that run's tokenizer, because not every tokenizer can be a file of the folder.
    """
    given: Path = args.input
    if (given / "config.json").is_file() or not (given / "checkpoints").is_dir():
        yield given, {}
        return
    from megatron_hyperrouter.evaluate.trained import TrainedRun
    from megatron_hyperrouter.export.sources import check_files, plain_run, weight_reader
    from megatron_hyperrouter.importing.own_dense import write_dense
    from megatron_hyperrouter.importing.source import tokenizer_of_run

    trained = TrainedRun.open(given, tokenizer_model=args.tokenizer_model)
    check_files(trained.checkpoint)
    with TemporaryDirectory(prefix="mhr-dense-") as name:
        folder = Path(name) / trained.run_dir.name
        folder.mkdir()
        reader = weight_reader(trained.checkpoint)
        write_dense(plain_run(trained.settings), reader, trained.tokenizer(), folder)
        yield folder, tokenizer_of_run(trained.settings)


def copies(args: Namespace, folder: HfFolder) -> bool:
    """Whether all experts are equal; any router whose weights sum to 1 then computes the dense model."""
    return folder.dense and args.granularity == 1


def topks_of(args: Namespace, folder: HfFolder, run: RunConfig) -> list[int]:
    """Values of k to compare at: for a dense model, whole copies of its MLP; else those at which both
    programs choose the same groups of experts.
    """
    from megatron_hyperrouter.importing.fitting import check_equal, equal_topks

    if args.scale_pre_softmax:
        return [run.model.moe_router_topk]  # the factor is that of this k
    if folder.dense:
        return sorted({args.granularity, run.model.moe_router_topk, run.model.num_experts})
    check_equal(folder, run, args.proof_topk or (), "--proof-topk")
    fit = equal_topks(folder, run)
    return sorted({*(k for k in (1, 2, 4, 8) if k in fit), run.model.moe_router_topk})


def weights_of(args: Namespace, folder: HfFolder) -> ImportedWeights | UpcycledWeights:
    """A reader of the folder's tensors under this program's names."""
    from megatron_hyperrouter.importing.upcycle import UpcycledWeights, UpcycleOptions
    from megatron_hyperrouter.importing.weights import ImportedWeights

    if not folder.dense:
        return ImportedWeights(folder)
    recipe = UpcycleOptions(
        experts=args.upcycle,
        granularity=args.granularity,
        topk=args.topk or 2 * args.granularity,
        noise=args.noise,
        redraw=args.redraw,
        seed=args.seed,
        pre_softmax=args.scale_pre_softmax,
    )
    return UpcycledWeights(folder, recipe)


def run_of(
    args: Namespace,
    folder: HfFolder,
    weights: ImportedWeights | UpcycledWeights,
    own_tokenizer: dict[str, Any],
) -> RunConfig:
    """The settings of the run; ``own_tokenizer``: those of the tokenizer of a dense run of this program."""
    from megatron_hyperrouter.importing.fitting import check_tokenizer, settings_of_folder
    from megatron_hyperrouter.importing.settings import run_of as checked_run
    from megatron_hyperrouter.importing.settings import tokenizer_settings

    settings = settings_of_folder(folder)
    if recipe := getattr(weights, "recipe", None):
        settings |= {
            "num_experts": recipe.experts,
            "moe_router_topk": recipe.topk,
            "moe_ffn_hidden_size": folder.expert_width // recipe.granularity,
        }
    router = settings["router"]
    if args.router not in _KEEP:
        router = {}
    settings["router"] = router | {"name": args.router}
    if args.scale_pre_softmax:
        settings["router"] |= {"pre_softmax": True}
    if args.router == "hyper" and not (args.reset_router or copies(args, folder)):
        settings["router"] |= {"anchor": True}
    tokenizer = Path(args.tokenizer_model) if args.tokenizer_model else folder.path / "tokenizer.json"
    settings |= own_tokenizer or tokenizer_settings(tokenizer, folder.rows)
    settings |= {
        "seq_length": args.seq_length or settings["seq_length"],
        **({"data_path": args.data_path} if args.data_path else {}),
        "run_dir": str(args.output),
        "engine": args.engine,
        "seed": args.seed,
    }
    run = checked_run(settings)
    check_tokenizer(run, tokenizer, folder.rows)
    return run


def write(draft: Path, run: RunConfig, weights: ImportedWeights | UpcycledWeights, *, reset: bool) -> None:
    """The run folder, except for its certificate."""
    from types import SimpleNamespace
    from typing import cast

    from megatron_hyperrouter.export.sources import OneProcess
    from megatron_hyperrouter.importing.routers import imported_routers
    from megatron_hyperrouter.importing.run_folder import write_run
    from megatron_hyperrouter.importing.weights import checked
    from megatron_hyperrouter.train.resuming.run_meta import run_meta

    names, rows = weights.names(), weights.folder.rows
    read = checked(weights.read, names, run, weights.folder)
    routers = imported_routers(run, names, read, vocab_size=rows, reset=reset)
    engine = cast("Engine", SimpleNamespace(place=OneProcess.place))
    meta = run_meta(run, engine) | {"imported": weights.folder.architecture}
    write_run(draft, run, names, read, routers, meta)


def asked_of(args: Namespace) -> Any:
    """What the proof has to compare."""
    from megatron_hyperrouter.proof.exports import Asked

    return None if args.no_proof else Asked(args.proof_topk, args.proof_samples, None, args.python)


def check_flags(args: Namespace, folder: HfFolder) -> None:
    """ConfigError that lists all flags that cannot be used with this folder."""
    from megatron_hyperrouter.importing.settings import router_names

    found: list[Problem] = []
    if args.router not in router_names():
        rule = f"must be one of {', '.join(router_names())}"
        raise ConfigError([Problem("--router", args.router, rule, "choose one of these routers")])
    if folder.dense and args.upcycle is None:
        rule = f"must be given for a dense model ({folder.architecture})"
        found.append(Problem("--upcycle", "", rule, "add --upcycle E, the number of experts"))
    if not folder.dense:
        rule = f"is only for dense models, but this model is {folder.architecture}"
        given = {
            "--upcycle": args.upcycle,
            "--noise": args.noise,
            "--redraw": args.redraw,
            "--scale-pre-softmax": args.scale_pre_softmax,
            "--topk": args.topk,
        }
        found += [
            Problem(name, "" if value is True else value, rule, "leave it out")
            for name, value in given.items()
            if value
        ]
        if args.granularity != 1:
            found.append(Problem("--granularity", args.granularity, rule, "leave it out"))
    if args.router not in _KEEP and not args.reset_router and not copies(args, folder):
        rule = f"cannot keep the model's own router; only {' and '.join(_KEEP)} can"
        found.append(
            Problem("--router", args.router, rule, "add --reset-router to start with a new random router")
        )
    if copies(args, folder) and args.router in _NOT_SUMMED and not args.reset_router:
        rule = (
            "gives the chosen experts weights that do not sum to 1, so the run's outputs would "
            "differ from the dense model's"
        )
        found.append(Problem("--router", args.router, rule, "choose another router, such as topk or hyper"))
    if args.scale_pre_softmax and args.router not in _SCALED:
        rule = f"works only with the routers {', '.join(_SCALED)}"
        found.append(Problem("--scale-pre-softmax", "", rule, "leave it out"))
    if args.tokenizer_model and not Path(args.tokenizer_model).is_file():
        rule = "must be an existing file"
        found.append(Problem("--tokenizer-model", args.tokenizer_model, rule, "give a tokenizer.json"))
    if found:
        raise ConfigError(found)


def report(target: Path, run: RunConfig, folder: HfFolder, certificate: dict[str, Any]) -> None:
    """A table for the terminal."""
    from megatron_hyperrouter.importing.settings import has_data, train_command

    model = run.model
    show(
        f"{target}: {folder.architecture}, {model.num_layers} layers of {model.num_experts} experts, "
        f"k = {model.moe_router_topk}, router {run.router.name}"
    )
    if not has_data(run):
        words = train_command(target)
        show(f"To train it: {words} --data-path P --run-dir NEW (or --mock-data instead of --data-path P)")
    proof = certificate["proof"]
    if proof is None:
        show("The run was not compared with the given model (--no-proof).")
        return
    show(f"{'k':>4} {'max difference':>15} {'same top token':>15}")
    for row in proof["results"]:
        show(f"{row['topk']:>4} {row['max_difference_all']:>15.2e} {100 * row['equal_argmax']:>14.2f}%")


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(__doc__ or "")
    add = flags.add_argument
    add(
        "--input",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of a Hugging Face model, or run folder of a model with one expert",
    )
    add("--output", type=Path, required=True, metavar="RUN", help="run folder to write; it must not exist")
    add(
        "--router",
        default="topk",
        metavar="NAME",
        help="topk: keep the model's router; hyper: add a HyperRouter to the model's router. With "
        "--reset-router, NAME can be any router (default: topk)",
    )
    add(
        "--reset-router",
        action="store_true",
        help="start with a random router; the outputs of the run then differ from those of the given model",
    )
    add(
        "--engine",
        choices=("deepspeed", "megatron"),
        default="deepspeed",
        help="training engine of the run (default: deepspeed)",
    )
    add(
        "--data-path",
        nargs="+",
        metavar="P",
        help="prefixes of the token files that the run will be trained on",
    )
    add(
        "--seq-length",
        type=int,
        metavar="S",
        help="sequence length of the run, in tokens (default: max_position_embeddings in config.json)",
    )
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer file (default: tokenizer.json in the input folder)",
    )
    _upcycling_flags(flags)
    add(
        "--no-proof",
        action="store_true",
        help="do not check that the run computes the same function as the given model",
    )
    add(
        "--proof-topk",
        type=int,
        nargs="+",
        metavar="K",
        help="values of k at which to compare the run with the given model (default: 1 2 4 8)",
    )
    add(
        "--proof-samples",
        type=int,
        default=2,
        metavar="N",
        help="number of samples on which to compare the run with the given model (default: 2)",
    )
    add(
        "--python",
        metavar="FILE",
        help="Python interpreter with transformers installed (default: the interpreter that runs "
        "this command)",
    )
    args = flags.parse_args(arguments)
    flags.check_at_least(args, 1, "proof_samples", "seq_length", "upcycle", "granularity", "topk")
    return args


def _upcycling_flags(flags: ArgumentParser) -> None:
    add = flags.add_argument
    add(
        "--upcycle",
        type=int,
        metavar="E",
        help="turn a dense model into a mixture-of-experts model; the E experts of a layer are "
        "copies of its MLP, or parts of copies (see --granularity)",
    )
    add(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="with --upcycle: split each copy of the MLP into G experts (default: 1)",
    )
    add(
        "--topk",
        type=int,
        metavar="K",
        help="with --upcycle: number of active experts per token (default: 2 x G)",
    )
    add(
        "--noise",
        type=float,
        default=0.0,
        metavar="X",
        help=(
            "with --upcycle: add noise to all copies of the MLP except the first copy; the noise "
            "has X times the standard deviation of the weights"
        ),
    )
    add(
        "--redraw",
        type=float,
        default=0.0,
        metavar="R",
        help=(
            "with --upcycle: fraction of the hidden units to initialize at random, in all copies of "
            "the MLP except the first copy"
        ),
    )
    add(
        "--scale-pre-softmax",
        action="store_true",
        help="with --upcycle: use --router.pre-softmax (softmax over all E experts), and multiply "
        "the output of the experts by E/K. The MLP's output is preserved only while the router "
        "gives all experts the same weight",
    )
    add(
        "--seed",
        type=int,
        default=1234,
        metavar="N",
        help="random seed for the new router, --noise and --redraw (default: 1234)",
    )
