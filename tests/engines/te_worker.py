"""One rank of the layout tests on a machine that believes that it has Transformer Engine, and a GPU for
it.
"""

from __future__ import annotations

from engines import te_stand_in

te_stand_in.install()

from engines import layout_worker  # noqa: E402

from megatron_hyperrouter.compat import transformer_engine  # noqa: E402

if __name__ == "__main__":
    transformer_engine.obstacle = lambda oldest: None
    layout_worker.main()
