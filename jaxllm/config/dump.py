"""Run configurations as text: YAML that loads back equal, differences between two runs, the table of all options."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Sequence
from typing import Any

import yaml

from jaxllm.config.nodes import scalar
from jaxllm.config.options import MISSING, all_options, bounds_name, flatten, type_name
from jaxllm.config.schema import RunConfig

_ABSENT = object()


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values on one line and quotes all text that our reader would take for something else."""


def _represent_text(dumper: yaml.Dumper, text: str) -> yaml.Node:
    # Unusual line breaks survive only as escapes, which double quotes give.
    plain = text.isprintable() and scalar(text) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_list(dumper: yaml.Dumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def dump_config(config: RunConfig) -> str:
    """Write a config as YAML with every option, so that it loads back equal whatever defaults become."""
    return yaml.dump(
        dataclasses.asdict(config),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=1000,
    )


def diff_configs(old: RunConfig, new: RunConfig, ignore: Sequence[str] = ()) -> list[str]:
    """Return a line "option: old -> new" for each option that differs.

    Args:
      ignore: dotted names or patterns, such as "log.*", of options that may differ.
    """
    before, after = flatten(old), flatten(new)
    lines = []
    for name in before | after:
        pair = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if pair[0] != pair[1] and not any(fnmatch.fnmatchcase(name, ignored) for ignored in ignore):
            lines.append(f"{name}: {_show(pair[0])} -> {_show(pair[1])}")
    return lines


def _show(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def config_help() -> str:
    """Return a table of every option: dotted name, type and bounds, default, and what it does."""
    rows = [
        _help_row(name)
        for name, option in all_options().items()
        if not (option.is_section and option.default is MISSING)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for *cells, help_text in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines += [line.rstrip(), f"    {help_text}"]
    return "\n".join(lines)


def _help_row(name: str) -> tuple[str, str, str, str]:
    option = all_options()[name]
    kind = type_name(option.type) + (f", {bounds_name(option.bounds)}" if option.bounds else "")
    default = "required" if option.default is MISSING else f"default {_show(option.default)}"
    return name, kind, default, option.help
