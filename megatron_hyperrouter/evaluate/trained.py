"""A trained run as a value: its checkpoint, its settings, its tokenizer and its data.

Everything is read from the checkpoint, never from the ``config.yaml`` of the run folder, which belongs to
the last run that started there.  Data are found even if they were moved with the run, or if their path is
relative to the folder in which the run was started.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.errors import CheckpointError, ConfigError, DataError, Problem

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import DataConfig, RunConfig
    from megatron_hyperrouter.data.stream.dataset import Dataset
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.model.classifier import Classifier


def checkpoint_of(load: str | os.PathLike[str]) -> Path:
    """The checkpoint that ``load`` means: a run folder, its ``checkpoints/``, or one checkpoint;
    CheckpointError if there is none.
    """
    from megatron_hyperrouter.checkpoint.folder import find

    folder = find(Path(load))
    if folder is None:
        raise _nothing_in(load)
    return folder


def run_path(text: str) -> Path:
    """The value of ``--load``; CheckpointError at once, before any library is imported, if there can be no
    checkpoint in it.
    """
    path = Path(text)
    if not path.exists():
        raise _nothing_in(path, " (no such folder)")
    signs = ("checkpoints", "manifest.json", "latest", "step_*", "config.json")
    if not any(next(path.glob(name), None) for name in signs):
        raise _nothing_in(path)
    return path


def _nothing_in(load: str | os.PathLike[str], why: str = "") -> CheckpointError:
    remedy = "use the folder of a run that has saved a checkpoint with its settings and tokenizer"
    if (Path(load) / "config.json").is_file():
        remedy = f"import this Hugging Face folder first: mhr import-hf --input {load} --output RUN"
    return CheckpointError(f"--load = {load}: the folder has no finished checkpoint{why}", remedy=remedy)


@dataclass(frozen=True)
class TrainedRun:
    """One checkpoint and everything that is needed to use it.

    ``settings``: those of the run that wrote it, without what only training needs, for the given number of
    ranks; ``manifest``: see ``checkpoint.manifest``.
    """

    checkpoint: Path
    manifest: Mapping[str, Any]
    settings: RunConfig

    @classmethod
    def open(
        cls,
        load: str | os.PathLike[str],
        *,
        world_size: int = 1,
        tokenizer_model: str | None = None,
        overrides: Mapping[str, object] | None = None,
        headed: bool = False,
    ) -> TrainedRun:
        """The run that ``load`` means: a run folder, its ``checkpoints/``, or one checkpoint.

        ``world_size``: ranks that will have the model, in the run's own layout where it fits them, else with
        data-parallel ranks alone.  ``tokenizer_model``: where the tokenizer is now, for a checkpoint that
        knows only its digest.  ``overrides``: other settings, by flat name.  ``headed``: the model may have a
        classification head.  CheckpointError if there is no whole checkpoint.
        """
        from megatron_hyperrouter.checkpoint.folder import check_language_model, read_manifest
        from megatron_hyperrouter.evaluate.saved_settings import settings_of
        from megatron_hyperrouter.evaluate.whereabouts import with_tokenizer

        folder = checkpoint_of(load)
        manifest = read_manifest(folder)
        if not headed:
            check_language_model(folder, manifest)
        settings = settings_of(folder, manifest["files"], world_size, overrides or {})
        return cls(folder, manifest, with_tokenizer(settings, folder, manifest, tokenizer_model))

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self.manifest["step"])

    @property
    def global_batch_size(self) -> int:
        """Samples in one optimizer step of the run."""
        return int(self.manifest["meta"]["order"]["global_batch_size"])

    @property
    def run_dir(self) -> Path:
        """The folder that contains the run now."""
        return self.checkpoint.absolute().parent.parent

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; ConfigError if another one was given in its place."""
        from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of

        tokenizer = tokenizer_of(self.settings.data)
        known = self.manifest["meta"].get("tokenizer", {}).get("sha256")
        if known is not None and tokenizer.sha256() != known:
            model, rule = self.settings.data.tokenizer_model, "is not the tokenizer of the run"
            remedy = "leave out --tokenizer-model, or set it to the tokenizer of the run"
            raise ConfigError([Problem("--tokenizer-model", model, rule, remedy)])
        return tokenizer

    def data(
        self, *, split: str | None = None, data_path: Sequence[str] | None = None, whole: bool = True
    ) -> DataConfig:
        """The run's data where they are now, or those of ``data_path``: all of them, or the ``split`` that is
        named.  The run's own files are divided as in the run, even at another path. ``whole``: leave out the
        weights of a blend, which a whole split does not need.  DataError if the run has no data.
        """
        from megatron_hyperrouter.config.derived import NO_DATA
        from megatron_hyperrouter.evaluate.whereabouts import are_own, data_of, other_data, without_weights

        own, meta = self.settings.data, self.manifest["meta"]
        if data_path is None and own.data_path == (NO_DATA,):
            raise DataError(
                "this run was imported and has no data",
                remedy="give the prefix of token files with --data-path PREFIX",
            )
        if data_path is None:
            data = data_of(own, meta, self.run_dir)
        else:
            data = other_data(own, data_path, divided=bool(split) or are_own(data_path, own, meta))
        return without_weights(data) if whole else data

    def dataset(
        self,
        tokenizer: Tokenizer,
        *,
        split: str | None = None,
        data_path: Sequence[str] | None = None,
        samples: int | None = None,
    ) -> Dataset:
        """A split of the data (the test split by default): its first ``samples``, or all of it; see
        :meth:`data`.
        """
        from megatron_hyperrouter.data.stream.dataset import build_splits

        name = split or "test"
        splits = build_splits(
            self.data(split=split, data_path=data_path, whole=samples is None),
            seq_length=self.settings.model.seq_length,
            seed=self.settings.train.seed,
            vocab_size=tokenizer.vocab_size,
            eod=self.eod(tokenizer),
            tokenizer=tokenizer.identity(),
            train_samples=samples if name == "train" else 0,
            valid_samples=samples if name == "valid" else 0,
            test_samples=samples if name == "test" else 0,
        )
        dataset: Dataset | None = getattr(splits, name)
        if dataset is None:
            raise DataError(
                f"the {name} split has no documents",
                remedy="give other data with --data-path, or choose another split if the command has --split",
            )
        return dataset

    def open_engine(
        self,
        tokenizer: Tokenizer,
        *,
        classifier: Classifier | None = None,
        for_training: bool = False,
    ) -> Engine:
        """The model in its engine, without its weights yet; close it when done.  ``classifier`` takes the
        place of the output matrix; ``for_training``: with an optimizer.
        """
        from megatron_hyperrouter import engines

        return engines.open_engine(
            self.settings,
            vocab_size=tokenizer.vocab_size,
            eod=self.eod(tokenizer),
            for_training=for_training,
            classifier=classifier,
        )

    def load_into(self, engine: Engine) -> None:
        """Compare the checkpoint's files with their checksums, and read the weights (collective)."""
        from megatron_hyperrouter.checkpoint.folder import verify

        verify(self.checkpoint, engine)
        engine.load(self.checkpoint, weights_only=True)

    def eod(self, tokenizer: Tokenizer) -> int | None:
        """The id that ends a document, where the settings need to know it."""
        from megatron_hyperrouter.config.derived import separates_documents

        return tokenizer.eod if separates_documents(self.settings) else None


