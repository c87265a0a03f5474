"""Export a trained run to a Hugging Face folder, and certify that transformers computes the same model.

The router is exported as a plain matrix.  The run's settings determine the model class of transformers.  The
command then runs transformers in a separate process and compares logits, chosen experts and losses at several
k.  If they differ too much, the folder is named FOLDER.failed and the exit status is 4.  --verify FOLDER
checks an existing folder and needs only the Python standard library; --numbers also runs transformers again.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.evaluate.trained import run_path
from megatron_hyperrouter.export.verify import differences, read_certificate
from megatron_hyperrouter.terminal import Parser, note, parser, show

if TYPE_CHECKING:
    from megatron_hyperrouter.export.folder import Export
    from megatron_hyperrouter.proof.exports import Asked

_VERIFYING = ("verify", "numbers", "python", "local_rank")  # flags that --verify can be combined with
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(arguments: Sequence[str]) -> None:
    """Write a folder, or check one."""
    args = read_flags(arguments)
    if args.verify is not None:
        verify_folder(args)
        return
    write_folder(args)


def write_folder(args: Namespace, *, quiet: bool = False, served: Sequence[int] = ()) -> None:
    """Checkpoint -> draft folder -> proof -> certificate -> the folder's name; ``served``: other values of k
    that a caller will use the folder with.
    """
    from megatron_hyperrouter.evaluate.perplexity import check_topks
    from megatron_hyperrouter.export.card import write_card
    from megatron_hyperrouter.export.certificate import certificate, write_certificate
    from megatron_hyperrouter.export.folder import write_model
    from megatron_hyperrouter.files import publish, unfinished_folder
    from megatron_hyperrouter.proof.bounds import bounds
    from megatron_hyperrouter.proof.exports import prove

    check_libraries(args)
    job, came_from = export_of(args)
    check_topks(served, job.run.model.num_experts, router=job.run.router)
    job.gates.check_served(served, "--topk")
    with unfinished_folder(args.output) as draft:
        digests = write_model(job, draft)
        proof, faults = (None, []) if args.no_proof else prove(job, draft, asked_of(args))
        write_card(job, draft, proof=proof, step=came_from["step"], license_=args.license)
        content = certificate(
            job, draft, came_from=came_from, tensors=digests, proof=proof, bounds=bounds(job.dtype)
        )
        write_certificate(draft, content)
        folder = publish(draft, args.output, failed=bool(faults))
    if faults:
        raise CheckpointError(
            "\n  - ".join(["the exported folder differs too much from the run:", *faults]),
            remedy=f"read certificate.json in {folder}, which lists all differences",
        )
    if args.gguf is not None:
        write_gguf(args, folder)
    if not quiet:
        report(job, folder, len(digests), proof)


def check_libraries(args: Namespace) -> None:
    """HostError if a library for the proof or the GGUF file is missing; ConfigError if that file cannot be
    written.
    """
    from megatron_hyperrouter.files import check_output
    from megatron_hyperrouter.proof.child import COMPARE, GGUF, require

    if not args.no_proof:
        require(COMPARE, python=args.python)
    if args.gguf is not None:
        require(GGUF, python=args.python)
        check_output(args.gguf, "--gguf")


def export_of(args: Namespace) -> tuple[Export, dict[str, Any]]:
    """What will be written, and its origin for the certificate."""
    from megatron_hyperrouter.evaluate.calibration import scales_of_run
    from megatron_hyperrouter.evaluate.perplexity import check_topks
    from megatron_hyperrouter.evaluate.trained import TrainedRun
    from megatron_hyperrouter.export.card import notes_of
    from megatron_hyperrouter.export.certificate import source
    from megatron_hyperrouter.export.folder import Export
    from megatron_hyperrouter.export.gates import custom_gates, standard_gates
    from megatron_hyperrouter.export.gguf import check_gguf
    from megatron_hyperrouter.export.sources import (
        check_files,
        plain_run,
        routers_of,
        vocabulary_rows,
        weight_reader,
    )

    trained = TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model)
    checkpoint = trained.checkpoint
    check_files(checkpoint)
    run = plain_run(trained.settings)
    topk = run.model.moe_router_topk if args.topk is None else args.topk
    tokenizer = trained.tokenizer()
    check_topks([topk], run.model.num_experts, router=run.router)
    check_topks(args.proof_topk or [], run.model.num_experts, router=run.router, flag="--proof-topk")
    reader = weight_reader(checkpoint)
    routers = routers_of(run, reader, vocab_size=tokenizer.vocab_size)
    rows = vocabulary_rows(reader)
    gates = custom_gates(run, routers, rows=rows) if args.custom_code else standard_gates(run, routers, topk)
    gates.check_served(args.proof_topk or [], "--proof-topk")
    if args.gguf is not None:
        check_gguf(run, gates.target, args.dtype, tokenizer)
    scales, notes = None, list(notes_of(trained.settings, tokenizer, gates.target))
    if args.calibrate_k:
        scales = scales_of_run(trained, tokenizer, [topk])[topk]
        notes.append(
            f"the output of each MoE layer is rescaled for k = {topk} (--calibrate-k); the scales do "
            "not fit any other k"
        )
    for line in notes:
        note(f"note: {line}")
    size = args.max_shard_size
    job = Export(run, checkpoint, gates, tokenizer, args.dtype, topk, size, tuple(notes), scales)
    return job, source(run, checkpoint, routers)


def write_gguf(args: Namespace, folder: Path) -> None:
    """The folder's weights for llama.cpp, in one file."""
    from megatron_hyperrouter.proof.child import GGUF, ask

    args.gguf.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.gguf.parent, prefix=f".{args.gguf.name}.") as name:
        file = Path(name).resolve() / args.gguf.name
        task = {"folder": str(folder.resolve()), "file": str(file), "name": folder.name}
        ask(task, python=args.python, script=GGUF)
        file.replace(args.gguf)
    show(f"{args.gguf}: {args.gguf.stat().st_size:,} bytes, in GGUF format for llama.cpp")


