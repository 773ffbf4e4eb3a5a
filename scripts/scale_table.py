"""docs/scale.md from the kept rows."""

from __future__ import annotations


def write_page(path, rows) -> None:
    """Write the page."""