def add_model_flags(flags: ArgumentParser) -> None:
    """``--load``, ``--topk`` and ``--tokenizer-model`` of every tool that takes a run or an exported
    folder.
    """
    flags.add_argument(
        "--load",
        type=run_path,
        required=True,
        metavar="RUN_OR_FOLDER",
        help="run folder, or exported Hugging Face folder",
    )
    flags.add_argument(
        "--topk",
        type=int,
        nargs="+",
        metavar="K",
        help="values of k (active experts per token) at which to run the model (default: the model's own k)",
    )
    flags.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer file, needed only if the model does not contain the tokenizer",
    )


def add_run_flags(flags: ArgumentParser, *, data: bool = True) -> None:
    """``--load``, ``--tokenizer-model`` and ``--data-path``: what every tool that uses a trained run has."""
    flags.add_argument(
        "--load",
        type=run_path,
        required=True,
        metavar="RUN_DIR",
        help="run folder, its checkpoints/ folder, or one checkpoint folder",
    )
    flags.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer file, needed only if the checkpoint does not contain the tokenizer",
    )
    if data:
        flags.add_argument(
            "--data-path",
            nargs="+",
            metavar="P",
            help="prefixes of the token files to use (default: the run's own token files). If these are "
            "not the run's files, all of their text is used, unless you give --split",
        )
