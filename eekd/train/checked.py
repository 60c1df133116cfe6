"""How a setting is checked: a dataclass whose fields must hold what their annotations say, and the words they may be.

A value that cannot be meant is a ValueError of one sentence: the field, what is wanted and what was got.
"""

import dataclasses
import math
from collections.abc import Iterator
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from eekd.io.files import nearest
from eekd.method import weightings
from eekd.method.rivals import RIVALS
from eekd.user_code import is_file_name, own_name

if TYPE_CHECKING:
    StudentName = str
else:

    class _Text(type):
        def __instancecheck__(cls, value):
            return isinstance(value, str)

    class StudentName(str, metaclass=_Text):
        """The annotation of a student's name: "ce" (no teacher), a weighting, a rival, or path/to/file.py:NAME."""


def student_names() -> tuple[str, ...]:
    """The built-in names of students: "ce" and the registered weightings."""
    return ("ce", *weightings.names())


def title_of(name: str) -> str:
    """What tables and plots call a network: a teacher, or a student by its name; other names as they are."""
    titles = {entry.name: entry.title for entry in weightings.registered()}
    rivals = {name: rival.title for name, rival in RIVALS.items()}
    return {"ce": "CE only", **titles, **rivals}.get(name, own_name(name))


def word(value: str | bool) -> str:
    """A literal as the command line and JSON write it."""
    return str(value).lower() if isinstance(value, bool) else value


def wanted_of(value: Any, kind: Any) -> str | None:
    """What the annotation `kind` wants in place of `value`; None when the value will do."""
    args = get_args(kind)
    if kind is StudentName:
        names = choices(kind)
        good = isinstance(value, str) and (value in names or is_file_name(value))
        return None if good else f"one of {', '.join(names)}, path/to/file.py:NAME"
    if get_origin(kind) is Literal:
        good = any(type(value) is type(arg) and value == arg for arg in args)  # 1 is no true
        return None if good else f"one of {', '.join(map(word, args))}"
    if get_origin(kind) in (UnionType, Union):
        wanted = [wanted_of(value, k) for k in args]
        return None if None in wanted else " or ".join(filter(None, wanted))
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return "a list"
        return next((f"a list of: {w}" for w in (wanted_of(v, args[0]) for v in value) if w), None)
    if kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return None if good else "a finite number"
    if kind is int:
        return None if type(value) is int else "a whole number"
    if kind is str:
        return None if isinstance(value, str) and value else "some text"
    names = {bool: "true or false", type(None): "nothing"}
    return None if isinstance(value, kind) else names.get(kind, f"a {kind.__name__}")


class Checked:
    """Checks the types of a dataclass's fields, then the (field, holds, wanted) rules of `_rules`."""

    _prefix = ""

    def __post_init__(self):
        kinds = get_type_hints(type(self))
        for name in (f.name for f in dataclasses.fields(self)):  # pyright: ignore[reportArgumentType]  # of a subclass
            value = getattr(self, name)
            if wanted := wanted_of(value, kinds[name]):
                words = choices(kinds[name])
                wrong = [v for v in (value if isinstance(value, tuple) else (value,)) if v not in words]
                hint = next(filter(None, (nearest(v, map(word, words)) for v in wrong)), "")
                raise ValueError(f"{self._prefix}{name} must be {wanted}, got {value!r}{hint}")
        for name, holds, wanted in self._rules():
            if not holds:
                raise ValueError(f"{self._prefix}{name} must be {wanted}, got {getattr(self, name)!r}")

    def _rules(self) -> Iterator[tuple[str, Any, str]]:
        yield from ()


def choices(kind: Any) -> tuple:
    """The words that an annotation names anywhere."""
    if kind is StudentName:
        return (*student_names(), *RIVALS)
    args = get_args(kind)
    return args if get_origin(kind) is Literal else tuple(c for a in args for c in choices(a))