def asked_of(args: Namespace) -> Asked:
    """What the proof has to compare."""
    from megatron_hyperrouter.proof.exports import Asked

    return Asked(args.proof_topk, args.proof_samples, args.proof_data, args.python)


def verify_folder(args: Namespace) -> None:
    """Compare the folder with its certificate; status 4 lists every difference."""
    content = read_certificate(args.verify)
    found = differences(args.verify, content)
    if not found and args.numbers:
        from megatron_hyperrouter.proof.bounds import score_faults
        from megatron_hyperrouter.proof.child import ask

        if content["proof"] is None:
            raise CheckpointError(
                f"{args.verify} was written with --no-proof, so it has no numbers to compare with",
                remedy="export the folder again without --no-proof, or leave out --numbers",
            )
        dtype = content["model"]["dtype"]
        task = {
            "folder": str(args.verify.resolve()),
            "tokens": content["proof"]["rows"],
            "topks": [row["topk"] for row in content["proof"]["results"]],
            "dtype": dtype,
            "custom_code": content["model"]["custom_code"],
        }
        found = score_faults(content, ask(task, python=args.python), dtype)
    if found:
        raise CheckpointError(
            "\n  - ".join([f"{args.verify} differs from its certificate:", *found]),
            remedy="copy the folder again from the original",
        )
    what = f"{len(content['tensors'])} tensors and {len(content['files'])} files"
    show(f"{args.verify}: {what} match the certificate" + (", and so do the losses" if args.numbers else ""))


