"""The house: one op is one row, imports point one way, importing does nothing, public names are documented."""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eekd
from eekd.kernels import bench
from eekd.ops import reference

ROOT = Path(__file__).resolve().parent.parent
BESIDE_OPS = {"__init__", "backend", "checks", "fused", "reference"}
OPS = sorted({path.stem for path in (ROOT / "eekd" / "ops").glob("*.py")} - BESIDE_OPS)
COMPOSED = {"linear_ensemble_kd"}  # of matrix products and another op's kernel
SOURCES = {
    ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, root in (("eekd", ROOT / "eekd"), ("eekd.kernels", ROOT / "kernels"))
    for path in sorted(root.rglob("*.py"))
    if not path.is_relative_to(ROOT / "eekd" / "kernels")
}

# A part of eekd may import what stands in a layer above its own here. A new part takes its place.
# A command line (NAME.__main__) stands above all of them, and nothing but `eekd` itself imports one.
LAYERS = [
    {"_C", "io", "kernels", "lazy", "statistics", "user_code"},
    {"command"},
    {"info", "kept_code", "models", "ops", "parallel"},
    {"data", "method", "snapshots"},
    {"bank", "distilled", "hf"},
    {"train"},
    {"compare", "export", "report"},
    {"evaluate", "predict"},
]
COMMANDS = {"__main__", "completion"}  # of eekd itself
LEAVES = ("eekd.kernels.bench", "eekd.kernels.contenders", "eekd.kernels.tune")  # of the kernels, what knows eekd


def imports(module: str) -> set[str]:
    """The modules, and the names in them, that a module imports, wherever in its file."""
    path, found = SOURCES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("op", OPS)
def test_one_op_is_one_row(op, capsys):
    assert op in eekd.__all__
    public, formula = (inspect.signature(getattr(module, op)).parameters for module in (eekd, reference))
    assert [(p.name, p.kind, p.default) for p in public.values()] == [
        (p.name, p.kind, p.default) for p in formula.values()
    ]
    assert hasattr(torch.ops.eekd, f"{op}_fwd")
    if op in COMPOSED:
        assert (ROOT / f"tests/ops/test_{op}.py").is_file()
        return
    assert f"{op}_fwd" in (ROOT / "csrc" / "eekd.h").read_text()
    for part, path in {
        "kernels": f"kernels/{op}.py",
        "csrc/cpu": f"csrc/cpu/{op}.cpp",
        "csrc/cuda": f"csrc/cuda/{op}.cu",
        "tests/ops": f"tests/ops/test_{op}.py",
    }.items():
        others = [p for p in (ROOT / part).glob("*" + Path(path).suffix) if p.stem not in ("__init__", "bench", "tune")]
        assert (ROOT / path).is_file() or not others, f"{op} lacks {path}"
    with pytest.raises(SystemExit):
        bench.main(["no such op"])
    assert op in capsys.readouterr().err


@pytest.mark.parametrize(
    "folder, beside",
    [
        ("csrc/cpu", {"dispatch"}),
        ("csrc/cuda", {"scale"}),
        (
            "kernels",
            {"__init__", "bench", "columns", "contenders", "launch", "options", "outputs", "rows", "timing", "tune"},
        ),
    ],
)
def test_every_kernel_belongs_to_an_op(folder, beside):
    kernels = {path.stem for path in (ROOT / folder).glob("*") if path.suffix in (".cpp", ".cu", ".py")}
    assert kernels - beside <= set(OPS)


def layer(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    used = {name for name in imports(module) if name.startswith("eekd.")}
    parts = {name.split(".")[1] for name in used}
    part = module.split(".")[1] if "." in module else None
    if part in COMMANDS:
        return
    assert not any("__main__" in name.split(".") for name in used), f"{module} imports a command line"
    if part is None:
        assert "kernels" not in parts  # Triton takes seconds
    elif part == "kernels":
        assert module in LEAVES or ("eekd" not in imports(module) and parts <= {"kernels"})
    elif not module.endswith(".__main__"):
        upwards = {other for other in parts - {part} if other != "__version__" and layer(other) >= layer(part)}
        assert not upwards, f"{module} imports {upwards}"


def test_native_kernels_know_neither_torch_nor_python():
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.name != "bindings.cpp":
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)", path.read_text()), path


def test_triton_stays_in_kernels():
    for module in SOURCES:
        if not module.startswith("eekd.kernels"):
            assert not any(name.split(".")[0] == "triton" for name in imports(module)), module


IMPORT = """
import json, os, subprocess, sys, torch
before, environment = set(sys.modules), dict(os.environ)
def refuse(*args, **kwargs): raise AssertionError("eekd does work when it is imported")
subprocess.Popen.__init__ = torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
torch.compile = torch.library.custom_op = refuse
import eekd
assert set(sys.modules) - before == {"eekd", "eekd.lazy"}
eekd.ensemble_kd
assert dict(os.environ) == environment and not torch.cuda.is_initialized()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_does_no_work():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout)
    assert "eekd._C" in loaded
    heavy = ("triton", "torch._dynamo", "torch._inductor", "torchvision", "timm", "datasets", "sklearn", "eekd.kernels")
    assert not [name for name in loaded if name.startswith(heavy)]


def test_modules_are_documented():
    assert not [module for module, path in SOURCES.items() if not ast.get_docstring(ast.parse(path.read_text()))]


def test_public_names_are_documented():
    missing = []
    for module in ("eekd", "eekd.data", "eekd.models", "eekd.ops", "eekd.train"):
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", ()):
            value = getattr(loaded, name)
            if callable(value) and not inspect.getdoc(value):
                missing.append(f"{module}.{name}")
    for name in eekd.__all__:
        for method, function in vars(getattr(eekd, name)).items():
            documented = inspect.getdoc(getattr(getattr(eekd, name), method))  # there, or where it is inherited from
            if inspect.isfunction(function) and method[0] != "_" and not documented:
                missing.append(f"eekd.{name}.{method}")
    assert not missing


def test_the_op_says_what_it_computes_takes_and_raises():
    for op in OPS:
        doc = inspect.getdoc(getattr(eekd, op))
        for part in ("Args:", "Returns:", "Raises:", "Source:", "arXiv"):
            assert part in doc
        for name in inspect.signature(getattr(eekd, op)).parameters:
            assert re.search(rf"\b{name}\b.*:", doc.split("Args:")[1]), f"{op} does not document {name}"


def test_public_names_exist_and_are_sorted():
    assert eekd.__all__ == sorted(eekd.__all__)
    assert all(hasattr(eekd, name) for name in eekd.__all__)


PYTHON = [path for part in ("eekd", "kernels", "results", "tools", "examples") for path in (ROOT / part).rglob("*.py")]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_over_350_lines_says_why(path):
    text = path.read_text()
    assert text.count("\n") <= 350 or "Over 350 lines" in (ast.get_docstring(ast.parse(text)) or "")
