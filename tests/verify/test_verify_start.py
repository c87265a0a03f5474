"""How mhr verify reports ranks that fail, and ranks that do not end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.verify import start

pytestmark = pytest.mark.processes

SLEEPS = "import time; time.sleep(60)"
KILLED = "import os, signal; print('out of memory', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
SECOND = f"import os\nif os.environ['RANK'] == '0': {SLEEPS}\n{KILLED}"


@pytest.mark.parametrize(
    ("program", "timeout", "says"),
    [
        (SLEEPS, 1.0, "a run on 2 ranks did not end within 1 s"),
        (SECOND, 60.0, "a run on 2 ranks failed: rank 1 ended with exit status -9\n.*\nout of memory\n"),
    ],
    ids=["too slow", "killed"],
)
def test_the_rank_that_failed_first_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, timeout: float, says: str
) -> None:
    monkeypatch.setattr(start, "WORKER", ("-c", program))
    ranks = start.Here(tmp_path, timeout=timeout, most_ranks=2)
    with pytest.raises(HyperRouterError, match=says):
        ranks.run([], 2)
    ranks.close()
    assert not list(tmp_path.iterdir())
