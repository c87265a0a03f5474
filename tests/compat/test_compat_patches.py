"""Each patch that acts on this machine is still needed: without it, and with all others, a call of the host
fails.  If a test fails, remove the patch.  Each patch that is left out, for a newer host, is needless.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from program.launched import Zygote

from megatron_hyperrouter.compat import deepspeed as for_deepspeed
from megatron_hyperrouter.compat import megatron as for_megatron

WORKER = Path(__file__).with_name("patch_worker.py")
# What the host says without the patch.
NEEDED = {
    "name_te_general_gemm": (1, "NameError: name 'te_general_gemm'"),
    "count_predictions_of_logits": (1, "TypeError: argmax"),
    "keep_adam_step": (1, "KeyError: 'step'"),
    "keep_norms_on_device": (1, "meta"),
    "scale_all_at_once": (1, "40 operators"),
    "turn_in_few_operators": (1, "AssertionError: [0-9]+ operators"),
    "serve_cuda_calls": (1, "not compiled with CUDA|NVIDIA|CUDA"),
    "serve_cuda_devices": (1, "not compiled with CUDA|NVIDIA|CUDA|AssertionError"),
    "serve_random_state": (1, "not compiled with CUDA|NVIDIA|default stream went on|not that of its seed"),
    "serve_splits": (2, "TypeError|RuntimeError"),
    "serve_unequal_shards": (2, "RuntimeError|ValueError"),
    "run_helpers_eagerly": (1, "RuntimeError.*fail_on_recompile"),
    "skip_shm_build": (1, "DeepSpeed compiles"),
    "shape_gathered_tokens": (2, "RuntimeError|ValueError"),
}
# needed on any machine, where Transformer Engine and apex are missing
WITHOUT_TE = (
    "name_te_general_gemm",
    "keep_adam_step",
    "keep_norms_on_device",
    "scale_all_at_once",
)
ANYWHERE = ("count_predictions_of_logits", "turn_in_few_operators")


@pytest.mark.processes
@pytest.mark.parametrize("patch", NEEDED)
def test_patch_is_needed_and_enough(zygote: Zygote, tmp_path: Path, patch: str) -> None:
    if patch in WITHOUT_TE and any(map(importlib.util.find_spec, ("transformer_engine", "apex"))):
        pytest.skip("a patch for machines without Transformer Engine and apex")
    if patch not in (*WITHOUT_TE, *ANYWHERE) and torch.cuda.is_available():
        pytest.skip("a patch for machines without a GPU")
    ranks, words = NEEDED[patch]
    zygote.run([tmp_path, patch], program=WORKER, ranks=ranks)
    for rank in range(ranks):
        without, with_it = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        if patch not in {*for_megatron.patches(), *for_deepspeed.patches()}:
            assert without is None, f"the host needs {patch}, which is left out: {without}"
            continue
        assert without is not None, f"the host no longer needs {patch}"
        assert re.search(words, without, re.DOTALL), without
        assert with_it is None, with_it


def test_every_patch_is_tried() -> None:
    from compat.patch_worker import PATCHES

    assert set(PATCHES) == set(NEEDED)


@pytest.mark.parametrize("patch", NEEDED)
def test_patch_names_version_file_and_line(patch: str) -> None:
    """The named line exists; a new version of the host may move it, and then the patch needs a review."""
    from compat.patch_worker import DEEPSPEED, PATCHES

    module = importlib.import_module(PATCHES[patch].__module__)
    text = PATCHES[patch].__doc__ or ""
    assert module.TESTED in f"{module.__doc__} {text}"
    cited = re.findall(r"([\w/]+\.py):(\d+)", text)
    assert cited, "no file and line of the host"
    host = importlib.util.find_spec("deepspeed" if patch in DEEPSPEED else "megatron.core")
    assert host is not None and host.submodule_search_locations
    root = Path(host.submodule_search_locations[0])
    for file, line in cited:
        found = [path for path in root.rglob(Path(file).name) if path.as_posix().endswith(f"/{file}")]
        assert any(len(path.read_text(encoding="utf-8").splitlines()) >= int(line) for path in found), (
            f"{file}:{line}"
        )
