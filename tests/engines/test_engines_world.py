"""Ranks meet before they form a process group, and a rank whose partners are missing reports it."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
from distributed import free_port
from torch import distributed as dist

from megatron_hyperrouter.engines import world as launch
from megatron_hyperrouter.errors import HyperRouterError


def test_a_process_group_has_the_patience_of_a_collective_once_it_stands(monkeypatch):
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", str(free_port())),
    ):
        monkeypatch.setenv(name, value)
    launch.join_world("gloo", timeout=timedelta(minutes=7))
    try:
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=7)
    finally:
        dist.destroy_process_group()


def test_a_rank_that_waits_in_vain_says_what_to_look_at(monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE", timedelta(seconds=1.8))
    for name, value in (
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", str(free_port())),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        HyperRouterError, match=r"some ranks have not connected within 0\.0005 hours"
    ) as caught:
        launch.join_world("gloo")
    assert "mhr index" in caught.value.remedy
    assert not dist.is_initialized()


def test_a_port_that_another_run_has_is_named(monkeypatch):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
        ):
            monkeypatch.setenv(name, value)
        with pytest.raises(
            HyperRouterError, match=rf"port {port} \(MASTER_PORT\) is already in use"
        ) as caught:
            launch.join_world("gloo")
    assert "--master-port of torchrun" in caught.value.remedy


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_a_launcher_has_left_out_is_named(monkeypatch, missing):
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", str(free_port())),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"environment variable {missing} expected"):
        launch.join_world("gloo")