def report(job: Export, folder: Path, tensors: int, proof: dict[str, Any] | None) -> None:
    """A table for the terminal."""
    show(f"{folder}: {job.gates.target.architecture}, {tensors} tensors in {job.dtype}, k = {job.topk}")
    if proof is None:
        show("This folder was not compared with transformers (--no-proof).")
        return
    show(f"{'k':>4} {'max difference':>15} {'same experts':>13} {'perplexity':>11} {'transformers':>13}")
    for row in proof["results"]:
        same = 100 * min(row["equal_experts"], default=1.0)
        show(
            f"{row['topk']:>4} {row['max_difference']:>15.2e} {same:>12.2f}% {row['perplexity']:>11.4f} "
            f"{row['perplexity_hf']:>13.4f}"
        )


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(__doc__ or "")
    add = flags.add_argument
    add(
        "--load",
        type=run_path,
        metavar="RUN_DIR",
        help="run folder, its checkpoints/ folder, or one checkpoint folder",
    )
    add(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer file, needed only if the checkpoint does not contain the tokenizer",
    )
    add("--output", type=Path, metavar="FOLDER", help="folder to write; it must not exist")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="data type of the exported weights (default: float32)",
    )
    add(
        "--topk",
        type=int,
        metavar="K",
        help="number of active experts per token in the exported model (default: the final k of training)",
    )
    add(
        "--max-shard-size",
        type=size,
        default=size("5GB"),
        metavar="SIZE",
        help="maximum size of each weights file (default: 5GB)",
    )
    add(
        "--custom-code",
        action="store_true",
        help="add modeling code to the folder, for a router that transformers does not support",
    )
    add(
        "--calibrate-k",
        action="store_true",
        help="rescale the output of each MoE layer for the exported k, as mhr evaluate --calibrate-k "
        "does; the output matrices of the layer's experts are multiplied by the scale",
    )
    add("--license", metavar="NAME", help="license to name in the model card, such as apache-2.0")
    _proof_flags(flags)
    args = flags.parse_args(arguments)
    _check_together(flags, args)
    return args


def _proof_flags(flags: Parser) -> None:
    """The flags of the proof, of the GGUF file and of --verify."""
    add = flags.add_argument
    add("--no-proof", action="store_true", help="do not check that transformers computes the same model")
    add(
        "--proof-topk",
        type=int,
        nargs="+",
        metavar="K",
        help="values of k at which to compare the exported model with the run (default: 1 2 4 8)",
    )
    add(
        "--proof-samples",
        type=int,
        default=4,
        metavar="N",
        help="number of samples on which to compare the exported model with the run (default: 4)",
    )
    add(
        "--proof-data",
        "--data-path",
        nargs="+",
        metavar="P",
        help="prefixes of the token files from which to take the samples to compare (default: the "
        "run's test split)",
    )
    add(
        "--gguf",
        type=Path,
        metavar="FILE",
        help="also write the weights to a GGUF file for llama.cpp",
    )
    add(
        "--python",
        metavar="FILE",
        help="Python interpreter with transformers installed (default: the interpreter that runs "
        "this command)",
    )
    add(
        "--verify",
        type=Path,
        metavar="FOLDER",
        help="instead of exporting, check that the exported FOLDER matches its certificate",
    )
    add(
        "--numbers",
        action="store_true",
        help="with --verify: also recompute the losses with transformers, and compare them with the "
        "certificate",
    )


def _check_together(flags: Parser, args: Namespace) -> None:
    if args.verify is None:
        if missing := [name for name in ("load", "output") if getattr(args, name) is None]:
            names = " and ".join(f"--{name}" for name in missing)
            rule = "is required without --verify"
            flags.refuse(names, "", rule, f"add {names}, or give --verify FOLDER to verify a folder")
        if args.numbers:
            flags.refuse("--numbers", "", "needs --verify FOLDER", "add --verify FOLDER")
        if args.gguf is not None and args.gguf.absolute().is_relative_to(args.output.absolute()):
            rule = f"must not be in the folder of --output = {args.output}"
            flags.refuse("--gguf", args.gguf, rule, "name a file outside that folder")
    elif unused := [
        f"--{name.replace('_', '-')}"
        for name, value in vars(args).items()
        if name not in _VERIFYING and value != flags.get_default(name)
    ]:
        names = " and ".join(unused)
        flags.refuse("--verify", args.verify, f"cannot be combined with {names}", f"leave out {names}")
    flags.check_at_least(args, 1, "proof_samples", "topk")


def size(word: str) -> int:
    """``5GB`` -> 5 * 10**9; raises ValueError."""
    number, unit = word[:-2], word[-2:].upper()
    found = float(number) * _DECIMAL[unit] if unit in _DECIMAL else int(word)
    if not 1 <= found < math.inf:
        raise ValueError(word)
    return int(found)
