"""Strict reading of run configurations: every problem of every file and override is told at once, with its place."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxllm.config.nodes import Node, Where, apply_overrides, describe, merge, read_file
from jaxllm.config.options import MISSING, Option, all_options, alternatives, flatten, section_options, type_name
from jaxllm.config.rules import violations
from jaxllm.config.schema import RunConfig
from jaxllm.errors import InputError

_BAD = object()
"""Stands for a value that has been reported."""


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration from YAML files and overrides.

    Args:
      paths: YAML files; later ones win key by key (mappings merge, lists are replaced).
      overrides: `a.b=value`, `--a.b=value` or `--a.b`, `value`; values are YAML, and an entry of a list is named by
        its index, as in `data.train.0.path=corpus.txt`.

    Raises:
      InputError: one line "file:line: problem" or "command line: problem" for each problem found.
    """
    reader = _Reader()
    read = [read_file(path, source, reader.report) for source, path in enumerate(paths)]
    end = len(paths)
    root = Node({}, Where(end, 0, ", ".join(map(str, paths)) or "command line"))
    for node in filter(None, read):
        root = merge(root, node)
    root = apply_overrides(root, list(overrides), Where(end, 0, "command line"), reader.report)
    config = reader.section(RunConfig, root, "", complete=None not in read)
    if None not in read:
        reader.check_rules(root.where)
    if reader.problems:
        raise InputError("\n".join(f"{where}: {message}" for where, message in sorted(reader.problems)))
    return config


class _Reader:
    """Turns nodes into config dataclasses and goes on after a problem.

    Attributes:
      problems: (place, message) found so far.
      values: options read or defaulted so far, by dotted name.
      places: where each dotted name was given.
    """

    def __init__(self) -> None:
        self.problems: list[tuple[Where, str]] = []
        self.values: dict[str, Any] = {}
        self.places: dict[str, Where] = {}

    def report(self, where: Where, message: str) -> None:
        self.problems.append((where, message))

    def check_rules(self, default: Where) -> None:
        """Report broken rules at the first of their options that was given."""
        for violation in violations(self.values):
            where = next((self.places[name] for name in violation.options if name in self.places), default)
            self.report(where, str(violation))

    def section(self, config_class: type, node: Node, prefix: str, complete: bool) -> Any:
        """Read a mapping; options it lacks are reported if the whole input is there (`complete`)."""
        options = section_options(config_class, prefix)
        keys = {option.name.removeprefix(prefix): option for option in options}
        for key, child in node.value.items():
            if key not in keys:
                self.report(child.where, _unknown_key(prefix, key, list(keys)))
        fields = {key: self.option(option, node.value.get(key), node.where, complete) for key, option in keys.items()}
        return _BAD if any(value is _BAD for value in fields.values()) else config_class(**fields)

    def option(self, option: Option, node: Node | None, section_place: Where, complete: bool) -> Any:
        """Read one option of a section, or take its default."""
        if node is not None:
            return self.value(option.name, option.type, node, complete)
        if dataclasses.is_dataclass(option.type):
            return self.section(option.type, Node({}, section_place), f"{option.name}.", complete)
        if option.default is not MISSING:
            self.values |= flatten(option.default, option.name)
            return option.default
        if complete:
            expected = type_name(option.type)
            self.report(section_place, f"missing required key {option.name!r} ({expected}: {option.help})")
        return _BAD

    def value(self, name: str, kind: Any, node: Node, complete: bool) -> Any:
        """Read a value of one of the alternatives of a type."""
        self.places[name] = node.where
        member = next((member for member in alternatives(kind) if _fits(member, node.value)), None)
        if member is None:
            self.report(node.where, f"{name}: expected {type_name(kind)}, found {describe(node)}{_hint(kind, node)}")
            return _BAD
        if dataclasses.is_dataclass(member):
            return self.section(member, node, f"{name}.", complete)
        if isinstance(node.value, list):
            return self.list(name, typing.get_args(member)[0], node, complete)
        self.values[name] = float(node.value) if member is float else node.value
        return self.values[name]

    def list(self, name: str, kind: Any, node: Node, complete: bool) -> Any:
        """Read a list; entries that are sections are named by their index."""
        entries = [self.value(f"{name}.{index}", kind, entry, complete) for index, entry in enumerate(node.value)]
        if any(entry is _BAD for entry in entries):
            return _BAD
        if not any(dataclasses.is_dataclass(entry) for entry in entries):
            self.values[name] = entries
        return entries


def _fits(kind: Any, value: Any) -> bool:
    """Whether a node's value has a type, lists and mappings by their outside only. An int is a float, a bool no int."""
    if typing.get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return type(value) is kind or (kind is float and type(value) is int)


def _hint(kind: Any, node: Node) -> str:
    """Say what was probably meant."""
    members = alternatives(kind)
    if isinstance(node.value, str):
        choices = [
            choice for member in members if typing.get_origin(member) is Literal for choice in typing.get_args(member)
        ]
        near = difflib.get_close_matches(node.value, choices, n=1)
        return f"; did you mean {near[0]!r}?" if near else ""
    return "; quotes make it text" if str in members and node.text else ""


def _unknown_key(prefix: str, key: str, siblings: Sequence[str]) -> str:
    """Say where a key belongs that its section does not have, or which key was probably meant."""
    message = f"unknown key {prefix + key!r}"
    last = key.rpartition(".")[2]
    homes = [name.rpartition(".")[0] for name in all_options() if name.rpartition(".")[2] == last]
    if homes:
        return f"{message}; {last!r} belongs {_under(homes)}"
    if near := difflib.get_close_matches(key, siblings, n=1):
        return f"{message}; did you mean {near[0]!r}?"
    names = {name.rpartition(".")[2]: name for name in all_options()}
    if near := difflib.get_close_matches(last, names, n=1):
        return f"{message}; did you mean {names[near[0]]!r}?"
    return f"{message}; expected one of {', '.join(siblings)}"


def _under(homes: Sequence[str]) -> str:
    """Spell sections as in "under 'eval' or 'log'"."""
    places = [f"under {home!r}" if home else "at the top level" for home in homes]
    return " or ".join(places)
