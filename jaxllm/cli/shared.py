"""What several verbs share."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which text to read and where to write."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, globs or folders of text")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="text field of jsonl and parquet rows")


@contextlib.contextmanager
def show_progress(line: str) -> Iterator[Callable[..., None] | None]:
    """Give a callback that rewrites one line of the terminal, a few times a second; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    next_time = 0.0

    def show(*counts: int) -> None:
        nonlocal next_time
        if time.monotonic() >= next_time:
            next_time = time.monotonic() + 0.2
            print(f"\r\033[K{line.format(*counts)}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
