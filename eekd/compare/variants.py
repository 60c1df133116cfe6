"""Variants of a method: NAME@SETTING=VALUE,SETTING=VALUE, the method with other settings of the student."""

import json
import re
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from eekd.io.files import nearest
from eekd.train.checked import wanted_of, word
from eekd.train.config import Student
from eekd.user_code import is_file_name

# What decides the images that a student sees, and the bank holds: eekd.data.loader.SHOWN, which needs torch, and more.
SHARED = "auto_augment", "erasing", "mixup", "cutmix", "repeats"
SIGNS = {"temperature": "τ =", "alpha": "α =", "beta": "β ="}


def parts(name: str) -> tuple[str, dict[str, Any]]:
    """The method and the settings in the name of a variant, {} where it has none.

    ValueError, one sentence, for a setting that students do not have or must share, and for a value of another kind.
    """
    if "@" not in name or is_file_name(name.removesuffix("-online")):
        return name, {}
    base, _, text = name.rpartition("@")
    kinds, settings = get_type_hints(Student), {}
    for part in re.split(r",(?=\w*=)", text):
        setting, equals, value = part.partition("=")
        if not equals or not value or "/" in value:  # a folder is named after it
            raise ValueError(f"settings of a method must be {base}@SETTING=VALUE, without /, got {name!r}")
        if setting not in kinds:
            raise ValueError(f"{setting!r} in {name!r} is no setting of the student{nearest(setting, kinds)}")
        if setting in SHARED:
            raise ValueError(
                f"{setting} must be left to --student.{setting}, for all see the same images, got {name!r}"
            )
        if setting in settings:
            raise ValueError(f"{setting} must be set once, got {name!r}")
        settings[setting] = _read(value, kinds[setting])
        if wanted := wanted_of(settings[setting], kinds[setting]):
            raise ValueError(f"{setting} must be {wanted}, got {value} in {name!r}")
    return base, {field.name: settings[field.name] for field in fields(Student) if field.name in settings}


def written(settings: dict[str, Any]) -> str:
    """The settings as the end of a name, alike for values that are equal; "" for none."""
    return "@" * bool(settings) + ",".join(f"{name}={_word(value)}" for name, value in settings.items())


def titled(settings: dict[str, Any]) -> str:
    """The settings as the end of a title."""
    return "".join(f", {SIGNS.get(name, name)} {_word(value)}" for name, value in settings.items())


def _read(text: str, kind: Any) -> Any:
    """The value of a setting of this kind that a text stands for."""
    kinds = {kind, *get_args(kind)}
    if text == "none" and NoneType in kinds:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    if isinstance(value, list):
        return tuple(value)
    return float(value) if type(value) is int and float in kinds and int not in kinds else value


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return json.dumps(value, separators=(",", ":")) if isinstance(value, tuple) else str(word(value))
