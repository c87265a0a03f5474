"""The versions of the hosts that this project was tested with, and what to report about others."""

from __future__ import annotations

import importlib
import importlib.util
import re
from importlib import metadata

from megatron_hyperrouter.compat import deepspeed, megatron
from megatron_hyperrouter.console import warn
from megatron_hyperrouter.errors import HostError

# library -> (the module that it installs, the version that all tests run with)
TESTED = {
    "torch": ("torch", "2.13.0"),
    "megatron-core": ("megatron.core", megatron.TESTED),
    "deepspeed": ("deepspeed", deepspeed.TESTED),
}
# library -> newer versions with which tests/newest_hosts.sh passes, on a Python that the first may not have
ALSO_TESTED = {"megatron-core": (megatron.ALSO_TESTED,)}
# The DeepSpeed engine too is built of megatron-core's layers.
NEEDED = {"deepspeed": ("torch", "megatron-core", "deepspeed"), "megatron": ("torch", "megatron-core")}


def check(engine: str) -> None:
    """Name the hosts of ``engine`` that are missing (HostError) or of a version that was not tested (a
    warning).

    Tested is a version and its later patch releases: patches of a host are written against lines of its
    source.
    """
    found = {library: installed(library) for library in NEEDED[engine]}
    install = " ".join(f"{library}=={TESTED[library][1]}" for library in found)
    if missing := [library for library, version in found.items() if version is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise HostError(
            f"--engine {engine} needs {' and '.join(missing)}, which {verb} not installed",
            remedy=f"run bash tools/setup_env.sh, or pip install {install}",
        )
    core = found["megatron-core"] or ""
    if _numbers(core) >= (0, 19) and importlib.util.find_spec("triton") is None:
        raise HostError(
            f"megatron-core {core} needs triton, which is not installed", remedy="run: pip install triton"
        )
    for library, version in found.items():
        if version is not None and (problem := untested(library, version)):
            warn(f"{problem}; if something fails, run: pip install {library}=={TESTED[library][1]}")


def untested(library: str, version: str) -> str | None:
    """What to report about a version that was not tested; None about one that was."""
    known = (TESTED[library][1], *ALSO_TESTED.get(library, ()))
    if any(in_range(version, tested) for tested in known):
        return None
    return f"{library} {version} was not tested (tested: {' and '.join(known)})"


def installed(library: str) -> str | None:
    """The installed version of ``library``; None if there is none.  A checkout on the path, without
    metadata, has the version in its sources.
    """
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        module = TESTED[library][0]
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:  # not even the package around it
        return None
    return str(getattr(importlib.import_module(module), "__version__", "of an unknown version"))


def in_range(version: str, tested: str) -> bool:
    """True for ``tested`` and the releases after it that differ in the third number alone."""
    own, other = _numbers(version), _numbers(tested)
    return own[:2] == other[:2] and own >= other


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else ()
