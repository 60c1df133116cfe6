"""Runs a user's Python file, in one place: `path/to/file.py:NAME`, their own model, weighting or method."""

import ast
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_folders: set[Path] = set()  # of the files that were run
_EEKD = Path(__file__).resolve().parent
_stand_ins: dict[Path, tuple[Path, Path]] = {}  # of files that may be missing: a copy, and where its neighbours are


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
    FileNotFoundError for a missing file, ImportError for one that imports what is not there, AttributeError for a
    missing name, and ValueError, with the line, for one that is not Python or raises anything.
    """
    path, _, attribute = name.rpartition(":")
    file, folder = place_of(path)
    if not file.is_file():
        raise FileNotFoundError(f"{name!r} names a file that does not exist: {file}")
    _forget_neighbours(folder)
    spec = importlib.util.spec_from_file_location(f"eekd_user_{Path(path).stem}", file)
    assert spec is not None  # the file is there
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by name
    sys.path.insert(0, str(folder))
    _folders.update((folder, file.parent))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"{path} cannot be run: {error}") from error
    except SyntaxError as error:
        raise ValueError(f"{path} cannot be run: {error.msg} in {error.filename}, line {error.lineno}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {place_and_cause(error)}") from error
    finally:
        sys.path.remove(str(folder))
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for what its functions import when they are called
    if not hasattr(module, attribute):
        raise AttributeError(f"{path} must define {attribute!r}, {what}")
    return getattr(module, attribute)


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Whatever the code of path/to/file.py:NAME raises becomes a ValueError of one sentence, with file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name!r} fails: {place_and_cause(error)}") from error


def place_and_cause(error: BaseException) -> str:
    """What an error is, after the last three places in the user's files that it came through, the innermost last."""
    lines = str(error).strip().splitlines() or [""]
    cause = ": ".join(filter(None, (type(error).__name__, lines[0][:300])))
    return ": ".join(filter(None, ("; ".join(places(error)[-3:]), cause)))


def places(error: BaseException) -> list[str]:
    """`file.py, line 12, in function` for each place in the user's files that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{f.filename}, line {f.lineno}, in {f.name}" for f in frames if _is_users(Path(f.filename))]


def is_eekds(error: BaseException) -> bool:
    """Whether it is eekd's own code that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(_EEKD)


def _is_users(file: Path) -> bool:
    """Whether a file is the user's own: one that was run, or is below it, and not of an installed package or eekd."""
    inside = next((folder for folder in _folders if file.is_relative_to(folder)), None)
    packaged = inside and "site-packages" in file.relative_to(inside).parts
    return bool(inside) and not packaged and not file.resolve().is_relative_to(_EEKD)


def stand_in(file: str | Path, copy: Path, folder: Path) -> None:
    """Lets `copy`, with its neighbours in `folder`, be run in place of `file` while that is missing."""
    _stand_ins[Path(file).absolute()] = copy.absolute(), folder.absolute()


def place_of(file: str | Path) -> tuple[Path, Path]:
    """The file that is run for `file`, itself or what stands in for it, and the folder of its neighbours."""
    file = Path(file).absolute()
    return (file, file.parent) if file.is_file() else _stand_ins.get(file, (file, file.parent))


def neighbours(file: str | Path) -> dict[str, Path]:
    """The Python files in a file's folder that it imports, and those that they import, by their places in the folder.

    They are found in the text of the files: imports of a name that is computed are not.
    """
    file, folder = place_of(file)
    files: dict[str, Path] = {}
    waiting: list[tuple[Path, tuple[str, ...]]] = [(file, ())]
    while waiting:
        for parts in _imported(*waiting.pop()):
            for path, package in _files_of(parts, folder):
                place = path.relative_to(folder).as_posix()
                if place not in files:
                    files[place] = path
                    waiting.append((path, package))
    return dict(sorted(files.items()))


def _imported(file: Path, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The names that a module of that package imports, wherever in its file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (RecursionError, SyntaxError, ValueError):  # said by Python, if the module is run
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= len(package):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            start += tuple(node.module.split(".")) if node.module else ()
            yield from ((*start, alias.name) for alias in node.names)


def _files_of(parts: tuple[str, ...], folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The files in `folder` that Python runs to import a name, each with the package that it is in."""
    if parts[0] == "eekd":  # of a checkout, not of the user
        return
    for end in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:end])
        if (inside := place / "__init__.py").is_file():
            yield inside, parts[:end]
        elif (module := place.with_name(f"{place.name}.py")).is_file():
            yield module, parts[: end - 1]
            return
        elif not place.is_dir():
            return


def _forget_neighbours(folder: Path) -> None:
    """Drops modules that came from the folder of another user's file, where `folder` has modules of their names."""
    inside = folder.iterdir() if folder.is_dir() else ()
    own = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").is_file()}
    for name in list(sys.modules):
        top = name.partition(".")[0]
        first = getattr(sys.modules.get(top), "__file__", None)
        if top in own and first and _home(Path(first)) in _folders - {folder}:
            del sys.modules[name]


def _home(file: Path) -> Path:
    return file.parent.parent if file.name == "__init__.py" else file.parent
