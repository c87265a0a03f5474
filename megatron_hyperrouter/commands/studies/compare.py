"""Train several routers under equal conditions and compare them: same data in the same order, same initial
weights, same number of steps, several seeds.

Each router is trained with each seed in a separate process, and then scored at each k on the test split.  If
HyperRouter is among them, the study adds a control: a random router that is never trained, with logits that
have the same standard deviation as HyperRouter's at the start.  --output gets one folder per run and these
files:
  study.json                 the planned comparisons, fixed before the runs
  runs.csv                   one row per run
  table.csv, table.md        mean over seeds ± half the width of the 95 % t-interval
  differences.csv            each router minus the first one, paired by seed
  verdicts.csv               the planned comparisons: differences, p-values (Holm), power
  bits_per_byte.png, differences.png, learning_curves.png
After an interruption, run the same command again: finished runs are kept, and the others continue from their
last checkpoint (--save-interval).
"""

from __future__ import annotations

import difflib
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.commands.studies.controls import (
    CONTROL,
    comparisons_of,
    control_among,
    control_for,
    write_study,
)
from megatron_hyperrouter.studies.runs import (
    LAYOUT,
    RunProcess,
    StudyRun,
    check_finished,
    digest_of,
    file_values,
    filling,
    is_trained,
    read_record,
    refuse_flags,
    run_all,
    training,
)
from megatron_hyperrouter.terminal import note, parser

if TYPE_CHECKING:
    from megatron_hyperrouter.config.reading.sources import CommandLine
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.studies.verdicts import Named

EPILOG = """\
All other flags are settings of mhr train and apply to every run.  Each run has one process; layout settings
in --config are ignored.  --routers takes names of routers, or labels that the YAML file of --options defines.
The file maps each label to options; the option "name" selects the router:
  hyper: {hypernet_width: 128}
  switch: {name: topk, pre_softmax: true}
A router that is not in the file has the options in --config, or its default options.

Columns of the table, averaged over layers:
  router entropy   in nats, over the last tenth of the training steps
  load max/mean    largest load of an expert divided by the mean, over the same steps
On test data at the final k of training, also averaged over layers:
  logit std        standard deviation of the logits
  MI               mutual information between token and expert, in nats
  similarity       mean linear CKA between the outputs of two experts
  effective rank   effective rank of the router's part of the layer's Jacobian
  drift            how far the row space of the router's matrix has moved since the start of training, from
                   0 (not at all) to 1 (orthogonal to the row space at the start); "-" for a router that is
                   not a linear map
The step time is a median; it is not reliable if --jobs is more than 1.  results.json of each run has the
measures of each layer.  mhr report makes a page of plots from the folder."""


@dataclass(frozen=True)
class Trial(StudyRun):
    """One router with one seed; ``studies.router_scores`` reads its task."""

    label: str
    seed: int

    def stages(self) -> list[RunProcess]:
        """Train, and score what was trained to its end."""
        scoring = RunProcess(
            "scoring", ["-m", "megatron_hyperrouter.studies.router_scores", str(self.folder / "task.json")]
        )
        return [scoring] if is_trained(self) else [training(self), scoring]


def main(arguments: Sequence[str]) -> None:
    """Settings of all runs -> the runs -> table and plots."""
    args, more = read_flags(arguments)
    study = Study.of(args, more)
    plans = list(plans_of(study, args))
    check_finished(plans)
    content = study.content(args)
    with filling(args.output):
        write_study(args.output, content, started=any(plan.finished for plan in plans))
        run_all([plan for plan in plans if not plan.finished], args.jobs)
        from megatron_hyperrouter.studies.router_tables import write_tables

        told = [
            (plan.label, plan.seed, read_record(plan.folder / "results.json", "results")) for plan in plans
        ]
        write_tables(told, args.output, content)


