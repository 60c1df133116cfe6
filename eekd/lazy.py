"""Packages whose public names are imported when they are first used: a command line needs none of them."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping


def attach(package: str, names: Mapping[str, str], modules: Iterable[str] | None = None) -> tuple[Callable, Callable]:
    """The `__getattr__` and `__dir__` (PEP 562) of a package.

    `names` maps each module of the package to its public names, with spaces between them; `modules` (None: all) are
    those that are attributes of the package without having been imported.
    """
    loaded, home = sys.modules[package], {name: module for module, public in names.items() for name in public.split()}
    if modules is None:
        modules = [module.name for module in pkgutil.iter_modules(loaded.__path__) if module.name != "__main__"]

    def __getattr__(name: str):
        if name in home:
            value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(loaded, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(loaded), *home, *modules})

    return __getattr__, __dir__
