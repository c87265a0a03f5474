"""What the routers import: the compiler takes a second, which every command would pay."""

from __future__ import annotations

import subprocess
import sys


def test_routers_do_not_import_the_compiler() -> None:
    program = (
        "import sys\n"
        "from megatron_hyperrouter import ROUTERS, build_router\n"
        "for name in ROUTERS: build_router(name, hidden_size=8, num_experts=4, topk=2)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
