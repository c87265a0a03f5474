"""The hosts still say what silence_hosts() silences, and it silences that alone.  A failure here means: look
at compat/host_logs.py again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from one_rank import world

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
        logger = logging.getLogger("megatron.core.transformer.transformer_layer")
        kept, logger.filters = logger.filters, []
        try:
            with world(tmp_path), hearing(hushed=hushed):
                config = transformer_config(RunConfig())
                build_module(layer_spec(RunConfig(), ModuleSpec(module=Slot)), config=config, layer_number=1)
                logger.warning("something else")
        finally:
            logger.filters = kept
        told = [record.getMessage() for record in caplog.records if record.name == logger.name]
        assert told[-1] == "something else"
        assert [line.startswith("Unknown MLP type") for line in told[:-1]] == ([] if hushed else [True])

    def test_newer_names_of_collectives(self, hushed: bool, tmp_path: Path) -> None:
        with world(tmp_path), hearing(hushed=hushed) as heard:
            dist.all_gather_into_tensor(torch.zeros(1), torch.zeros(1))
        assert [one.category for one in heard] == ([] if hushed else [FutureWarning])


def test_warnings_of_other_code_get_through() -> None:
    with hearing(hushed=True) as heard:
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.warn("of a user's own code", category, stacklevel=1)
    assert len(heard) == 3
