"""Strict reading of run configurations: every problem of every file and override is told at once, with its place."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxllm.config.nodes import Node, Report, Where, apply_overrides, describe, merge, read_file
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
    problems: list[tuple[Where, str]] = []

    def report(where: Where, message: str) -> None:
        problems.append((where, message))

    end = Where(len(paths), 0, "command line")
    files = [read_file(path, source, report) for source, path in enumerate(paths)]
    complete = None not in files
    root = Node({}, end._replace(name=", ".join(map(str, paths)) or "command line"))
    for node in filter(None, files):
        root = merge(root, node)
    root = apply_overrides(root, overrides, end, report)
    reader = _Reader(report, complete)
    config = reader.section(RunConfig, root, "")
    if complete:
        reader.check_rules(root.where)
    if problems:
        raise InputError("\n".join(f"{where}: {message}" for where, message in sorted(problems)))
    return config


class _Reader:
    """Turns nodes into config dataclasses and goes on after a problem.

    Attributes:
      values: options read or defaulted so far, by dotted name.
      places: where each dotted name was given.
    """

    def __init__(self, report: Report, complete: bool) -> None:
        """Missing options are problems only if all files could be read (`complete`)."""
        self.report = report
        self.complete = complete
        self.values: dict[str, Any] = {}
        self.places: dict[str, Where] = {}

    def check_rules(self, default: Where) -> None:
        """Report broken rules at the first of their options that was given."""
        for violation in violations(self.values):
            where = next((self.places[name] for name in violation.options if name in self.places), default)
            self.report(where, str(violation))

    def section(self, config_class: type, node: Node, prefix: str) -> Any:
        """Read a mapping."""
        options = {option.name.removeprefix(prefix): option for option in section_options(config_class, prefix)}
        for key, child in node.value.items():
            if key not in options:
                self.report(child.where, _unknown_key(prefix, key, list(options)))
        fields = {key: self.option(option, node) for key, option in options.items()}
        return _BAD if any(value is _BAD for value in fields.values()) else config_class(**fields)

    def option(self, option: Option, section: Node) -> Any:
        """Read one option of a section, or take its default."""
        node = section.value.get(option.name.rpartition(".")[2])
        if node is not None:
            value = self.value(option.name, option.type, node)
        elif dataclasses.is_dataclass(option.type):
            value = self.section(option.type, Node({}, section.where), f"{option.name}.")
        else:
            value = self.default(option, section.where)
        if value is not _BAD:
            self.values |= flatten(value, option.name)
        return value

    def default(self, option: Option, where: Where) -> Any:
        """Return the value of an option that is not given."""
        if option.default is not MISSING:
            return option.default
        if self.complete:
            self.report(where, f"missing required key {option.name!r} ({type_name(option.type)}: {option.help})")
        return _BAD

    def value(self, name: str, kind: Any, node: Node) -> Any:
        """Read a value of one of the alternatives of a type; entries of a list are named by their index."""
        self.places[name] = node.where
        member = next((member for member in alternatives(kind) if _fits(member, node.value)), None)
        if member is None:
            self.report(node.where, f"{name}: expected {type_name(kind)}, found {describe(node)}{_hint(kind, node)}")
            return _BAD
        if dataclasses.is_dataclass(member):
            return self.section(member, node, f"{name}.")
        if isinstance(node.value, list):
            entry_kind = typing.get_args(member)[0]
            entries = [self.value(f"{name}.{i}", entry_kind, entry) for i, entry in enumerate(node.value)]
            return _BAD if any(entry is _BAD for entry in entries) else entries
        return float(node.value) if member is float else node.value


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