def read_flags(arguments: Sequence[str]) -> tuple[Namespace, CommandLine]:
    """The flags of this command, and those of mhr train."""
    from megatron_hyperrouter.config.reading.sources import read_flags as read_program_flags

    flags = parser(str(__doc__), EPILOG)
    add = flags.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file with the settings that all runs share")
    add(
        "--routers",
        nargs="+",
        required=True,
        metavar="NAME",
        help="routers to compare: names of routers, or labels that are defined in the --options file",
    )
    add(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of seeds; each router is trained once with each of the seeds --seed, --seed + "
        "1, ... (default: 3)",
    )
    add(
        "--topk-eval",
        type=int,
        nargs="+",
        metavar="K",
        help="values of k (active experts per token) at which to score each router (default: the "
        "powers of 2 up to the number of experts, or to the largest k that groups of experts allow)",
    )
    add(
        "--comparisons",
        nargs="+",
        metavar="LEFT:RIGHT@K",
        help="differences to test: loss of router LEFT minus loss of router RIGHT, at k = K. They are "
        "fixed before the first run (default: HyperRouter minus the control router, at the smallest k "
        "of --topk-eval and at the final k of training)",
    )
    add(
        "--effect",
        type=float,
        default=0.02,
        metavar="X",
        help='difference in bits per byte that you want to detect; the column "seeds needed" shows '
        "how many seeds this takes (default: 0.02)",
    )
    add(
        "--no-matched-control",
        action="store_true",
        help="do not add the control router, a random router that is never trained",
    )
    add("--options", metavar="FILE", help="YAML file with the options of each router (see below)")
    add(
        "--test-iters",
        type=int,
        metavar="N",
        help="number of global batches of the test split to score; runs with different seeds score "
        "different batches (default: the whole split)",
    )
    add("--jobs", type=int, default=1, metavar="N", help="number of simultaneous runs (default: 1)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for runs, tables and plots")
    args, rest = flags.parse_known_args(arguments)
    if not args.effect > 0:
        flags.refuse("--effect", args.effect, "must be greater than 0", "use --effect 0.02, for example")
    flags.check_at_least(args, 1, "seeds", "jobs", "test_iters")
    line = read_program_flags(rest)
    for name in (name for name in line.flags if name.startswith("--router.")):
        rule = "applies to one router, but this command trains several"
        flags.refuse(name, "", rule, "write the options of each router to a file, and name it with --options")
    refuse_flags(flags, line)
    if odd := [name for name in args.routers if not re.fullmatch(r"\w[\w.-]*", name)]:
        rule = "must contain only letters, digits, '.', '_' and '-', because folders are named after them"
        flags.refuse("--routers", odd, rule, "use other labels")
    if twice := sorted({name for name in args.routers if args.routers.count(name) > 1}):
        flags.refuse("--routers", args.routers, f"names {twice[0]} twice", f"name {twice[0]} once")
    return args, line


# -------------------------------------------------------------------------------------------- plans
@dataclass(frozen=True)
class Study:
    """What is compared: the settings by label, and the planned comparisons."""

    configs: Mapping[str, RunConfig]
    topks: Sequence[int]
    control: str | None
    comparisons: Sequence[Named]

    @classmethod
    def of(cls, args: Namespace, line: CommandLine) -> Study:
        """From the flags; raises ConfigError."""
        from megatron_hyperrouter.evaluate.perplexity import check_topks

        options = read_options(args.options, args.routers)
        check_routers(args.routers, options)
        configs = {
            label: settings_of(args.config, options.get(label, {}), label, line) for label in args.routers
        }
        if not args.no_matched_control and (control := control_for(configs)) is not None:
            configs[CONTROL] = settings_of(args.config, control, CONTROL, line)
            note(
                f"added {CONTROL}: a random router that is never trained (smoe_dropout), with logit "
                f"standard deviation {control['logit_std']:.3g}"
            )
        most = min(
            config.router.options.largest_topk(config.model.num_experts) for config in configs.values()
        )
        topks = args.topk_eval or [2**power for power in range(most.bit_length())]
        for config in configs.values():
            check_topks(topks, config.model.num_experts, router=config.router, flag="--topk-eval")
        control_label = control_among(configs)
        return cls(configs, topks, control_label, comparisons_of(args, configs, topks, control_label))

    def content(self, args: Namespace) -> dict[str, Any]:
        """The content of ``study.json``."""
        return {
            "labels": list(self.configs),
            "control": self.control,
            "comparisons": [str(each) for each in self.comparisons],
            "effect": args.effect,
            "topks": list(self.topks),
            "jobs": args.jobs,
        }


