"""One rank of the layout tests on a machine that believes that it has Transformer Engine, and a GPU for
it.  A task with ``apex`` has its extension as well.  A file ``called`` for each case, which is a process,
counts the calls of fused kernels.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from engines import te_fused, te_stand_in

TASK = Path(sys.argv[1])
te_stand_in.install(apex=json.loads(TASK.read_text(encoding="utf-8")).get("apex", False))

from engines import layout_worker  # noqa: E402

from megatron_hyperrouter.compat import transformer_engine  # noqa: E402

if __name__ == "__main__":
    transformer_engine.obstacle = lambda oldest: None
    layout_worker.main()
    if te_fused.CALLED:
        TASK.with_name(f"called.{os.getpid()}").write_text(json.dumps(te_fused.CALLED), encoding="utf-8")
