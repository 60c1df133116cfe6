"""Packages whose public names are imported when they are first used: a command line needs none of them."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable


def attach(package: str, names: dict[str, str], modules: Iterable[str] | None = None) -> tuple[Callable, Callable]:
    """The `__getattr__` and `__dir__` (PEP 562) of a package.

    `names` maps each public name to the module of the package that has it; `modules` (None: all) are those that are
    attributes of the package without having been imported.
    """
    found = sys.modules[package]
    if modules is None:
        modules = [module.name for module in pkgutil.iter_modules(found.__path__) if module.name != "__main__"]

    def __getattr__(name: str):
        if name in names:
            value = getattr(importlib.import_module(f"{package}.{names[name]}"), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(found, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(found), *names, *modules})

    return __getattr__, __dir__
