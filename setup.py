"""Installs the package and builds its C++ extension; without a compiler the install goes on, with a
warning.
"""

import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = Path("megatron_hyperrouter/data/csrc")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add would round otherwise than the NumPy twin
    "-Wall",
    "-Wextra",
]


class OptionalBuildExt(build_ext):
    """Builds the extension where it can; the NumPy twin gives the same numbers where it cannot."""

    def build_extension(self, ext: Extension) -> None:
        """Compile ``ext``, or say what is missing."""
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, ImportError, OSError) as error:
            warnings.warn(
                f"{ext.name} was not built, so data indices will come from NumPy: slower, same numbers. "
                "Install a C++17 compiler, "
                f"the Python headers and pybind11, then install again. Reason: {error}",
                stacklevel=1,
            )


setup(
    ext_modules=[
        Extension(
            "megatron_hyperrouter.data._index",
            [str(SOURCES / "bindings.cpp")],
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            language="c++",
            extra_compile_args=[
                *FLAGS,
                *(["-mmacosx-version-min=10.14"] if sys.platform == "darwin" else []),
            ],
            optional=True,  # an in-place build continues without the file
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
