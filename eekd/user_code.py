"""Runs a user's Python file, in one place: `path/to/file.py:NAME`, their own model, weighting or method."""

import importlib.util
import sys
from pathlib import Path

_folders: set[Path] = set()  # of the files that were run


def is_file_name(name: object) -> bool:
    """Whether `name` has the form path/to/file.py:NAME, where NAME is an identifier."""
    path, _, own = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    return path.endswith(".py") and own.isidentifier()


def own_name(name: str) -> str:
    """NAME of path/to/file.py:NAME, any other name as it is."""
    return name.rpartition(":")[2] if is_file_name(name) else name


def load(name: str, what: str):
    """Runs the file of `path/to/file.py:NAME` and returns its NAME; `what` says in an error what NAME must be.

    The file may import its neighbours. Where two files have neighbours of one name, each gets its own. Raises
    FileNotFoundError for a missing file and AttributeError for a missing name.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path).absolute()
    if not file.is_file():
        raise FileNotFoundError(f"{name!r} names a file that does not exist: {file}")
    _forget_neighbours(file.parent)
    spec = importlib.util.spec_from_file_location(f"eekd_user_{file.stem}", file)
    assert spec is not None  # the file is there
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by name
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # for what its functions import when they are called
    _folders.add(file.parent)
    if not hasattr(module, attribute):
        raise AttributeError(f"{path} must define {attribute!r}, {what}")
    return getattr(module, attribute)


def _forget_neighbours(folder: Path) -> None:
    """Drops modules that came from the folder of another user's file, where `folder` has modules of their names."""
    own = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    for name in list(sys.modules):
        top = name.partition(".")[0]
        first = getattr(sys.modules.get(top), "__file__", None)
        if top in own and first and _home(Path(first)) in _folders - {folder}:
            del sys.modules[name]


def _home(file: Path) -> Path:
    return file.parent.parent if file.name == "__init__.py" else file.parent
