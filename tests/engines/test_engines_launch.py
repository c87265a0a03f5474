"""Ranks meet before they form a process group, and a rank that is left alone says so."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from distributed import free_port
from torch import distributed as dist

from megatron_hyperrouter.engines import launch
from megatron_hyperrouter.errors import HyperRouterError


def test_nobody_goes_on_before_the_last_one_has_come_in_one_world_after_another():
    store, came, lock = dist.HashStore(), [0, 0, 0], threading.Lock()

    def rank(number: int) -> list[int]:
        seen = []
        for world in range(3):
            time.sleep(0.1 * ((number + world) % 3))  # another one is the last each time
            with lock:
                came[world] += 1
            launch._wait_for_all(store, 3)
            seen.append(came[world])
        return seen

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(rank, range(3))) == [[3, 3, 3]] * 3


def test_a_rank_that_waits_in_vain_says_what_to_look_at(monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE", timedelta(seconds=1))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    with pytest.raises(HyperRouterError, match="after 0:00:01 some of the ranks have not come") as caught:
        launch.join_world("gloo")
    assert "tools/build_index.py" in caught.value.remedy
    assert not dist.is_initialized()


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_a_launcher_has_left_out_is_named(monkeypatch, missing):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"environment variable {missing} expected"):
        launch.join_world("gloo")
