"""How options are declared: a dataclass field with a default, a sentence of help and bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

_REQUIRED = dataclasses.MISSING

Rule = tuple[tuple[str, ...], Callable[..., str | None]]
"""The options concerned, the first to blame, and what says what is wrong with their values."""


def option(default: Any, help: str, **bounds: float) -> Any:
    """Declare one configuration option; lists and nested configs get a fresh default each time.

    `bounds` are ge, gt, le, lt: what a number, or each number of a list, must satisfy.
    """
    metadata = {"help": help, "bounds": bounds}
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, **bounds: float) -> Any:
    """Declare an option that has no default: leaving it out is an error."""
    return option(_REQUIRED, help, **bounds)


def section(config_class: type, help: str) -> Any:
    """Declare a nested group of options."""
    return option(config_class, help)
