"""`python -m eekd.info`: versions, what was compiled, what the devices offer."""

import argparse
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import eekd
from eekd import command


def commit() -> str | None:
    """The commit of the source checkout eekd runs from, "+" appended where it has changes; None elsewhere.

    The environment variable EEKD_COMMIT names the commit of a copy whose .git was left behind or is of another commit.
    """
    if named := os.environ.get("EEKD_COMMIT"):
        return named
    root = Path(eekd.__file__).resolve().parent.parent

    def git(*args):
        return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict:
    """What a number depends on: commit, versions and devices, as JSON values."""
    import torch  # not before: a call for help needs no torch

    from eekd import _C  # pyright: ignore[reportAttributeAccessIssue]

    return {
        "eekd": eekd.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu(),
        "cpu_capability": _C.cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


PARSER = argparse.ArgumentParser(prog="eekd info", description="Prints versions, what was compiled, and the devices.")


def main(argv: list[str] | None = None) -> int:
    PARSER.parse_args(command.arguments(argv))
    try:
        from eekd import _C  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    facts = environment()
    built = f"CUDA {_C.cuda_version} for {_C.cuda_architectures}" if _C.cuda_version else "none in this build"
    rows = {
        "eekd": f"{facts['eekd']} ({facts['commit'] or 'installed package'})",
        "python": facts["python"],
        "torch": f"{facts['torch']} (kernels built against {_C.torch_version})",
        "triton": facts["triton"] or "not installed",
        "cpu": f"{facts['cpu']}, kernels use {facts['cpu_capability']}, {facts['threads']} threads",
        "cuda kernels": built,
        "gpus": ", ".join(facts["gpus"]) or "none",
    }
    for name, value in rows.items():
        print(f"{name:>13}  {value}")
    return 0


if __name__ == "__main__":
    command.run(main)
