"""The user's own Python files that a phase runs, kept beside its weights with the neighbours that they import.

    PHASE/
      model.py, model/      the file of the network, and its neighbours by their places beside it
      method.py, method/    the same of the method

The phase's record has for each, in `setup`, what `described` says. Where a file is missing, its copy is run.
"""

import warnings
from pathlib import Path
from reprlib import repr  # a damaged file must not become a page of error

from eekd import user_code
from eekd.io.files import read_checked, sha256_of

SOURCES = {"method": "method.py", "model": "model.py"}


def described(file: Path | None) -> dict:
    """A file of the user's own, as records have it: its path, and the SHA-256 of it and of its neighbours, by place."""
    if file is None:
        return {"file": None, "sha256": None}
    hashes = {place: sha256_of(path) for place, path in user_code.neighbours(file).items()}
    return {"file": str(file), "sha256": sha256_of(user_code.place_of(file)[0]), "neighbours": hashes}


def copies(folder: Path, what: str, file: Path) -> dict[Path, bytes]:
    """Where in the folder of a phase the copies of a file and its neighbours belong, and what they hold."""
    beside = {folder / what / place: path.read_bytes() for place, path in user_code.neighbours(file).items()}
    return {folder / SOURCES[what]: user_code.place_of(file)[0].read_bytes()} | beside


def setup_of(record) -> dict:
    """What a phase was begun with, of its record; {} where that says nothing."""
    setup = record.get("setup") if isinstance(record, dict) else None
    return setup if isinstance(setup, dict) else {}


def check_copies(folder: Path, setup: dict) -> None:
    """ValueError or FileNotFoundError for a copy in the folder of a phase that was damaged or removed."""
    for what in SOURCES:
        for copy, sha256 in _hashes(folder, what, setup).items():
            read_checked(copy, sha256)


def stand_in(folder: Path, setup: dict) -> None:
    """Lets the copies in the folder of a phase stand in for files that are missing, which a warning says.

    FileNotFoundError or ValueError for a copy that is needed and missing or damaged, and for a missing neighbour of a
    file that is there.
    """
    for what in SOURCES:
        hashes = _hashes(folder, what, setup)
        if not hashes:
            continue
        file, copy = Path(setup[what]["file"]), folder / SOURCES[what]
        if not file.is_file():
            for path, sha256 in hashes.items():
                read_checked(path, sha256)
            user_code.stand_in(file, copy, folder / what)
            warnings.warn(f"{file} is missing: its copy {copy} is run in its place", stacklevel=3)
            continue
        for place in setup[what].get("neighbours", {}):
            if not (file.parent / place).is_file():
                raise FileNotFoundError(
                    f"{file.parent / place}, which {file.name} imports, is missing: {folder / what / place} is a copy "
                    "of it"
                )


def check_code(folder: Path, record: dict) -> None:
    """Errors of `stand_in`, and ValueError unless a phase's network is made by the code that made it in training."""
    setup = setup_of(record)
    stand_in(folder, {"model": setup.get("model")})
    for copy, sha256 in _hashes(folder, "model", setup).items():
        file, beside = user_code.place_of(setup["model"]["file"])
        path = file if copy == folder / SOURCES["model"] else beside / copy.relative_to(folder / "model")
        if sha256_of(path) != sha256:
            raise ValueError(
                f"{path} must be what it was when the network in {folder} was trained, got another content: {copy} is "
                "a copy of what it was"
            )


def _hashes(folder: Path, what: str, setup: dict) -> dict[Path, str]:
    """The SHA-256 that the copies of a file and its neighbours have; {} where there is no such file."""
    source = setup.get(what)
    if not isinstance(source, dict) or not source.get("sha256"):
        return {}
    neighbours = source.get("neighbours", {})
    if not isinstance(neighbours, dict) or any(".." in place or place.startswith("/") for place in neighbours):
        raise ValueError(f"{folder} must have a record of neighbours in the folder of {what}, got {repr(neighbours)}")
    beside = {folder / what / place: sha256 for place, sha256 in neighbours.items()}
    return {folder / SOURCES[what]: source["sha256"]} | beside
