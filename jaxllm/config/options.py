"""What the schema says about each option, read from the dataclasses: dotted name, type, default, bounds, help."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from jaxllm.config.schema import RunConfig

MISSING = dataclasses.MISSING

_TYPE_NAMES = {str: "text", bool: "true | false", types.NoneType: "null", int: "int", float: "float"}
_BOUND_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option or section of the schema.

    Attributes:
      name: dotted; `*` stands for an index into a list of sections, as in "data.train.*.path".
      type: the resolved annotation.
      default: MISSING where the option is required, or is a section that is always there.
      bounds: ge, gt, le, lt of the number or of each number in the list.
    """

    name: str
    type: Any
    default: Any
    help: str
    bounds: Mapping[str, float]

    @property
    def is_section(self) -> bool:
        """Whether other options stand below this one."""
        return any(dataclasses.is_dataclass(kind) for _, kind in nested_kinds(self.type))


def section_options(config_class: type, prefix: str = "") -> list[Option]:
    """List the options that stand directly in one section."""
    kinds = typing.get_type_hints(config_class)
    return [_option(field, kinds[field.name], prefix) for field in dataclasses.fields(config_class)]


def _option(field: dataclasses.Field, kind: Any, prefix: str) -> Option:
    default = field.default
    if field.default_factory is not MISSING and not dataclasses.is_dataclass(field.default_factory):
        default = field.default_factory()
    return Option(prefix + field.name, kind, default, field.metadata["help"], field.metadata["bounds"])


@functools.cache
def all_options() -> Mapping[str, Option]:
    """Map the dotted name of every option and section of a run to its description, in the order of the schema."""
    return {option.name: option for option in _walk(RunConfig, "")}


def _walk(config_class: type, prefix: str) -> Iterator[Option]:
    for option in section_options(config_class, prefix):
        yield option
        for suffix, kind in nested_kinds(option.type):
            if dataclasses.is_dataclass(kind):
                yield from _walk(kind, f"{option.name}{suffix}.")


def nested_kinds(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield each alternative of a type with the suffix of its dotted name: "" or, for entries of a list, ".*"."""
    for member in alternatives(kind):
        if typing.get_origin(member) is list:
            yield from ((".*", entry) for entry in alternatives(typing.get_args(member)[0]))
        else:
            yield "", member


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def type_name(kind: Any) -> str:
    """Spell a type as config errors and help show it."""
    if typing.get_origin(kind) is Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        entry = type_name(typing.get_args(kind)[0])
        return f"list of ({entry})" if "|" in entry else f"list of {entry}"
    if dataclasses.is_dataclass(kind):
        return "mapping"
    if kind in _TYPE_NAMES:
        return _TYPE_NAMES[kind]
    return " | ".join(type_name(member) for member in alternatives(kind))


def bounds_name(bounds: Mapping[str, float]) -> str:
    """Spell bounds as in ">= 0 and < 1"."""
    return " and ".join(f"{_BOUND_SIGNS[sign]} {bound}" for sign, bound in bounds.items())


def pattern(name: str) -> str:
    """Turn the dotted name of a value into that of its option: "data.train.0.path" into "data.train.*.path"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Map dotted names to the plain values of a config or a part of it; list entries that are sections get an index."""
    if dataclasses.is_dataclass(value):
        children = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
        children = {str(index): entry for index, entry in enumerate(value)}
    else:
        return {name: value}
    prefix = f"{name}." if name else ""
    return {leaf: v for key, child in children.items() for leaf, v in flatten(child, prefix + key).items()}
