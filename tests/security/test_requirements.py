"""What is installed: lower bounds for users, written-down versions in CI."""

import re
import tomllib

from hostile import ROOT
from packaging.requirements import Requirement


def requirements() -> dict[str, list[Requirement]]:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = {
        "build": known["build-system"]["requires"],
        "": known["project"]["dependencies"],
        **known["project"]["optional-dependencies"],
    }
    return {name: [Requirement(text) for text in texts] for name, texts in groups.items()}


def test_dependencies_have_lower_bounds_and_no_others():
    for group in requirements().values():
        for needed in group:
            assert needed.name == "eekd" or [bound.operator for bound in needed.specifier] == [">="], str(needed)


def test_ci_installs_versions_that_are_written_down():
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    names = [pin.name.lower() for pin in pinned]
    assert names == sorted(set(names))
    assert all([bound.operator for bound in pin.specifier] == ["=="] for pin in pinned)
    # CI runs two versions of torch, each with the libraries that it asks for.
    assert not [name for name in names if re.match("(eekd|torch|torchvision)$|triton|nvidia|cuda", name)]
    versions = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pinned}
    for group, needs in requirements().items():
        for needed in needs if group not in ("bench", "wandb", "mlflow") else ():  # which CI does not install
            if needed.name not in ("eekd", "torch", "triton"):
                assert needed.specifier.contains(versions[needed.name.lower()]), str(needed)
    assert "PIP_CONSTRAINT=$PWD/.ci/constraints.txt" in (ROOT / ".ci/run").read_text()
    assert "constraint" not in (ROOT / "Makefile").read_text()
