"""YAML files and command-line overrides as one tree of values that know the file and line they come from."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# Plain scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: 2e-4 is a number, `no` and `010` are text. At most
# 18 digits, so that an int fits 64 bits.
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,17})")
_FLOAT = re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_OVERRIDE = re.compile(r"(?:--)?([\w.-]+)=(.*)", re.DOTALL)


class Where(NamedTuple):
    """A place in the input, sorted by source and line.

    Attributes:
      source: number of the file; the command line comes last.
      line: counted from 1; 0 where a whole source is meant.
    """

    source: int
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclasses.dataclass
class Node:
    """A value: dict[str, Node], list[Node], str, int, float, bool or None, with its spelling and place."""

    value: Any
    where: Where
    text: str = ""


Report = Callable[[Where, str], None]
"""Takes a problem, so that reading goes on and all of them are told at once."""


class _Loader(yaml.BaseLoader):
    """Composes scalars as text and refuses what a config has no use for."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"tags are not supported ({event.tag!r})", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def read_file(path: str | Path, source: int, report: Report) -> Node | None:
    """Read a YAML file whose top level is a mapping; None after reporting why it cannot be read."""
    name = str(path)
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        report(Where(source, line, name), f"not UTF-8 text: byte 0x{data[error.start]:02x}")
        return None
    except OSError as error:
        report(Where(source, 0, name), f"cannot read the config: {error.strerror}")
        return None
    root = parse(text, Where(source, 1, name), report)
    if root is None or isinstance(root.value, dict):
        return root
    report(root.where, f"expected a mapping of options, found {describe(root)}")
    return None


def parse(text: str, start: Where, report: Report) -> Node | None:
    """Parse YAML text that begins at `start`; None after reporting what is wrong. Empty text is an empty mapping."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        report(_line(start, error.problem_mark.line), f"not valid YAML: {problem}")
        return None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        report(_line(start, line), f"not valid YAML: unprintable character {chr(error.character)!r}")
        return None
    except RecursionError:
        report(start, "not valid YAML: nested too deeply")
        return None
    return Node({}, start) if node is None else _convert(node, _line(start, node.start_mark.line), start, report)


def _line(start: Where, line: int) -> Where:
    """The command line has no lines, so everything there stands at the start."""
    return start._replace(line=start.line + line) if start.line else start


def _convert(node: yaml.Node, where: Where, start: Where, report: Report) -> Node:
    if isinstance(node, yaml.ScalarNode):
        return Node(scalar(node.value) if node.style is None else node.value, where, node.value)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(e, _line(start, e.start_mark.line), start, report) for e in node.value], where)
    entries: dict[str, Node] = {}
    for key, value in node.value:
        place = _line(start, key.start_mark.line)
        if not isinstance(key, yaml.ScalarNode):
            report(place, "expected the name of an option, found a list or mapping")
        elif key.value in entries:
            report(place, f"duplicate key {key.value!r}, first given at {entries[key.value].where}")
        else:
            entries[key.value] = _convert(value, place, start, report)
    return Node(entries, where)


def scalar(text: str) -> str | int | float | bool | None:
    """Return what an unquoted scalar means; numbers that are not finite stay text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def describe(node: Node) -> str:
    """Say what a node holds, as in "'fast' (text)"."""
    if isinstance(node.value, dict | list):
        return "a mapping" if isinstance(node.value, dict) else "a list"
    if node.value is None:
        return "null"
    kind = {str: "text", bool: "true or false", int: "int", float: "float"}[type(node.value)]
    return f"{node.text!r} (text)" if kind == "text" else f"{node.text} ({kind})"


def merge(old: Node, new: Node) -> Node:
    """Lay `new` over `old`: mappings merge key by key, anything else is replaced."""
    if not (isinstance(old.value, dict) and isinstance(new.value, dict)):
        return new
    shared = {key: merge(old.value[key], node) for key, node in new.value.items() if key in old.value}
    return Node(old.value | new.value | shared, old.where)


def apply_overrides(root: Node, overrides: Sequence[str], where: Where, report: Report) -> Node:
    """Lay `a.b=value`, `--a.b=value` and `--a.b value` over the tree; a number in the name is an index into a list."""
    tokens = list(overrides)
    while tokens:
        token = tokens.pop(0)
        if found := _OVERRIDE.fullmatch(token):
            name, text = found.groups()
        elif token.startswith("--") and tokens and not tokens[0].startswith("--"):
            name, text = token[2:], tokens.pop(0)
        else:
            report(where, f"expected key=value or --key value, found {token!r}")
            continue
        value = _override_value(text, where, report)
        if value is not None:
            root = _set(root, name.split("."), value, report)
    return root


def _override_value(text: str, where: Where, report: Report) -> Node | None:
    # Only what opens a list, a mapping or a quote is YAML: in `*.txt` or `a: b #c` its other signs mean nothing.
    if text.startswith(("[", "{", '"', "'")):
        return parse(text, where, report)
    return Node(scalar(text), where, text)


def _set(node: Node, keys: list[str], value: Node, report: Report) -> Node:
    """Return the tree with `value` merged in under `keys`; a number is an index, except into a mapping."""
    if not keys:
        return merge(node, value)
    key, rest = keys[0], keys[1:]
    if not isinstance(node.value, dict) and not (isinstance(node.value, list) and key.isdecimal()):
        node = Node([] if key.isdecimal() else {}, value.where)
    absent = Node(None, value.where)
    if isinstance(node.value, dict):
        return Node(node.value | {key: _set(node.value.get(key, absent), rest, value, report)}, node.where)
    index, items = int(key), list(node.value)
    if index > len(items):
        report(value.where, f"index {key} is past the end of a list of {len(items)}")
        return node
    items[index : index + 1] = [_set(items[index] if index < len(items) else absent, rest, value, report)]
    return Node(items, node.where)
