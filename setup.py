"""Asks CMake to build eekd._C and maps kernels/ to eekd.kernels; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # A second editable install compiles only what has changed.
        build = Path(__file__).resolve().parent / "build" / "editable" if self.editable_mode else Path(self.build_temp)
        build = build.resolve()
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([
            "cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ])  # fmt: skip
        subprocess.check_call(["cmake", "--build", str(build), *(["-v"] if os.environ.get("VERBOSE") else [])])


setup(ext_modules=[Extension("eekd._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
