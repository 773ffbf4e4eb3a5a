"""Trees of which parts may be missing."""

from __future__ import annotations

from typing import Any


def present(**parts: Any) -> dict[str, Any] | None:
    """Return those parts that are not None; None where all are."""
    return {name: tree for name, tree in parts.items() if tree is not None} or None


def part(tree: dict[str, Any] | None, name: str) -> Any | None:
    """Return a part, None where it is missing."""
    return None if tree is None else tree.get(name)
