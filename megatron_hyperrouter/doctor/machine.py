"""What one process can find out about its machine and the installed libraries, without the other ranks."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import megatron_hyperrouter
from megatron_hyperrouter.compat import deepspeed, megatron
from megatron_hyperrouter.compat.versions import TESTED, installed

Facts = dict[str, Any]
_LIBRARIES = ("numpy", "safetensors", "pydantic", "tokenizers")
_MATMUL_SECONDS, _MATMUL_TRIES = 0.4, 20  # at least; a busy machine may interrupt some of the tries
_SHM = Path("/dev/shm")


def facts_of_this_process() -> Facts:
    """As JSON takes it."""
    return {
        "host": socket.gethostname(),
        "resolves": _address(),
        "versions": _versions(),
        "extension": _extension(),
        "extras": {name: _extra(name) for name in ("transformer_engine", "apex", "flash_attn")},
        "patches": {"megatron-core": megatron.patches(), "deepspeed": deepspeed.patches()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm": shutil.disk_usage(_SHM).free if _SHM.is_dir() else None,
        "gpu": _gpu(),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gpu_faults": _gpu_faults(),
    }


def matmul_rate() -> float:
    """Floating-point operations per second of this rank's device: the best of many short tries, so that other
    work on the machine does not distort it.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    size, dtype = (8192, torch.bfloat16) if gpu else (384, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        begun = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds()  # the first one warms up
    end, tried = time.perf_counter() + _MATMUL_SECONDS, [seconds()]
    while len(tried) < _MATMUL_TRIES or time.perf_counter() < end:
        tried.append(seconds())
    return 2 * size**3 / min(tried)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    found |= {library: installed(library) or "none" for library in TESTED}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "none"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    found["this program"] = f"{megatron_hyperrouter.__version__}, sources {_sources()}"
    return found


def _sources() -> str:
    """A digest of the program's files: an outdated checkout can have the same version number."""
    folder = Path(megatron_hyperrouter.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _extension() -> str:
    """Empty where the C++ extension works; else why it does not."""
    try:
        importlib.import_module("megatron_hyperrouter.data._index")
    except ImportError as error:
        return str(error)
    return ""


def _extra(module: str) -> str | None:
    """Version of an optional library; None if it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in (module, module.replace("_", "-")):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def _address() -> str:
    """The address of this host's own name, which gloo uses; empty if the name is not known."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            return str(socket.getaddrinfo(socket.gethostname(), None, family)[0][4][0])
    return ""


def _gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        return ""
    torch.cuda.set_device(local)
    return torch.cuda.get_device_name(local)


def _gpu_faults() -> list[str]:
    """What the driver reports of this machine's GPUs: uncorrected memory errors, throttled clocks."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not torch.cuda.is_available():
        return []
    asked = "index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown"
    try:
        told = subprocess.run(
            [tool, f"--query-gpu={asked}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in told.stdout.splitlines():
        index, errors, slowdown = (word.strip() for word in [*line.split(","), "", ""][:3])
        if errors.isdecimal() and int(errors):
            found.append(f"GPU {index} has {errors} uncorrected memory errors")
        if slowdown == "Active":
            found.append(f"GPU {index} is throttled by its hardware (heat or power)")
    return found
