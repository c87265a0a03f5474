"""Starts ranks afresh: what stands in for a library must be there before the hosts are imported, so the
zygote cannot serve.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distributed import environment, meeting_store


def run_afresh(worker: Path, task: dict[str, Any], *, ranks: int, folder: Path, timeout: float = 300) -> Any:
    """As ``distributed.run_ranks``, in new interpreters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    store = meeting_store()
    command = [sys.executable, str(worker), str(folder / "task.json"), str(folder / "answer.json")]
    processes = []
    for rank in range(ranks):
        env = environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
        )
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        told = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n---\n".join(text[-3000:] for text in told)
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))
