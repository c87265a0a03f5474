"""Train routers alike and compare them: same data in the same order, same initial experts and trunk, same steps, several seeds.

Each router is trained with each seed in a process of its own, then scored at every k on the test split.  --output gets a folder for
each run, runs.csv (a row for each run), table.csv (mean and half of the 95 % t-interval over seeds), differences.csv (each router less
the first, seed by seed), table.md with both, bits_per_byte.png and learning_curves.png.  The same command again goes on after an
interruption: finished runs are kept, others continue from their last checkpoint (--save-interval says how often there is one).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from _common import parser, run_tool

if TYPE_CHECKING:
    from megatron_hyperrouter.config.sources import CommandLine
    from megatron_hyperrouter.config.tree import RunConfig

TOOLS = Path(__file__).resolve().parent
PROGRAM = TOOLS.parent / "pretrain_gpt_hyperrouter.py"
OURS = ("--run-dir", "--load", "--finetune", "--config")  # flags of the program that this tool sets
OTHER_LAYOUT = ("virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel")
SECONDS_TO_SAVE = 60.0
EPILOG = """Any other flag goes to pretrain_gpt_hyperrouter.py, for all runs.  A run has one process: sizes of the layout in --config are
not taken over.  --routers takes names of routers, or labels that --options explains (YAML: label to options; "name" says which router):
  hyper: {hypernet_width: 128}
  switch: {name: topk, pre_softmax: true}
A router that is not in it has the options that --config gives to it, or its defaults.

Columns: router entropy (nats) and load (largest over mean) are means over layers and the last tenth of the steps; similarity is the
mean linear CKA of two experts' outputs for the same tokens; step time is the median, which --jobs above 1 disturbs."""


@dataclass(frozen=True)
class Plan:
    """One run."""

    label: str
    seed: int
    folder: Path
    config: RunConfig
    task: dict[str, Any]  # for _compare_run.py

    @property
    def results(self) -> Path:
        """There when the run is finished."""
        return self.folder / "results.json"


def main(arguments: Sequence[str]) -> None:
    """Settings of all runs -> the runs -> table and plots."""
    args, more = read_flags(arguments)
    plans = list(plans_of(args, more))
    check_finished(plans)
    run_all([plan for plan in plans if not plan.results.exists()], args.jobs)
    from _compare_tables import write_tables

    write_tables([(plan.label, plan.seed, json.loads(plan.results.read_text(encoding="utf-8"))) for plan in plans], args.output)


def read_flags(arguments: Sequence[str]) -> tuple[Namespace, CommandLine]:
    """The flags of this tool, and those of the program."""
    from megatron_hyperrouter.config.sources import read_flags as read_program_flags

    flags = parser(str(__doc__), EPILOG)
    flags.add_argument("--config", required=True, metavar="FILE", help="settings of every run (YAML)")
    flags.add_argument("--routers", nargs="+", required=True, metavar="NAME", help="routers, or labels of --options")
    flags.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each router, with --seed of the settings, + 1, ... (default: 3)"
    )
    flags.add_argument("--topk-eval", type=int, nargs="+", metavar="K", help="active experts to score with (default: powers of 2)")
    flags.add_argument("--options", metavar="FILE", help="options of each router (YAML), see below")
    flags.add_argument(
        "--test-iters",
        type=int,
        metavar="N",
        help="global batches of the test split to score, of another order for each seed (default: all of it)",
    )
    flags.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    flags.add_argument("--output", type=Path, required=True, metavar="DIR", help="where runs, table and plots go")
    args, rest = flags.parse_known_args(arguments)
    for name in ("seeds", "jobs", "test_iters"):
        value = getattr(args, name)
        if value is not None and value < 1:
            flags.error(f"--{name.replace('_', '-')} must be at least 1")
    line = read_program_flags(rest)
    if taken := [name for name in line.flags if name in OURS or name.startswith("--router.")]:
        flags.error(f"{', '.join(taken)}: set by this tool; options of routers go into --options")
    if odd := [name for name in args.routers if not re.fullmatch(r"\w[\w.-]*", name)]:
        flags.error(f"--routers {' '.join(odd)}: labels name folders, so letters, digits, '.', '_' and '-' alone")
    if twice := {name for name in args.routers if args.routers.count(name) > 1}:
        flags.error(f"--routers names {', '.join(sorted(twice))} twice")
    return args, line


# ------------------------------------------------------------------------------------------------------------------- plans
def plans_of(args: Namespace, line: CommandLine) -> Iterator[Plan]:
    """All runs, seed by seed, with settings that were checked; raises ConfigError."""
    from megatron_hyperrouter.config.cli import dump, replace_leaves
    from megatron_hyperrouter.evaluate.perplexity import check_topks

    options = read_options(args.options, args.routers)
    configs = {label: settings_of(args.config, options.get(label, {}), label, line) for label in args.routers}
    num_experts = next(iter(configs.values())).model.num_experts
    topks = args.topk_eval or [2**power for power in range(num_experts.bit_length()) if 2**power <= num_experts]
    check_topks(topks, num_experts)
    for number in range(args.seeds):
        for label, config in configs.items():
            seed = config.train.seed + number
            folder = args.output / "runs" / f"{label}-seed{seed}"
            scored = {"topk": topks, "test_iters": args.test_iters}
            settings = dump(replace_leaves(config, seed=seed)) + json.dumps(scored)  # wherever the folder is
            digest = hashlib.sha256(settings.encode()).hexdigest()
            task = {"run_dir": str(folder), "settings": digest, "output": str(folder / "results.json"), **scored}
            yield Plan(label, seed, folder, replace_leaves(config, seed=seed, run_dir=str(folder)), task)


