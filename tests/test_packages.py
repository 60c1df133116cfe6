"""The source distribution holds what the build needs, and a build that lacks a tool says so in one sentence."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = (
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "pyproject.toml",
    "setup.py",
    "csrc",
    "eekd",
    "kernels",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What git tracks, and nothing else."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a checkout: what git tracks is not known")
    tree = tmp_path_factory.mktemp("tree")
    for name in found.stdout.split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


def test_the_source_distribution_is_what_git_tracks(tree, tmp_path):
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=tree, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("eekd-*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    wanted = {
        str(path.relative_to(tree))
        for part in BUILD
        for path in ((tree / part).rglob("*") if (tree / part).is_dir() else [tree / part])
        if path.is_file()
    }
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or name.startswith("eekd.egg-info/")}
    assert packed - made == {name for name in wanted if not name.startswith("eekd.egg-info/")}


def test_every_file_of_the_packages_is_installed(tree, tmp_path):
    """Modules and data, of eekd and of eekd.kernels, which lies in kernels/."""
    code = "import sys; sys.argv[1:] = ['-q', 'build_py', '--build-lib', sys.argv[1]]; exec(open('setup.py').read())"
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {code}", tmp_path],
        cwd=tree,
        check=True,
        capture_output=True,
        env=environment,
    )
    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    own = {str(path.relative_to(tree)) for path in (tree / "eekd").rglob("*") if path.is_file()}
    own |= {f"eekd/{path.relative_to(tree)}" for path in (tree / "kernels").rglob("*") if path.is_file()}
    assert installed == own


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("programs", "says"),
    [
        ([], "eekd's kernels need a C++20 compiler: install one (apt-get install g++), or a wheel of eekd"),
        (["g++"], "eekd's build needs cmake and ninja: pip install cmake ninja"),
        (["c++", "cmake"], "eekd's build needs ninja: pip install ninja"),
    ],
)
def test_a_build_without_its_tools_is_one_sentence(tree, tmp_path, programs, says):
    for program in programs:
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "build")]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {says}"), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.bad_input
def test_sources_that_shadow_the_installed_package_are_named_in_one_sentence(tree):
    """Run from the source folder, where there is no compiled library."""
    for words in (["-m", "eekd.info"], ["-m", "eekd", "train", "--dry-run"], ["-c", "import eekd; eekd.ensemble_kd"]):
        done = subprocess.run(
            [sys.executable, "-S", *words],
            cwd=tree,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:])},
        )
        assert done.returncode in (1, 2)
        assert "eekd's compiled kernels could not be loaded" in done.stderr.splitlines()[-1]
        assert "do not run a non-editable install from the source folder" in done.stderr.splitlines()[-1]
        assert words[0] == "-c" or done.stderr.count("\n") == 1, done.stderr
