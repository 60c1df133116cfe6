"""Asks CMake to build eekd._C and maps kernels/ to eekd.kernels; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMPILERS = "c++", "g++", "clang++"


def check_tools() -> None:
    """One sentence before CMake's many, where a tool is missing."""
    if not any(map(shutil.which, [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else COMPILERS)):
        raise SystemExit(
            "error: eekd's kernels need a C++20 compiler: install one (apt-get install g++), or a wheel "
            "of eekd, which needs none"
        )
    if missing := [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]:
        raise SystemExit(
            f"error: eekd's build needs {' and '.join(missing)}: pip install {' '.join(missing)}, or "
            "leave out --no-build-isolation"
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_tools()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # A second editable install compiles only what has changed.
        build = Path(__file__).resolve().parent / "build" / "editable" if self.editable_mode else Path(self.build_temp)
        build = build.resolve()
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(
            [
                "cmake",
                "-S",
                str(Path(__file__).resolve().parent),
                "-B",
                str(build),
                "-G",
                "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            ]
        )
        subprocess.check_call(["cmake", "--build", str(build), *(["-v"] if os.environ.get("VERBOSE") else [])])


setup(ext_modules=[Extension("eekd._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
