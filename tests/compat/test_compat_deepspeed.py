"""The patch of DeepSpeed is still needed and does what it says. If a test fails, review
compat/deepspeed.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import deepspeed
import pytest
import torch
from one_rank import world

from megatron_hyperrouter.compat.deepspeed import TESTED, skip_shm_build

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patch acts on CPU alone")


@pytest.fixture
def host() -> ModuleType:
    """A fresh copy of the host's file: in this process it may have been patched already."""
    real = importlib.import_module("deepspeed.comm.torch")
    spec = importlib.util.spec_from_file_location("deepspeed.comm.torch_again", str(real.__file__))
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_version_is_the_tested_one() -> None:
    assert deepspeed.__version__ == TESTED


class TestShmBuild:
    def test_the_host_still_compiles_on_cpu(self, host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        builder = host.get_accelerator().create_op_builder("ShareMemCommBuilder")
        assert builder is not None
        loads: list[str] = []
        stand_in = SimpleNamespace(
            NAME=builder.NAME, load=lambda: loads.append("compiled"), absolute_name=builder.absolute_name
        )
        monkeypatch.setattr(
            host, "get_accelerator", lambda: SimpleNamespace(create_op_builder=lambda name: stand_in)
        )
        # as where there is a compiler
        monkeypatch.setitem(deepspeed.ops.__compatible_ops__, builder.NAME, True)
        host.build_shm_op()
        assert loads == ["compiled"]

    def test_the_host_still_asks_for_it_at_its_start(
        self, host: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        calls: list[str] = []
        monkeypatch.setattr(host, "build_shm_op", lambda: calls.append("asked"))
        with world(tmp_path):
            host.TorchBackend("gloo", timedelta(seconds=5), None)
        assert calls == ["asked"]

    def test_is_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = importlib.import_module("deepspeed.comm.torch")
        monkeypatch.setattr(real, "build_shm_op", lambda: pytest.fail("compiled"))
        skip_shm_build()
        assert real.build_shm_op() is None

    def test_acts_on_cpu_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = importlib.import_module("deepspeed.comm.torch")
        marker = object()
        monkeypatch.setattr(real, "build_shm_op", marker)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        skip_shm_build()
        assert real.build_shm_op is marker