def plans_of(study: Study, args: Namespace) -> Iterator[Trial]:
    """All runs, seed by seed."""
    from megatron_hyperrouter.config.cli import replace_leaves

    for number in range(args.seeds):
        for label, config in study.configs.items():
            seed = config.train.seed + number
            folder = args.output / "runs" / f"{label}-seed{seed}"
            scored = {"topk": list(study.topks), "test_iters": args.test_iters}
            digest = digest_of(replace_leaves(config, seed=seed), scored)
            task = {
                "run_dir": str(folder),
                "settings": digest,
                "output": str(folder / "results.json"),
                **scored,
            }
            yield Trial(folder, replace_leaves(config, seed=seed, run_dir=str(folder)), task, label, seed)


def check_routers(labels: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """ConfigError for each label that is neither a router nor defined in --options."""
    from megatron_hyperrouter.errors import ConfigError, Problem
    from megatron_hyperrouter.routers import ROUTERS

    unknown = [label for label in labels if label not in ROUTERS and "name" not in options.get(label, {})]
    if unknown:
        choice = f"use {', '.join(sorted(ROUTERS))}, or define the label in --options"
        near = {label: difflib.get_close_matches(label, ROUTERS, n=1, cutoff=0.8) for label in unknown}
        hints = {label: f"did you mean {found[0]}?" if found else choice for label, found in near.items()}
        raise ConfigError(
            [Problem("--routers", label, "is not a router", hint) for label, hint in hints.items()]
        )


def read_options(path: str | None, labels: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """``--options``: label to options; raises ConfigError."""
    from megatron_hyperrouter.config.reading.yaml_text import load_yaml, why_not
    from megatron_hyperrouter.errors import ConfigError, Problem

    if path is None:
        return {}
    try:
        found = load_yaml(path) or {}
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("--options", path, why_not(error), "correct the YAML file")]) from error
    if not isinstance(found, dict) or not all(isinstance(options, dict) for options in found.values()):
        raise ConfigError(
            [
                Problem(
                    "--options",
                    path,
                    "must map labels to options",
                    "write lines such as hyper: {hypernet_width: 128}",
                )
            ]
        )
    if unused := sorted(str(label) for label in set(found) - set(labels)):
        rule = f"has options for {', '.join(unused)}, which --routers does not contain"
        raise ConfigError(
            [
                Problem(
                    "--options",
                    path,
                    rule,
                    ("add these names to --routers, or remove their options from the file"),
                )
            ]
        )
    return found


def settings_of(path: str, options: Mapping[str, Any], label: str, line: CommandLine) -> RunConfig:
    """The settings of ``path`` with another router, in one process, and the flags over them; raises
    ConfigError.
    """
    from megatron_hyperrouter.config.draft import Draft
    from megatron_hyperrouter.config.reading.sources import YamlFile, read_yaml
    from megatron_hyperrouter.routers import ROUTERS

    file = read_yaml(path)
    own = {key: value for key, value in file.values.items() if key.startswith("router.")}
    values = file_values(file, without=[*own, *LAYOUT])
    name = options.get("name", label)
    if not options and own.get("router.name", "hyper") == name:
        options = {key.removeprefix("router."): value for key, value in own.items()}
    values |= {f"router.{key}": value for key, value in {**options, "name": name}.items()}
    changed = YamlFile(f"{path} and --options" if options else path, values, file.problems, file.readable)
    overrides = (
        {} if "keep_checkpoints" in values or "--keep-checkpoints" in line.flags else {"keep_checkpoints": 1}
    )
    return Draft(ROUTERS, changed, flags=line.flags, problems=line.problems, overrides=overrides).finish(
        world_size=1
    )
