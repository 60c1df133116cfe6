"""There is no way from data to code but the factories that a setting names: the source is searched."""

import ast
import re

import pytest
from hostile import ROOT

PARTS = "eekd", "kernels", "results"
SOURCES = [ROOT / "setup.py", *(path for part in PARTS for path in sorted((ROOT / part).rglob("*.py")))]
MODULES = {
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "runpy",
    "code",
    "codeop",
    "imp",
    "ctypes",
    "urllib",
    "requests",
    "ftplib",
    "xmlrpc",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.jit.load",
    "torch.hub.load",
    "torch.export.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "numpy.lib.format.read_array",
}
METHODS = {
    "exec_module",
    "load_module",
    "import_module",
    "spec_from_file_location",
    "SourceFileLoader",
    "extractall",
    "unpack_archive",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
# Where a setting names a Python file; and the archive's own unpickler, which finds nothing to call.
ALLOWED = {
    "eekd/user_code.py": {"exec_module", "spec_from_file_location"},
    "eekd/data/formats.py": {"pickle"},
    "eekd/__main__.py": {"import_module"},  # of its own verbs
    "eekd/lazy.py": {"import_module"},  # of its own names
    "eekd/train/logs.py": {"import_module"},  # of the services it knows
    "kernels/bench.py": {"os.execve"},  # of Python with the same command line
}


def ways_to_code(source: str) -> set[str]:
    """What in a source could turn data into code, or let a shell do it."""
    tree, found, names = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        found |= {module.split(".")[0] for module in modules} & MODULES

    def dotted(node) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found |= {names.get(node.id, "").split(".")[-1]} & METHODS
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        literal = {key: getattr(value, "value", "?") for key, value in given.items()}
        first = node.args[0] if node.args else None
        if name in CALLS or re.match(r"os\.(exec|spawn|posix_spawn)|(_?pickle)\.(load|Unpickler)", name):
            found.add(name)
        if name in ("torch.load", "torch.serialization.load") and literal.get("weights_only") is not True:
            found.add(name)
        if name == "numpy.load" and literal.get("allow_pickle", False) is not False:
            found.add(name)
        if name.startswith("subprocess.") and (
            literal.get("shell", False) is not False
            or not (isinstance(first, ast.List) or name.endswith("output") and isinstance(first, ast.Constant))
        ):  # a list is no shell's business, and a constant no file's
            found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_turns_data_into_code(path):
    assert ways_to_code(path.read_text()) == ALLOWED.get(str(path.relative_to(ROOT)), set())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", {"pickle"}),
        ("from cloudpickle import loads", {"cloudpickle"}),
        ("import pickle as p\np.loads(x)", {"pickle", "pickle.loads"}),
        ("import marshal, yaml", {"marshal", "yaml"}),
        ("eval(x)", {"eval"}),
        ("def f():\n    exec(x)", {"exec"}),
        ("__import__(x)", {"__import__"}),
        ("import torch\ntorch.load(x)", {"torch.load"}),
        ("import torch as t\nt.load(x, weights_only=False)", {"torch.load"}),
        ("from torch import load\nload(x, weights_only=w)", {"torch.load"}),
        ("import torch\ntorch.load(x, weights_only=True)", set()),
        ("import torch\ntorch.compile(x)\nmodel.eval()", set()),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", {"numpy.load"}),
        ("import numpy as np\nnp.load(x, allow_pickle=False)", set()),
        ("import subprocess\nsubprocess.run('ls ' + x, shell=True)", {"subprocess.run"}),
        ("import subprocess\nsubprocess.run(['ls', x], shell=True)", {"subprocess.run"}),
        ("import subprocess\nsubprocess.getoutput(f'ls {x}')", {"subprocess.getoutput"}),
        ("from subprocess import Popen\nPopen(x)", {"subprocess.Popen"}),
        ("import subprocess\nsubprocess.run(['ls', x])", set()),
        ("import os\nos.system(x)\nos.execv(x, y)", {"os.system", "os.execv"}),
        ("from torch import distributed\ndistributed.all_gather_object(x, y)", {"all_gather_object"}),
        ("from torch.distributed import broadcast_object_list\nbroadcast_object_list(x)", {"broadcast_object_list"}),
        ("import importlib\nimportlib.import_module(x)", {"import_module"}),
        ("tar.extractall(x)", {"extractall"}),
    ],
)
def test_the_search_finds_what_it_is_for(source, found):
    assert ways_to_code(source) == found
