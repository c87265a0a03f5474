"""The hosts still print what silence_hosts() silences, and it silences nothing else. If a test fails, review
compat/host_logs.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from one_rank import world

from megatron_hyperrouter.compat import megatron as for_megatron
from megatron_hyperrouter.compat.host_logs import silence_hosts
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.spec import layer_spec, transformer_config


@contextlib.contextmanager
def hearing(*, hushed: bool) -> Iterator[list[warnings.WarningMessage]]:
    """All warnings that get through."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if hushed:
            silence_hosts()
        yield heard


class Slot(MegatronModule):
    """An MLP slot that megatron-core does not know."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__(config)


NEWER = for_megatron.version() >= (0, 19)  # says other things than 0.16.1


def told_by(
    name: str, hushed: bool, folder: Path, caplog: pytest.LogCaptureFixture, do: Callable[[], object]
) -> list[str]:
    """What the host's file ``name`` logs while it does that, and a line that no filter knows."""
    logger = logging.getLogger(f"megatron.core.{name}")
    kept, logger.filters = logger.filters, []
    try:
        with world(folder), hearing(hushed=hushed):
            do()
            logger.warning("something else")
    finally:
        logger.filters = kept
    *told, last = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert last == "something else"
    return told


@pytest.mark.parametrize("hushed", [False, True])
class TestHosts:
    def test_missing_apex_at_import(self, hushed: bool) -> None:
        """Executes one of the files anew, as an import would."""
        path = Path(megatron.core.__file__).with_name("models") / "backends.py"
        spec = importlib.util.spec_from_file_location("megatron.core.models.backends_again", path)
        assert spec is not None and spec.loader is not None
        with hearing(hushed=hushed) as heard:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert [str(one.message) for one in heard] == (
            [] if hushed else ["Apex is not installed. Falling back to Torch Norm"]
        )

    def test_unknown_mlp_type_at_each_layer(
        self, hushed: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        config, spec = transformer_config(RunConfig()), layer_spec(RunConfig(), ModuleSpec(module=Slot))
        told = told_by(
            "transformer.transformer_layer", hushed, tmp_path, caplog,
            lambda: build_module(spec, config=config, layer_number=1),
        )  # fmt: skip
        assert [line[:16] for line in told] == ([] if hushed or NEWER else ["Unknown MLP type"])

    def test_deprecated_model(self, hushed: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
        def build() -> None:
            config = transformer_config(RunConfig())
            spec = layer_spec(RunConfig(), ModuleSpec(module=Slot))
            GPTModel(config, spec, vocab_size=8, max_sequence_length=4)

        told = told_by("models.gpt.gpt_model", hushed, tmp_path, caplog, build)
        assert [line[:22] for line in told] == (["GPTModel IS DEPRECATED"] if NEWER and not hushed else [])

    def test_newer_names_of_collectives(self, hushed: bool, tmp_path: Path) -> None:
        with world(tmp_path), hearing(hushed=hushed) as heard:
            dist.all_gather_into_tensor(torch.zeros(1), torch.zeros(1))
        assert [one.category for one in heard] == ([] if hushed else [FutureWarning])


def test_warnings_of_other_code_get_through() -> None:
    with hearing(hushed=True) as heard:
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.warn("of a user's own code", category, stacklevel=1)
    assert len(heard) == 3
