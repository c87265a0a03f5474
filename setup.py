"""Installs the package and builds its C++ extension; without a compiler the install goes on, with a
warning.
"""

import re
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

HERE = Path(__file__).parent
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


def version() -> str:
    """The one in ``megatron_hyperrouter/__init__.py``."""
    found = re.search(
        r'^__version__ = "(.+)"', (HERE / "megatron_hyperrouter/__init__.py").read_text("utf-8"), re.MULTILINE
    )
    return found[1] if found else "0.0.0"


def long_description() -> str:
    """The README, where there is one."""
    readme = HERE / "README.md"
    return readme.read_text("utf-8") if readme.exists() else ""


setup(
    name="megatron-hyperrouter",
    version=version(),
    description="Mixture-of-experts pretraining with exchangeable routers (HyperRouter and others) on "
    "DeepSpeed and Megatron-Core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_hyperrouter", "megatron_hyperrouter.*"]),
    package_data={"megatron_hyperrouter.data": ["_index.pyi", "csrc/*"]},
    install_requires=[
        "annotated-types>=0.6",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26,<3",
        "pydantic>=2.7,<3",
        "PyYAML>=6",
        "rich>=13",
        "safetensors>=0.4",
        "tokenizers>=0.19",
        "torch>=2.8,<3",
    ],
    extras_require={
        # faster encoding, Parquet, .zst
        "data": ["gigatoken>=0.10,<0.11", "pyarrow>=15", "zstandard>=0.20"],
        "hf": ["transformers>=4.57,<6"],  # the proof of export-hf and import-hf
        "plots": ["matplotlib>=3.7"],  # of the tools that compare runs
        "tensorboard": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.17"],
    },
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
            optional=True,  # lets an in-place build go on without the file
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
