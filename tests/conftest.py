"""Set-up of every test: one thread, fixed seeds, and visible skips."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# before torch or numpy is imported
for name in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile(
    "house", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("few", settings.get_profile("house"), max_examples=10)  # tests/sanitize.sh
# pytest --hypothesis-profile deep
settings.register_profile("deep", settings.get_profile("house"), derandomize=False, max_examples=2000)
settings.load_profile("house")


# A run in the background, or under nohup, inherits signals that are ignored; tests of signals need them.
if threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for _number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(_number) is signal.SIG_IGN:
            signal.signal(_number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Seed the generators that a test might use unawares; torch and numpy only where the test has
    imported them.
    """
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not act as ranks, even if a launcher started pytest."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A process that has the hosts imported, and forks ranks of the program or of a worker
    (``program.launched.Zygote``).
    """
    from program.launched import Zygote

    started = Zygote(tmp_path_factory.mktemp("zygote"))
    yield started
    started.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests without a GPU, and tests on eight ranks unless they are selected, both with a visible
    reason.
    """
    has_gpu = _has_gpu() if any("gpu" in item.keywords for item in items) else False
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "by_hand" in item.keywords and "by_hand" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes many minutes: pytest -m by_hand"))
        if "eight_ranks" in item.keywords and "eight_ranks" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="eight processes on a few cores: pytest -m eight_ranks"))


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