def read_options(path: str | None, labels: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """``--options``: label to options; raises ConfigError."""
    import yaml

    from megatron_hyperrouter.errors import ConfigError, Problem

    if path is None:
        return {}
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([Problem("--options", path, f"cannot be read ({error})", "name a YAML file")]) from error
    if not isinstance(found, dict) or not all(isinstance(options, dict) for options in found.values()):
        raise ConfigError([Problem("--options", path, "must map labels to options", "write lines like hyper: {hypernet_width: 128}")])
    if unused := sorted(str(label) for label in set(found) - set(labels)):
        rule = f"has options of {', '.join(unused)}, which --routers does not name"
        raise ConfigError([Problem("--options", path, rule, "name them, or leave their options out")])
    return found


def settings_of(path: str, options: Mapping[str, Any], label: str, line: CommandLine) -> RunConfig:
    """The settings of ``path`` with another router, in one process, and the flags over them; raises ConfigError."""
    from evaluate import LAYOUT

    from megatron_hyperrouter.config.draft import Draft
    from megatron_hyperrouter.config.sources import YamlFile, read_yaml
    from megatron_hyperrouter.routers import ROUTERS

    file = read_yaml(path)
    own = {key: value for key, value in file.values.items() if key.startswith("router.")}
    dropped = {*own, *LAYOUT, *OTHER_LAYOUT, *(flag.removeprefix("--").replace("-", "_") for flag in OURS)}
    values = {key: value for key, value in file.values.items() if key not in dropped}
    name = options.get("name", label)
    if not options and own.get("router.name", "hyper") == name:
        options = {key.removeprefix("router."): value for key, value in own.items()}
    values |= {f"router.{key}": value for key, value in {**options, "name": name}.items()}
    changed = YamlFile(f"{path} and --options" if options else path, values, file.problems, file.readable)
    overrides = {} if "keep_checkpoints" in values or "--keep-checkpoints" in line.flags else {"keep_checkpoints": 1}
    return Draft(ROUTERS, changed, flags=line.flags, problems=line.problems, overrides=overrides).finish(world_size=1)


def check_finished(plans: Sequence[Plan]) -> None:
    """A table must not mix settings; raises ConfigError that names the runs that were made with others."""
    from megatron_hyperrouter.errors import ConfigError, Problem

    problems = []
    for plan in plans:
        started = plan.folder / "task.json"
        if started.exists() and json.loads(started.read_text(encoding="utf-8"))["settings"] != plan.task["settings"]:
            problems.append(Problem("--output", plan.folder, "holds a run with other settings", "give another folder, or remove this one"))
    if problems:
        raise ConfigError(problems)


# -------------------------------------------------------------------------------------------------------------------- runs
@dataclass
class Started:
    """A run in progress: it trains, then it is scored."""

    plan: Plan
    process: subprocess.Popen[bytes]
    log: TextIO
    scoring: bool = False


def run_all(plans: Sequence[Plan], jobs: int) -> None:
    """Train and score, ``jobs`` at a time; the first failure ends them all, and is the error."""
    waiting, running, ended = list(plans), list[Started](), 0
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // jobs, 1))
    env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(0), env))
                print(f"{running[-1].plan.folder.name}: started ({ended} of {len(plans)} runs are finished)", file=sys.stderr, flush=True)
            for run in list(running):
                if run.process.poll() is None:
                    continue
                check_status(run)
                if run.scoring:
                    run.log.close()
                    running.remove(run)
                    ended += 1
                else:
                    run.process, run.scoring = launch(scoring(run.plan), run.log, env), True
            time.sleep(0.1)
    finally:
        stop(running)


def start(plan: Plan, env: Mapping[str, str]) -> Started:
    """Train, from the last checkpoint where there is one; or score what was trained to its end."""
    from evaluate import write

    from megatron_hyperrouter.checkpoint.folder import find, read_manifest
    from megatron_hyperrouter.config.cli import dump

    plan.folder.mkdir(parents=True, exist_ok=True)
    settings = plan.folder / "settings.yaml"
    settings.write_text(dump(plan.config), encoding="utf-8")
    write(plan.folder / "task.json", plan.task)
    log = (plan.folder / "log.txt").open("a", encoding="utf-8")
    newest = find(plan.folder)
    if newest is not None and read_manifest(newest)["step"] >= plan.config.train.train_iters:
        return Started(plan, launch(scoring(plan), log, env), log, scoring=True)
    return Started(plan, launch([str(PROGRAM), "--config", str(settings), "--load", str(plan.folder)], log, env), log)


def scoring(plan: Plan) -> list[str]:
    """The command that makes ``results.json``."""
    return [str(TOOLS / "_compare_run.py"), str(plan.folder / "task.json")]


def launch(command: Sequence[str], log: TextIO, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A Python process of its own group: a Ctrl-C reaches this tool alone, which then lets runs save."""
    return subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def check_status(run: Started) -> None:
    """RuntimeError, with the end of its log, for a run that failed."""
    if run.process.returncode:
        run.log.flush()
        tail = Path(run.log.name).read_text(encoding="utf-8", errors="replace")[-3000:]
        what = "scoring" if run.scoring else "training"
        raise RuntimeError(f"{run.plan.folder}: {what} ended with exit status {run.process.returncode}\n--- end of its log\n{tail}")


def stop(running: Sequence[Started]) -> None:
    """Let runs save a checkpoint and end."""
    for run in running:
        if run.process.poll() is None:
            run.process.terminate()
    end = time.monotonic() + SECONDS_TO_SAVE
    for run in running:
        try:
            run.process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
        run.log.close()


if __name__ == "__main__":
    run_tool(main)
