"""How tyro reads the settings that take one of a few words. Needs tyro."""

from typing import Literal, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from eekd.train.checked import StudentName, choices, word


def any_word() -> ConstructorRegistry:
    """Lets any word through where one of a few is wanted: Config refuses it and names the nearest."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def literal(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if get_origin(info.type) is not Literal and info.type is not StudentName:
            return None
        values = {word(value): value for value in get_args(info.type) if isinstance(value, bool)}
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(map(word, choices(info.type))) + "}",
            instance_from_str=lambda words: values.get(words[0].lower(), words[0]),
            is_instance=lambda value: isinstance(value, str | bool),
            str_from_instance=lambda value: [word(value)],
        )

    return registry
